"""Time for a token behind a context, at several shares off the device, and what a token is made of.

Each side is one part of the section, timed in turn with `DynamicCache` and closed before the next,
so that one that fails costs only itself.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sections import Row, Skipped, at_least, attempted
from transformers import Cache, DynamicCache

from gpu_bench.workshop import Bench, TokenTime, judged_ratio, median, share_off, times_note
from hf_tiered_cache import TieredCache

SETTLE_TOKENS = 48  # in which the lanes' shares find their balance
PROFILED_TOKENS = 2
COPY_LANE = {"cpu_share": 0.0}
# Names in torch's profiler whose counts say whether the host is in the way.
COUNTED = (
    *("cudaMemcpyAsync", "cudaMemcpyBatchAsync", "cudaLaunchKernel", "cudaEventQuery"),
    *("cudaEventRecordWithFlags", "cudaStreamWaitEvent", "aten::select"),
)


@dataclass(frozen=True)
class Side:
    """A share of the blocks off the device, and its bar (ours over DynamicCache)."""

    share: float
    bar: float | None
    is_copy_lane: bool = False

    @property
    def knobs(self) -> dict[str, Any]:
        return COPY_LANE if self.is_copy_lane else {}

    @property
    def lanes(self) -> str:
        return "copy lane" if self.is_copy_lane else "both lanes"


SHORT = [
    Side(0.0, 1.05),
    Side(0.5, 1.7),
    Side(0.9, 3.0),
    Side(0.9, None, is_copy_lane=True),
]
LONG = [Side(0.5, 6.6), Side(0.5, None, is_copy_lane=True)]


def decode_short(bench: Bench) -> Iterator[Row]:
    """Time per token at the shorter context, also against transformers' offloading."""
    yield from decode(bench, bench.sizes.short, SHORT, with_offloading=True)


def decode_long(bench: Bench) -> Iterator[Row]:
    """Time per token at the longer context."""
    yield from decode(bench, bench.sizes.long, LONG, with_offloading=False)


def decode(bench: Bench, asked: int, sides: list[Side], with_offloading: bool) -> Iterator[Row]:
    """`DynamicCache` with both of torch's ways, then each side beside the faster of them."""
    bench.model  # noqa: B018 - its memory counts
    context = bench.context_that_fits(asked, [0.0, 0.9])
    dynamic = bench.dynamic(context)
    base = yield from baselines(bench, dynamic, context)
    for side in sides:
        what = side_name(context, side)
        rows = beside(bench, base, dynamic, side, what, is_as_asked=context == asked)
        yield from attempted(bench, what, rows)
    if with_offloading:
        what = f"decode {context:,}: transformers' offloading"
        yield from attempted(bench, what, offloading(bench, dynamic, what))


def side_name(context: int, side: Side) -> str:
    where = f"{side.share:.0%} off, {side.lanes}" if side.share else "everything fits"
    return f"decode {context:,}: {where}"


@dataclass(frozen=True)
class Baseline:
    """How `DynamicCache` is timed: with torch's cuDNN attention or without."""

    with_cudnn: bool

    def time(self, bench: Bench, cache: Cache) -> TokenTime:
        with bench.machine.cudnn_attention(self.with_cudnn):
            return bench.token_time(cache, bench.sizes.new)


def baselines(bench: Bench, dynamic: Cache, context: int) -> Iterator[Row]:
    """A row for each; returns the faster. cuDNN, torch's choice on new GPUs, builds a plan for
    every new length, which costs the host more than the attention costs the device."""
    found: dict[Baseline, TokenTime] = {}
    for base in (Baseline(True), Baseline(False)):
        base.time(bench, dynamic)
        times = [base.time(bench, dynamic) for _ in range(bench.sizes.rounds)]
        found[base] = median(times)
        name = "sdpa as torch chooses" if base.with_cudnn else "without cuDNN attention"
        yield Row(
            f"decode {context:,}: DynamicCache, {name}",
            f"{found[base].device * 1e3:.1f} ms",
            note=times_note(found[base]),
            data={"times": [asdict(time) for time in times]},
        )
    return min(found, key=lambda base: found[base].device)


