"""The decode kernel by the device's own clock, beside torch's sdpa."""

from collections.abc import Iterator
from time import perf_counter

import torch
from sections import Row, attempted

from gpu_bench.workshop import Bench
from hf_tiered_cache.kernels import ops

GROUPS = (4, 8)  # query heads for each key-value head
ROUNDS = 20


def kernels(bench: Bench) -> Iterator[Row]:
    """Bytes of keys and values per second, for each group and context."""
    for context in (bench.sizes.short, bench.sizes.long):
        for group in GROUPS:
            what = f"decode kernel, {group} heads a group, {context:,} tokens"
            yield from attempted(bench, what, one_kernel(bench, context, group, what))


@torch.no_grad()
def one_kernel(bench: Bench, context: int, group: int, what: str) -> Iterator[Row]:
    layout, device = bench.layout, bench.machine.device
    slots = layout.num_blocks(context)
    blocks = torch.zeros((slots, layout.num_bytes), dtype=torch.uint8, device=device)
    view = ops.BlockView(blocks, torch.arange(slots, dtype=torch.int32)[None], layout)
    heads = layout.kv_heads * group
    query = torch.randn((1, heads, 1, layout.key_dim), device=device).bfloat16()
    call = ops.AttentionCall(kv_tokens=context, query_start=context - 1, scale=layout.key_dim**-0.5)
    shape = (2, 1, layout.kv_heads, context, layout.key_dim)
    keys, values = torch.randn(shape, device=device, dtype=torch.bfloat16).unbind(0)

    def ours() -> object:
        return ops.paged_attention(query, view, call)

    def theirs() -> object:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=True
        )

    rates, hosts = [], []
    for work in (ours, theirs):
        for _ in range(3):
            work()
        bench.machine.synchronize()
        start = perf_counter()
        work()
        hosts.append(perf_counter() - start)
        rates.append(keys.nbytes * 2 / bench.machine.elapsed(work, ROUNDS))
    yield Row(
        what,
        f"{rates[0] / 1e9:,.0f} GB/s",
        note=f"sdpa {rates[1] / 1e9:,.0f}; the call takes the host {hosts[0] * 1e6:.0f} us, theirs "
        f"{hosts[1] * 1e6:.0f}",
        data={"rate": rates[0], "sdpa_rate": rates[1], "host_seconds": hosts},
    )
