"""What the cache did: counters while it runs, a frozen snapshot for people, spans for profilers.

Counters are plain additions. A span costs nothing unless a torch profiler is recording.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from html import escape
from time import perf_counter
from typing import Any

import torch

from hf_tiered_cache.observe import tracing
from hf_tiered_cache.sizes import format_bytes


@dataclass
class Counters:
    """Running totals of one offload manager."""

    resident_reads: int = 0  # blocks attended where they lay
    in_place_reads: int = 0  # blocks attended in host memory
    cold_reads: int = 0  # blocks attended after a load into staging
    loads: int = 0  # blocks read from a lower tier, prefetched ones that were not used included
    stores: int = 0  # blocks written one tier down, once for each they go
    loaded_bytes: int = 0
    stored_bytes: int = 0
    load_wait_seconds: float = 0.0  # attention stood still for a load
    store_wait_seconds: float = 0.0  # an append stood still for a store

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the counter `name` (seconds)."""
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + perf_counter() - start)


@dataclass
class SpeculationCounters:
    """Running totals of what `speculate` did with a cache."""

    passes: int = 0  # that read the cold blocks, with or without guesses to check
    drafted: int = 0  # tokens guessed
    accepted: int = 0  # of these, as the model said itself
    tokens: int = 0  # that came of the passes
    draft_seconds: float = 0.0
    pass_seconds: float = 0.0
    saved_bytes: int = 0  # that as many passes as tokens would have loaded besides

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each time that the cold blocks were read; 1 without speculation."""
        return self.tokens / self.passes if self.passes else 1.0

    def __str__(self) -> str:
        return (
            f"speculation: {self.tokens_per_pass:.1f} tokens a pass ({self.tokens:,} in "
            f"{self.passes:,}), {self.accepted:,} of {self.drafted:,} drafted tokens accepted; "
            f"drafts {self.draft_seconds:.1f} s, passes {self.pass_seconds:.1f} s; about "
            f"{format_bytes(self.saved_bytes)} of loads saved"
        )


@dataclass
class LaneCounters:
    """Running totals of one lane: the way of blocks in host memory to attention."""

    moved_bytes: int = 0  # carried to the device, or attended by the CPU
    busy_seconds: float = 0.0  # the lane was at work
    wait_seconds: float = 0.0  # the device stood still for it
    probed_rate: float = 0.0  # bytes per second, from a short probe at the start

    def add_busy(self, seconds: float) -> None:
        """The lane was at work for so long."""
        self.busy_seconds += seconds


@dataclass(frozen=True)
class LaneStats:
    """One lane at one moment; `share` of the host's blocks are its own now."""

    name: str
    share: float
    moved_bytes: int
    busy_seconds: float
    wait_seconds: float
    probed_rate: float

    @property
    def rate(self) -> float:
        """Bytes per second while it was at work; 0 before."""
        return self.moved_bytes / self.busy_seconds if self.busy_seconds else 0.0

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.share:.0%} of the host's blocks, {format_bytes(self.moved_bytes)}"
            f" at {format_bytes(self.rate)}/s, the device waited {self.wait_seconds:.2f} s"
        )
        if self.probed_rate:
            text += (
                f" ({self.rate / self.probed_rate:.0%} of the {format_bytes(self.probed_rate)}/s"
                " measured)"
            )
        return text


