"""Given a real model's queries, keys and values: whose attention is nearer to float64?

    python eval/attention_error.py
    python eval/attention_error.py --model HuggingFaceTB/SmolLM2-135M --context 512

`against_float64.py` compares logits, where the rounding of all other layers hides attention's.
Here a model in half precision reads a text, and in each of its layers the same queries, keys and
values are attended four times: in float64, by sdpa, by eager attention, and over the blocks of a
`TieredCache`. A position's error is the root mean square of its output's distance from float64's.
For models of full attention, whose scores are neither capped nor biased.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hf_tiered_cache import TieredCache, tiered_attention_forward
from hf_tiered_cache.evaluation.documents import STDLIB, long_documents, read_texts
from hf_tiered_cache.evaluation.models import (
    check_has_only_full_attention,
    load_model,
    load_tokenizer,
)
from hf_tiered_cache.evaluation.names import model_name

import benchmarking

TINY_LM = Path(__file__).parent / "tiny_lm"
SDPA, EAGER, OURS = "sdpa", "eager", "TieredCache"
COMPARING = "comparing"  # the name of the attention that does so


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, inner: torch.dtype) -> Tensor:
    """Causal attention as eager implementations compute it, the softmax in `inner`; `[batch,
    queries, heads, head_dim]` of `[batch, heads, tokens, head_dim]`."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (one.repeat_interleave(group, 1) for one in (keys, values))
    scores = query @ keys.transpose(2, 3) * scale
    queries, tokens = scores.shape[-2:]
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1, dtype=inner).to(query.dtype) @ values).transpose(1, 2)


@contextmanager
def comparing(model: PreTrainedModel, cache: TieredCache) -> Iterator[dict[str, list[Tensor]]]:
    """Let the model attend in all ways inside the `with`; yields the positions' errors of each."""
    errors: dict[str, list[Tensor]] = {SDPA: [], EAGER: [], OURS: []}

    def forward(
        module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scale = kwargs["scaling"]
        truth = attend(query.double(), keys.double(), values.double(), scale, torch.float64)
        new = slice(keys.shape[2] - query.shape[2], None)
        handles = cache.update(keys[:, :, new], values[:, :, new], module.layer_idx)
        outputs = {
            SDPA: sdpa_attention_forward(module, query, keys, values, mask, scaling=scale)[0],
            EAGER: attend(query, keys, values, scale, torch.float32),
            OURS: tiered_attention_forward(module, query, *handles, None, scaling=scale)[0],
        }
        for name, output in outputs.items():
            errors[name].append((output.double() - truth).square().mean((-1, -2)).sqrt()[0])
        return outputs[SDPA], None

    own = model.config._attn_implementation
    AttentionInterface.register(COMPARING, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(COMPARING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(COMPARING)
    try:
        yield errors
    finally:
        model.set_attn_implementation(own)


@torch.no_grad()
def measure(
    model: PreTrainedModel, cache: TieredCache, parts: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """The errors of each part `[1, tokens]` of a text, over all layers and positions."""
    dynamic, found = DynamicCache(config=model.config), []
    with comparing(model, cache) as errors:
        for part in parts:
            model.base_model(part, past_key_values=dynamic)
            found.append({name: torch.cat(of_it) for name, of_it in errors.items()})
            for of_it in errors.values():
                of_it.clear()
    return found


def report(table: benchmarking.Table, what: str, found: list[dict[str, Tensor]]) -> bool:
    """Print the figures of some parts; return whether ours is nowhere the farther one."""
    errors = {name: torch.cat([one[name] for one in found]) for name in (SDPA, EAGER, OURS)}
    for name, of_it in errors.items():
        root, most = of_it.square().mean().sqrt().item(), of_it.max().item()
        table.value(f"{what}, {name}: RMS error", f"{root:.3g}", note=f"largest {most:.3g}")
    means = {}
    for name in (SDPA, EAGER):
        both = (errors[OURS] > 0) & (errors[name] > 0)  # a position that sees itself only is exact
        ratios = (errors[OURS][both] / errors[name][both]).log()
        means[name] = ratios.mean().exp().item()
        table.value(
            f"{what}, {OURS} over {name}: geometric mean",
            f"{means[name]:.3f}",
            bar="1",
            is_reached=means[name] <= 1,
            note=f"nearer at {(ratios < 0).double().mean():.0%} of {len(ratios):,}",
        )
    return all(mean <= 1 and math.isfinite(mean) for mean in means.values())


def main(command: Sequence[str] | None = None) -> int:
    """Run; return 0 if ours is not the farther one, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(TINY_LM), help="hub id or folder")
    parser.add_argument("--data", default=STDLIB, help="as in perplexity.py")
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--decode-tokens", type=int, default=8, help="the last, one by one")
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens per forward")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    arguments = parser.parse_args(command)
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(arguments.model)
    texts = read_texts(arguments.data)
    (document,) = long_documents(texts, tokenizer, arguments.context, 1, join=False)
    model = load_model(arguments.model, arguments.dtype)
    check_has_only_full_attention(model)
    facts = benchmarking.environment()
    table = benchmarking.Table(
        f"{model_name(arguments.model)}, {arguments.dtype}, {arguments.context:,} tokens of "
        f"{document.name}: attention's distance from float64; {facts['processor']}, kernel "
        f"{facts['kernel']}"
    )
    prefilled = arguments.context - arguments.decode_tokens
    ids = document.ids[None, : arguments.context]
    chunks, decoded = ids[:, :prefilled].split(arguments.chunk, 1), ids[:, prefilled:].split(1, 1)
    with TieredCache(config=model.config, disk_bytes=0) as cache:
        found = measure(model, cache, [*chunks, *decoded])
    is_nearer = report(table, "prefill", found[: len(chunks)])
    is_nearer &= report(table, "decode", found[len(chunks) :])
    table.finish()
    return 0 if is_nearer else 1


if __name__ == "__main__":
    sys.exit(main())
