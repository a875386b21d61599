"""The attention kernels against the machine's own limits and against transformers.

Decode: one query token per sequence, bound by reading the blocks, so its bar is a share of a plain
read loop over the same blocks on the same threads (the probe). Prefill: bound by arithmetic, so its
bar is a share of torch's matrix product. Both also against what `generate` does without us:
`DynamicCache.update` (a concatenation) and transformers' sdpa. Errors are against float64.

    python eval/bench_kernels.py [--quick] [--threads 2] [--json out.json] [--only decode]

Method: every figure is a ratio of medians over rounds in which both sides run in turn; keys and
values lie in touched huge pages, blocks shuffled, and do not fit the caches (64 MB and more).
A short sleep before each timed call lets the other side's spinning threads go to sleep.
"""

import argparse
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_tiered_cache.kernels import cores, loader, ops
from hf_tiered_cache.layout import BlockLayout, default_block_tokens

import benchmarking

HUGE_PAGE = 2 << 20
SETTLE_SECONDS = 0.005
CALLS = 500  # of the almost empty calls, per sample
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    decode_tokens: int
    # Bars per dtype; a dtype that is missing has none.
    probe: dict[str, float]
    step: dict[str, float]
    masked: dict[str, float]


LLAMA_8B = Shape(
    "32/8 heads x 128",
    *(32, 8, 128, 32768),
    probe={"bf16": 0.85, "fp32": 0.85, "fp16": 0.85},
    step={"bf16": 30, "fp32": 16, "fp16": 40},
    masked={"bf16": 2.7, "fp32": 2.2, "fp16": 9},
)
QWEN_HALF_B = Shape("14/2 heads x 64", *(14, 2, 64, 131072), probe={}, step={"bf16": 30}, masked={})