@dataclass(frozen=True)
class TierStats:
    """One tier at one moment."""

    name: str
    blocks: int  # blocks whose bytes are here (a block may be in several tiers)
    raw_bytes: int  # what these take as they are ...
    packed_bytes: int  # ... and what they take here
    used_bytes: int  # taken out of the budget, staging included
    peak_bytes: int
    budget_bytes: int
    is_auto: bool  # the budget was chosen from what was free
    where: str  # device, kind of memory, or folder


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of `TieredCache.stats()`. Bytes, seconds, counts of blocks; ratios in [0, 1]."""

    num_tokens: int  # tokens of the longest layer
    batch: int
    num_layers: int  # layers kept in blocks
    block_tokens: int
    block_bytes: int
    cold_blocks: int  # blocks with no copy on the device
    kernel: str
    tiers: tuple[TierStats, ...] = ()
    lanes: tuple[LaneStats, ...] = ()  # of devices other than the CPU
    counters: Counters = field(default_factory=Counters)
    # Of transformers' own layers, which are in no budget: windows, linear states, indexers.
    untiered_layers: int = 0
    untiered_tokens: int = 0  # of the longest; of a window all that it has seen
    untiered_bytes: int = 0  # with the linear states of layers that have blocks
    attend: str = "all"  # the selection policy: what of the blocks attention reads
    is_exact: bool = True  # all of them, and so it was for every token held
    speculation: SpeculationCounters = field(default_factory=SpeculationCounters)

    @property
    def hit_share(self) -> float:
        """Share of the attended blocks that were resident; 1.0 before anything was attended."""
        count = self.counters
        reads = count.resident_reads + count.in_place_reads + count.cold_reads
        return count.resident_reads / reads if reads else 1.0

    def __str__(self) -> str:
        rows = [("tier", "where", "blocks", "used", "peak", "budget")]
        rows += [
            (
                tier.name,
                tier.where,
                f"{tier.blocks:,}",
                format_bytes(tier.used_bytes),
                format_bytes(tier.peak_bytes),
                format_bytes(tier.budget_bytes) + (" (auto)" if tier.is_auto else ""),
            )
            for tier in self.tiers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"{self.num_tokens:,} tokens x {self.batch} in {self.num_layers} layers, blocks of "
            f"{self.block_tokens} tokens ({format_bytes(self.block_bytes)}), kernel {self.kernel}"
        ]
        if not self.is_exact:
            which = "leaves" if self.attend != "all" else "left"
            lines.append(f"  approximate: attention {which} blocks out (attend={self.attend!r})")
        for row in rows:
            left = "  ".join(
                cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)
            )
            right = "  ".join(
                cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)
            )
            lines.append(f"  {left}  {right}")
        lines += [
            f"  {tier.name} packed: {format_bytes(tier.raw_bytes)} of blocks in "
            f"{format_bytes(tier.packed_bytes)} (x{tier.raw_bytes / tier.packed_bytes:.2f})"
            for tier in self.tiers
            if tier.packed_bytes < tier.raw_bytes
        ]
        if self.untiered_bytes:
            lines.append(
                f"  beside the blocks, in no budget: {format_bytes(self.untiered_bytes)} in "
                f"transformers' own layers ({self.untiered_layers}, of up to "
                f"{self.untiered_tokens:,} tokens)"
            )
        lines += [f"  {lane}" for lane in self.lanes]
        if self.speculation.passes:
            lines.append(f"  {self.speculation}")
        count = self.counters
        lines.append(
            f"  loads {count.loads:,} ({format_bytes(count.loaded_bytes)}), waited "
            f"{count.load_wait_seconds:.2f} s; stores {count.stores:,} "
            f"({format_bytes(count.stored_bytes)}), waited {count.store_wait_seconds:.2f} s; "
            f"hit share {self.hit_share:.1%}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings, lists and dicts, for JSON or a logger of runs."""
        return {**asdict(self), "hit_share": self.hit_share}

    def _repr_html_(self) -> str:
        """For notebooks: what is printed, with the tiers as bars of their budgets."""
        rows = [
            f"<td>{escape(tier.name)}</td>"
            f"<td><meter max={tier.budget_bytes} value={tier.used_bytes}></meter></td>"
            f"<td>{format_bytes(tier.used_bytes)} of {format_bytes(tier.budget_bytes)}</td>"
            f"<td>{escape(tier.where)}</td>"
            for tier in self.tiers
        ]
        bars = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table>{bars}</table><pre>{escape(str(self))}</pre>"


class _NoSpan:
    """A shared context manager that does nothing."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


_NO_SPAN = _NoSpan()


def span(
    name: str, layer: int | None = None, blocks: range | None = None
) -> AbstractContextManager[None]:
    """A named range in torch's profiler (`tiered_cache.<name>`) and in a `trace`; free while
    neither records. blocks: columns of the layer's table."""
    inner: AbstractContextManager[None] = _NO_SPAN
    if torch.autograd._profiler_enabled():
        inner = torch.profiler.record_function(f"tiered_cache.{name}")
    if tracing.recorder is not None:
        return tracing.recorder.span(name, layer, blocks, inner)
    return inner
