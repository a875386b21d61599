"""One chunk of a prompt behind a context, and what attention errs."""

from collections.abc import Iterator

import torch
from sections import Row, at_most, attempted
from transformers import DynamicCache

from gpu_bench.workshop import Bench, judged_ratio, share_off
from hf_tiered_cache import tiered_attention_forward

RUNS = ((0.0, "tiered"), (0.5, "tiered"), (0.9, "tiered"), (0.9, "sdpa"))
BAR = 1.3


def prefill(bench: Bench) -> Iterator[Row]:
    """One chunk behind a context, at several shares off the device. A model that attends by "sdpa"
    brings a mask of queries by tokens, one that attends by "tiered" brings none."""
    sizes = bench.sizes
    bench.model  # noqa: B018 - its memory counts
    context = bench.context_that_fits(sizes.short, [0.0, 0.9])
    dynamic = bench.dynamic(context)
    for share, attention in RUNS:
        what = f"prefill {sizes.prefill:,} behind {context:,}: {share:.0%} off, {attention}"
        rows = chunk_beside(bench, dynamic, share, attention, what, context == sizes.short)
        yield from attempted(bench, what, rows)


def chunk_beside(
    bench: Bench, dynamic: DynamicCache, share: float, attention: str, what: str, is_as_asked: bool
) -> Iterator[Row]:
    """The chunk in a tiered cache and in `DynamicCache`, in turn."""
    ids = bench.ids(bench.sizes.prefill)
    with bench.tiered(dynamic.get_seq_length() + bench.sizes.prefill, share) as cache:
        bench.fill_like(cache, dynamic)
        pairs = [
            (
                bench.prefill_time(cache, ids, attention),
                bench.prefill_time(dynamic, ids, "sdpa"),
            )
            for _ in range(1 + bench.sizes.rounds)
        ]
        ours, theirs = zip(*pairs[1:], strict=True)
        off = f"{share_off(cache):.0%} off"
        yield judged_ratio(what, ours, theirs, BAR if is_as_asked else None, "1.00-1.05", off)


class Attention(torch.nn.Module):
    """What an attention function wants to know of its layer."""

    is_causal = True


@torch.no_grad()
def error(bench: Bench) -> Iterator[Row]:
    """One layer's attention against float64, over the error of sdpa in the same dtype."""
    layout, heads = bench.layout, bench.sizes.config.num_attention_heads
    tokens, device = bench.sizes.error, bench.machine.device
    group = heads // layout.kv_heads
    shape = (1, layout.kv_heads, tokens, layout.key_dim)
    keys, values = torch.randn((2, *shape), device=device).bfloat16().unbind(0)
    dense = [states.repeat_interleave(group, 1) for states in (keys, values)]
    for what, queries in (("decode", 1), ("prefill", min(256, tokens // 4))):
        query = 2 * torch.randn((1, heads, queries, layout.key_dim), device=device).bfloat16()
        seen = torch.ones(queries, tokens, dtype=torch.bool, device=device)
        seen = seen.tril(tokens - queries)
        sdpa = torch.nn.functional.scaled_dot_product_attention(query, *dense, attn_mask=seen)
        scores = query.double() @ dense[0].double().mT * layout.key_dim**-0.5
        exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ dense[1].double()
        with bench.tiered(tokens, 0.0) as cache:
            cache.update(keys[:, :, :-queries], values[:, :, :-queries], 0)
            handles = cache.update(keys[:, :, -queries:], values[:, :, -queries:], 0)
            out, _ = tiered_attention_forward(Attention().eval(), query, *handles, None)
            del handles
        ours, theirs = (
            float((result.double() - exact).norm() / exact.norm())
            for result in (out.transpose(1, 2), sdpa)
        )
        yield at_most(
            f"error against float64 over sdpa's, {what}",
            ours / theirs,
            1.3,
            "0.7-1.3",
            note=f"{ours:.2e} and {theirs:.2e}, {tokens:,} tokens, {queries} queries",
        )
