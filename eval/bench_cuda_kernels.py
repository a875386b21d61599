"""The CUDA decode kernel alone: right, and how much of the memory's rate, beside flash attention.

    python eval/bench_cuda_kernels.py [--json out.json] [--tokens 32768 131072]
    python eval/bench_cuda_kernels.py --device cpu          (the checks only, on the CPU's kernel)

First the checks, on each head_dim, dtype and group: error against float64 beside that of torch's
attention, bits over splits of the table, on a GPU bits of a query alone and among others. Then
times by events, groups by queries by tokens, of `paged_attention` over shuffled blocks and of
torch's flash attention over the same keys and values lying dense; in both a spinning kernel before
the first event lets the host run ahead, so that no launch is timed. GB/s count keys and values
once. Last, what torch's profiler says of each kernel of one call. About 20 seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_tiered_cache.kernels import flash, ops
from hf_tiered_cache.layout import BlockLayout, default_block_tokens

KV_HEADS = 8
GROUPS = (1, 4, 8, 16)
QUERIES = (1, 4, 15)  # from 16 on, blocks are gathered for flash attention (kernels/flash.py)
CHECKED_TOKENS = 2900
ERROR_BAR = 1.3  # over that of torch's attention
SPIN_CYCLES = 3_000_000  # one to two milliseconds
CALLS, ROUNDS = 5, 5


class Layer:
    """Random keys and values, dense and in shuffled blocks, and queries behind them."""

    def __init__(
        self, device: torch.device, tokens: int, dim: int, dtype: torch.dtype, kv_heads: int
    ) -> None:
        self.tokens, self.kv_heads, self.device = tokens, kv_heads, device
        self.layout = BlockLayout(kv_heads, dim, dim, default_block_tokens(dim, dtype), dtype)
        shape = (1, kv_heads, tokens, dim)
        self.keys = torch.randn(shape, device=device).to(dtype)
        self.values = torch.randn(shape, device=device).to(dtype)
        columns = self.layout.num_blocks(tokens)
        self.table = torch.randperm(columns)[None].int()
        self.blocks = torch.empty(
            (columns, self.layout.num_bytes), dtype=torch.uint8, device=device
        )
        ops.append_tokens(self.keys, self.values, self.view(), 0)

    def view(self, columns: slice = slice(None)) -> ops.BlockView:
        first = (columns.start or 0) * self.layout.block_tokens
        return ops.BlockView(self.blocks, self.table[:, columns], self.layout, first)

    def query(self, group: int, queries: int) -> Tensor:
        shape = (1, self.kv_heads * group, queries, self.layout.key_dim)
        return torch.randn(shape, device=self.device).to(self.layout.dtype) * 2

    def call(self, queries: int, **changes: object) -> ops.AttentionCall:
        facts = {"kv_tokens": self.tokens, "query_start": self.tokens - queries, **changes}
        return ops.AttentionCall(**facts, scale=self.layout.key_dim**-0.5)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


# ---- checks --------------------------------------------------------------------------------------


@dataclass
class Checked:
    """One shape: errors relative to the largest output, and what was not equal."""

    what: str
    ours: float
    torchs: float
    differing: list[str]

    @property
    def is_right(self) -> bool:
        return self.ours <= ERROR_BAR * self.torchs and not self.differing

    def line(self) -> str:
        verdict = "reached" if self.is_right else f"MISSED {' '.join(self.differing)}"
        return f"{self.what:<40} {self.ours:>10.2e} {self.torchs:>10.2e}  {verdict}".rstrip()


def check(device: torch.device) -> Iterator[Checked]:
    """Every head_dim and dtype, with a few groups and queries."""
    shapes = [(128, group, queries) for group, queries in product(GROUPS, QUERIES)]
    shapes += [(dim, 4, queries) for dim in (64, 80, 256) for queries in (1, 4)]
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (128, 64, 80, 256):
            layer = Layer(device, CHECKED_TOKENS, dim, dtype, kv_heads=2)
            for _, group, queries in (shape for shape in shapes if shape[0] == dim):
                yield check_shape(layer, group, queries)


def check_shape(layer: Layer, group: int, queries: int) -> Checked:
    query, call, view = layer.query(group, queries), layer.call(queries), layer.view()
    keys, values = (one.repeat_interleave(group, 1) for one in (layer.keys, layer.values))
    positions = torch.arange(layer.tokens, device=layer.device)
    mask = positions <= positions[-queries:, None]
    expected = scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=mask
    )
    whole = ops.paged_attention(query, view, call).out
    torchs = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    state, columns = ops.RunningState.begin(query, layer.layout.value_dim), view.table.size(1)
    for part in (slice(0, columns // 3), slice(columns // 3, columns)):
        ops.attend_blocks(state, query, layer.view(part), call)
    parts = ops.finish_attention(state, dtype=query.dtype).out
    equal = {"splits": torch.equal(whole, parts)}
    if query.is_cuda and queries < flash.MIN_QUERIES:
        last = ops.paged_attention(query[:, :, -1:], view, layer.call(1)).out
        equal["alone"] = torch.equal(whole[:, :, -1:], last)
    most = expected.abs().max()
    ours_error, torchs_error = ((one.double() - expected).norm() for one in (whole, torchs))
    return Checked(
        f"{layer.layout.dtype} dim {layer.layout.key_dim} group {group} queries {queries}",
        (ours_error / expected.norm()).item() if most.isfinite() else float("nan"),
        (torchs_error / expected.norm()).item(),
        [name for name, is_equal in equal.items() if not is_equal],
    )


# ---- times ---------------------------------------------------------------------------------------


@dataclass
class Timed:
    """Microseconds of the device and of the host per call, and bytes that had to be read."""

    tokens: int
    group: int
    queries: int
    num_bytes: int
    ours: float
    flash: float
    host: float

    def line(self) -> str:
        ours, flash = (self.num_bytes / us / 1e3 for us in (self.ours, self.flash))
        return (
            f"{self.tokens:>7} {self.group:>5} {self.queries:>7}   {self.ours:>8.1f} {ours:>7.0f}"
            f"   {self.flash:>8.1f} {flash:>7.0f}   {self.flash / self.ours:>5.2f}x"
            f"   {self.host:>6.1f}"
        )


def times(device: torch.device, all_tokens: Sequence[int]) -> Iterator[Timed]:
    for tokens in all_tokens:
        layer = Layer(device, tokens, 128, torch.bfloat16, KV_HEADS)
        view = layer.view()
        for group, queries in product(GROUPS, QUERIES):
            query, call = layer.query(group, queries), layer.call(queries)
            out = torch.empty_like(query)
            ours, host = device_time(
                lambda q=query, c=call, o=out, v=view: ops.paged_attention(
                    q, v, c, out=o, return_lse=False
                )
            )
            flash, _ = device_time(
                lambda q=query, at=layer: scaled_dot_product_attention(
                    q, at.keys, at.values, enable_gqa=True
                )
            )
            yield Timed(tokens, group, queries, layer.num_bytes, ours, flash, host)


def device_time(run: Callable[[], object]) -> tuple[float, float]:
    """Microseconds per call of the device (median of rounds) and of the host."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        run()
        torch.cuda.synchronize()
        elapsed, host = [], 0.0
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            began = time.perf_counter()
            for _ in range(CALLS):
                run()
            host = (time.perf_counter() - began) / CALLS * 1e6
            end.record()
            end.synchronize()
            elapsed.append(begin.elapsed_time(end) / CALLS * 1e3)
    return sorted(elapsed)[ROUNDS // 2], host


def profile(device: torch.device, tokens: int) -> None:
    """Print the device time of each kernel of one call."""
    layer = Layer(device, tokens, 128, torch.bfloat16, KV_HEADS)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for group, queries in ((4, 1), (8, 1), (4, 15)):
        query, call, view = layer.query(group, queries), layer.call(queries), layer.view()
        ops.paged_attention(query, view, call)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            ops.paged_attention(query, view, call)
            torch.cuda.synchronize()
        for event in profiler.key_averages():
            if event.device_time_total > 0:
                name = event.key.replace("(anonymous namespace)::", "").partition("(")[0]
                print(f"  {tokens} {group} {queries} {event.device_time_total:>8.1f} us  {name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    print(f"kernels: {', '.join(ops.available_kernels())}; {ops.backend(device)}")

    print(f"\n{'relative error against float64':<40} {'ours':>10} {'sdpa':>10}")
    checked = []
    for one in check(device):
        checked.append(one)
        print(one.line(), flush=True)
    timed: list[Timed] = []
    if device.type == "cuda":
        print("\n tokens group queries    ours us    GB/s   flash us    GB/s   ratio   host us")
        for row in times(device, options.tokens):
            timed.append(row)
            print(row.line(), flush=True)
        print("\ndevice time of each kernel: tokens, group, queries")
        profile(device, options.tokens[0])
    if options.json:
        figures = {"checked": [asdict(c) for c in checked], "timed": [asdict(t) for t in timed]}
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)
    return 0 if all(one.is_right for one in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