class Attention(torch.nn.Module):
    """What transformers' sdpa asks of the module that calls it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.is_causal = True


class Layer:
    """One layer's cache with random content, in blocks."""

    def __init__(self, shape: Shape, dtype: torch.dtype, tokens: int, queries: int) -> None:
        self.shape, self.dtype, self.tokens = shape, dtype, tokens
        dim = shape.head_dim
        self.scale = dim**-0.5
        self.layout = BlockLayout(shape.kv_heads, dim, dim, default_block_tokens(dim, dtype), dtype)
        self.query = torch.randn(1, shape.heads, queries, dim).to(dtype)
        num_blocks = self.layout.num_blocks(tokens)
        self.blocks = huge_slab(num_blocks, self.layout.num_bytes)
        # An eighth of random data, repeated: reading it costs the same.
        data = torch.randn(max(1, num_blocks // 8), self.layout.num_bytes // dtype.itemsize)
        source = data.to(dtype).view(torch.uint8)
        for slot in range(num_blocks):
            self.blocks[slot] = source[slot % len(source)]
        self.table = torch.randperm(num_blocks).int()[None]
        self.view = ops.BlockView(self.blocks, self.table, self.layout)
        self.call = ops.AttentionCall(
            kv_tokens=tokens, query_start=tokens - queries, scale=self.scale
        )

    @property
    def num_bytes(self) -> int:
        return self.table.numel() * self.layout.data_bytes

    def attend(self) -> ops.AttentionState:
        return ops.paged_attention(self.query, self.view, self.call)

    def append(self, keys: Tensor, values: Tensor) -> None:
        ops.append_tokens(keys, values, self.view, self.tokens - 1)

    def read(self) -> None:
        """The probe: read the same planes of the same blocks with the same threads."""
        core = loader.chosen_kernel().core
        assert isinstance(core, cores.CpuCore)
        core.module.read_probe(
            core.number,
            cores.DTYPE_NUMBERS[self.dtype],
            self.query.data_ptr(),
            self.query.shape,
            self.query.stride(),
            self.view.core_arguments,
            *cores.call_arguments(self.call),
            None,
            None,
            torch.get_num_threads(),
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, tokens, head_dim] in one piece."""
        slots = self.table[0].long()
        keys = self.layout.keys(self.blocks)[slots].transpose(0, 1).flatten(1, 2)[None]
        values = self.layout.values(self.blocks)[slots].transpose(0, 1).flatten(1, 2)[None]
        return (
            keys[:, :, : self.tokens].contiguous(),
            values[:, :, : self.tokens].contiguous(),
        )


def huge_slab(num_slots: int, num_bytes: int) -> Tensor:
    """uint8 [num_slots, num_bytes] in huge pages, as the host tier allocates."""
    memory = mmap.mmap(-1, num_slots * num_bytes + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + num_slots * num_bytes].view(num_slots, num_bytes)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A side of a pair: sleep, then the seconds of one call."""

    def side() -> float:
        time.sleep(SETTLE_SECONDS)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return side


def speed(samples: benchmarking.Samples, amount: float, unit: str) -> str:
    return f"{amount / samples.median / 1e9:.1f} {unit}"


def bench_decode(table: benchmarking.Table, shape: Shape, name: str, rounds: int) -> None:
    layer = Layer(shape, DTYPES[name], shape.decode_tokens, queries=1)
    what = f"decode {name} {shape.name}, {shape.decode_tokens // 1024}K"
    probe, ours = benchmarking.paired(timed(layer.read), timed(layer.attend), rounds=rounds)
    table.ratio(
        f"{what}: share of the read probe",
        baseline=probe,
        ours=ours,
        bar=shape.probe.get(name),
        note=f"{ours.median * 1e3:.2f} ms, {speed(ours, layer.num_bytes, 'GB/s')}, "
        f"probe {speed(probe, layer.num_bytes, 'GB/s')}",
    )

    keys, values = layer.dense()
    module = Attention(shape)
    cache = DynamicCache()
    cache.update(keys[:, :, :-1].clone(), values[:, :, :-1].clone(), 0)
    new_keys, new_values = keys[:, :, -1:], values[:, :, -1:]

    def step() -> None:
        all_keys, all_values = cache.update(new_keys, new_values, 0)
        sdpa_attention_forward(module, layer.query, all_keys, all_values, None, scaling=layer.scale)

    def dynamic() -> float:
        seconds = timed(step)()
        cache.crop(-1)
        return seconds

    def tiered() -> None:
        layer.append(new_keys, new_values)
        layer.attend()

    everything = torch.ones(1, 1, 1, layer.tokens, dtype=torch.bool)

    def masked() -> None:
        sdpa_attention_forward(module, layer.query, keys, values, everything, scaling=layer.scale)

    default, grouped, ours = benchmarking.paired(
        dynamic, timed(masked), timed(tiered), rounds=max(3, rounds // 2), warmup=1
    )
    table.ratio(
        f"{what}: over DynamicCache.update + sdpa",
        baseline=default,
        ours=ours,
        bar=shape.step.get(name),
        note=f"{default.median * 1e3:.1f} ms",
    )
    table.ratio(
        f"{what}: over masked grouped sdpa without update",
        baseline=grouped,
        ours=ours,
        bar=shape.masked.get(name),
        note=f"{grouped.median * 1e3:.1f} ms",
    )


def bench_prefill(
    table: benchmarking.Table, name: str, past: int, queries: int, rounds: int
) -> None:
    shape = LLAMA_8B
    layer = Layer(shape, DTYPES[name], past + queries, queries)
    what = f"prefill {name} {shape.name}, {queries} on {past // 1024}K"
    flops = 4 * shape.heads * shape.head_dim * queries * (past + (queries + 1) / 2)
    keys, values = layer.dense()
    module = Attention(shape)
    stands_at = torch.arange(past, past + queries)[:, None]
    causal = (torch.arange(layer.tokens) <= stands_at)[None, None]

    def sdpa() -> None:
        sdpa_attention_forward(module, layer.query, keys, values, causal, scaling=layer.scale)

    def product(dtype: torch.dtype) -> Callable[[], float]:
        size = 2048
        left, right = torch.randn(2, size, size).to(dtype)

        def side() -> float:
            # As if it had the kernel's operations to do.
            return timed(lambda: torch.mm(left, right))() * flops / (2 * size**3)

        return side

    ours, theirs, *peaks = benchmarking.paired(
        timed(layer.attend),
        timed(sdpa),
        product(torch.float32),
        *([product(torch.bfloat16)] if name == "bf16" else []),
        rounds=rounds,
        warmup=1,
    )
    rate = speed(ours, flops, "GFLOP/s")
    for peak, kind in zip(peaks, ("fp32", "bf16"), strict=False):
        bar = 1.0 if name == "fp32" else 0.8
        table.ratio(
            f"{what}: share of torch's {kind} matmul",
            baseline=peak,
            ours=ours,
            bar=bar,
            note=f"{rate}, matmul {speed(peak, flops, 'GFLOP/s')}",
        )
    table.ratio(
        f"{what}: over transformers' sdpa",
        baseline=theirs,
        ours=ours,
        bar=2.5 if name == "bf16" else None,
        note=f"{theirs.median * 1e3:.0f} ms",
    )


def bench_errors(table: benchmarking.Table, name: str) -> None:
    """Largest error against float64 over that of torch's sdpa in the same dtype."""
    for queries, tokens in ((1, 4096), (256, 2048)):
        layer = Layer(LLAMA_8B, DTYPES[name], tokens, queries)
        keys, values = layer.dense()
        causal = torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None]

        def sdpa(dtype: torch.dtype, q=layer.query, k=keys, v=values, mask=causal) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                *(tensor.to(dtype) for tensor in (q, k, v)), attn_mask=mask, enable_gqa=True
            ).double()

        exact = sdpa(torch.float64)
        ours = (layer.attend().out.double() - exact).abs().max().item()
        theirs = (sdpa(layer.dtype) - exact).abs().max().item()
        table.value(
            f"error {name}, {queries} on {tokens}: ours over sdpa's",
            f"{ours / theirs:.2f}x",
            bar="<= 1x",
            is_reached=ours <= theirs,
            note=f"{ours:.1e} against {theirs:.1e}",
        )


def bench_calls(table: benchmarking.Table) -> None:
    """What one call costs when there is almost nothing to do."""
    layout = BlockLayout(1, 16, 16, 16, torch.float32)
    blocks = torch.zeros(2, layout.num_bytes, dtype=torch.uint8)
    slots = torch.zeros(1, 1, dtype=torch.int32)
    view = ops.BlockView(blocks, slots, layout)
    one = torch.zeros(1, 1, 1, 16)

    def attend() -> None:
        ops.paged_attention(one, view, ops.AttentionCall(kv_tokens=1, query_start=0, scale=1.0))

    def append() -> None:
        ops.append_tokens(one, one, view, 0)

    for what, call, bar in (("paged_attention", attend, 15), ("append_tokens", append, 10)):

        def many(call: Callable[[], None] = call) -> None:
            for _ in range(CALLS):
                call()

        (samples,) = benchmarking.paired(timed(many), rounds=9)
        microseconds = samples.median / CALLS * 1e6
        table.value(
            f"fixed cost of one {what} call",
            f"{microseconds:.1f} us",
            bar=f"<= {bar} us",
            is_reached=microseconds <= bar,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, bf16 and fp32 only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write results and environment to this file")
    parser.add_argument("--only", choices=("calls", "errors", "decode", "prefill"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names = ["bf16", "fp32"] if args.quick else list(DTYPES)
    parts = [args.only] if args.only else ["calls", "errors", "decode", "prefill"]
    table = benchmarking.Table(f"kernels: {ops.backend()}, {args.threads} threads")
    with torch.no_grad():
        if "calls" in parts:
            bench_calls(table)
        for name in names:
            if "errors" in parts:
                bench_errors(table, name)
        for name in names:
            if "decode" in parts:
                bench_decode(table, LLAMA_8B, name, rounds=5 if args.quick else 15)
        if "decode" in parts and not args.quick:
            for name in names:
                bench_decode(table, QWEN_HALF_B, name, rounds=15)
        for name in names:
            if "prefill" in parts:
                past = 4096 if args.quick else 16384
                bench_prefill(table, name, past, 512, rounds=3 if args.quick else 7)
    table.finish(args.json)


if __name__ == "__main__":
    main()