def beside(
    bench: Bench, base: Baseline, dynamic: DynamicCache, side: Side, what: str, is_as_asked: bool
) -> Iterator[Row]:
    """One side: its ratio, and for the copy lane alone its share of the link."""
    sizes = bench.sizes
    context = dynamic.get_seq_length()
    room = context + max(SETTLE_TOKENS, sizes.new) + 1
    with bench.tiered(room, side.share, **side.knobs) as cache:
        bench.fill_like(cache, dynamic)
        is_settled = side.is_copy_lane or not side.share
        bench.token_time(cache, sizes.new if is_settled else SETTLE_TOKENS)
        loaded = cache.stats().counters.loaded_bytes
        pairs = [
            (bench.token_time(cache, sizes.new), base.time(bench, dynamic))
            for _ in range(sizes.rounds)
        ]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        stats = cache.stats()
        shares = ", ".join(f"{lane.name} {lane.share:.0%}" for lane in stats.lanes)
        row = judged_ratio(
            what,
            ours,
            theirs,
            side.bar if is_as_asked else None,
            f"{bench.predicted_seconds(context, side.share) / median(theirs).device:.2f}",
            note=f"{share_off(cache):.0%} off" + (f"; {shares}" if shares and side.share else ""),
        )
        row.data |= {
            "lanes": [vars(lane) for lane in stats.lanes],
            "counters": vars(stats.counters),
        }
        yield row
        if side.is_copy_lane and "h2d" in bench.rates:
            per_token = (stats.counters.loaded_bytes - loaded) / (sizes.new * sizes.rounds)
            rate = per_token / median(ours).device
            yield at_least(
                f"{what}, of the copy rate",
                rate / bench.rates["h2d"],
                0.85 if is_as_asked else None,
                "1.0",
                note=f"{rate / 1e9:.1f} GB/s",
            )


def offloading(bench: Bench, dynamic: DynamicCache, what: str) -> Iterator[Row]:
    """transformers' own: everything off the device, a layer ahead."""
    if not bench.machine.is_cuda:
        raise Skipped("needs CUDA")
    offloaded = DynamicCache(config=bench.sizes.config, offloading=True)
    for index, layer in enumerate(dynamic.layers):
        offloaded.update(layer.keys, layer.values, index)
    bench.token_time(offloaded, bench.sizes.new)
    times = [bench.token_time(offloaded, bench.sizes.new) for _ in range(bench.sizes.rounds)]
    data = {"times": [asdict(time) for time in times]}
    shown = f"{median(times).device * 1e3:.1f} ms"
    yield Row(what, shown, predicted="1.5-3.9x ours", note=times_note(median(times)), data=data)


def profile(bench: Bench) -> Iterator[Row]:
    """Two tokens under the profiler, on the device and both ways off it; tables go to a file."""
    bench.model  # noqa: B018 - its memory counts
    context = bench.context_that_fits(bench.sizes.short, [0.0, 0.9])
    dynamic = bench.dynamic(context)
    bench.log("profile.txt").write_text("")
    for side in (SHORT[0], Side(0.9, None, is_copy_lane=True), Side(0.9, None)):
        what = f"profile of {PROFILED_TOKENS} tokens: {side_name(context, side)}"
        with bench.tiered(context + SETTLE_TOKENS + 1, side.share, **side.knobs) as cache:
            bench.fill_like(cache, dynamic)
            yield from attempted(bench, what, profiled(bench, cache, what))


def profiled(bench: Bench, cache: TieredCache, what: str) -> Iterator[Row]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.machine.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    bench.token_time(cache, bench.sizes.new)
    with torch.profiler.profile(activities=activities) as recorded:
        time = bench.token_time(cache, PROFILED_TOKENS)
    averages = recorded.key_averages()
    path = bench.log("profile.txt")
    with path.open("a") as file:
        file.write(f"{what}\n{averages.table(sort_by='self_cpu_time_total', row_limit=60)}\n")
    counts = {event.key: event.count for event in averages if event.key in COUNTED}
    shown = ", ".join(f"{counts[name]:,} {name}" for name in COUNTED if name in counts)
    yield Row(what, f"{time.host * 1e3:.0f} ms host", note=f"{shown}; {path}", data=counts)
