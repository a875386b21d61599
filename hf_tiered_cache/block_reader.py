"""How a table's blocks come to attention: where they lie, through staging, or beside it.

Resident blocks are attended where they lie. Cold ones are staged in the ring, whose loads run
ahead along the order of a forward. Of those in host memory a part, as large as `LaneSplit` says, is
attended in place: by the kernels themselves where the device is the CPU, else by the CPU lane.
"""

import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch

from hf_tiered_cache.block_manager import (
    DEVICE,
    BlockTable,
    KVBlock,
    KVBlockManager,
    Placement,
    Run,
)
from hf_tiered_cache.cpu_lane import CpuLane
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.lane_split import LaneSplit
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.metrics import Counters
from hf_tiered_cache.stream import BlockStream
from hf_tiered_cache.tiers.base import Tier
from hf_tiered_cache.tiers.device import DeviceTier

# Layers and tokens between two corrections of the lanes' shares: some tokens, so that waits add up
# to more than noise.
JOINS_PER_CORRECTION = 256


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive columns of a table, ready for the kernels: all slots are of one tier."""

    first: int  # column of slots[:, 0]
    slots: torch.Tensor  # int32 [batch, columns]
    rung: int = DEVICE


class BlockReader:
    """Reads tables of one layout and device, chunk by chunk. Nothing is checked for being open, and
    the caller holds the manager's lock.

    `tiers`: from the device down. `split`: how much of those blocks below it that have addresses is
    attended where it lies: by `cpu_lane`, or without one in line with all others, as where the
    device is the CPU. `group_columns`: chunks that the device attends begin and end at multiples of
    so many columns, or with the table.
    """

    def __init__(
        self,
        blocks: KVBlockManager,
        layout: BlockLayout,
        tiers: Sequence[Tier],
        stream: BlockStream,
        counters: Counters,
        split: LaneSplit,
        cpu_lane: CpuLane | None,
        group_columns: int,
    ) -> None:
        device = tiers[DEVICE]
        assert isinstance(device, DeviceTier)
        self.split = split
        self.group_columns = group_columns
        self._blocks = blocks
        self._layout = layout
        self._tiers = tiers
        self._device = device
        self._stream = stream
        self._counters = counters
        self._cpu_lane = cpu_lane
        self._num_joined = 0
        self._find_reading: Callable[[], _Reading | None] = lambda: None
        self._lane_waits = [0.0, 0.0]  # of the copy lane and the CPU lane, at the last correction

    def stream(
        self,
        table: BlockTable,
        scan: Sequence[BlockTable],
        num_tokens: int | None = None,
        beside: bool = False,
    ) -> Iterator[Chunk]:
        """The columns of a table (those of its first `num_tokens` tokens), in block order, chunk by
        chunk, each where attention can read it while it is consumed: resident runs where they lie,
        cold ones through staging, or in host memory where the device is the CPU.

        `scan`: the tables of the same cache in the order a forward reads them; loads run ahead
        along it. `beside`: what `attend_beside` gave to the CPU lane is left out. Nothing may
        move until the next chunk is asked for. Raises TierIOError when a
        cold block cannot be loaded or is not what was stored.
        """
        reading = _Reading()
        self._find_reading = weakref.ref(reading)
        num_blocks = table.num_blocks
        if num_tokens is not None:
            num_blocks = min(num_blocks, self._layout.num_blocks(num_tokens))
        plan = self._plan(table, num_blocks, beside)
        for part in plan.parts:
            if isinstance(part, _Staging):
                yield from self._stage(table, part, plan, scan, beside)
                continue
            num_reads = part.slots.numel()
            if part.run.is_resident:
                self._counters.resident_reads += num_reads
                yield Chunk(part.first, part.slots)
            elif not beside:
                self._counters.in_place_reads += num_reads
                yield part.chunk

    @property
    def is_reading(self) -> bool:
        """Whether a `stream` is between two chunks, so that nothing may move."""
        return self._find_reading() is not None

    def attend_beside(
        self, table: BlockTable, query: torch.Tensor, call: ops.AttentionCall
    ) -> bool:
        """Let the CPU lane attend its part of the table's host blocks where they lie; whether there
        is any. If so, `stream` the rest with `beside`, then `join_beside` the states."""
        lane = self._cpu_lane
        if lane is None or self.split.cpu_share == 0:
            return False
        if not lane.can_attend(query, self._layout.kv_heads, call):
            return False
        num_blocks = min(table.num_blocks, self._layout.num_blocks(call.kv_tokens))
        parts = self._plan(table, num_blocks, beside=True).beside
        if not parts:
            return False
        views = [part.view or self._show(part) for part in parts]
        with self._blocks.changing:
            attended = lane.begin(query, views, call)
            for part in parts:
                self._counters.in_place_reads += part.slots.numel()
                self._tiers[part.chunk.rung].keep(part.slot_list, attended)
        return True

    def join_beside(self, state: ops.RunningState) -> None:
        """Fold what the CPU lane attended into the state of the rest. Now and then the lanes' parts
        are set anew, as the device had to wait for them."""
        assert self._cpu_lane is not None
        self._cpu_lane.join(state)
        self._num_joined += 1
        if self._num_joined % JOINS_PER_CORRECTION == 0 and not self.split.is_fixed:
            self._correct_split()

    def _correct_split(self) -> None:
        copy_lane = self._device.lane
        assert self._cpu_lane is not None and copy_lane is not None
        lanes = (copy_lane, self._cpu_lane)
        before, self._lane_waits = self._lane_waits, [lane.measure().wait_seconds for lane in lanes]
        copy_wait, cpu_wait = (b - a for a, b in zip(before, self._lane_waits, strict=True))
        if self.split.correct(copy_wait, cpu_wait):
            with self._blocks.changing:
                self._stream.clear()  # some of what is staged may not be wanted any more

    def _plan(self, table: BlockTable, num_blocks: int, beside: bool) -> "_Plan":
        """How the first columns of a table come to attention; made anew only after something of
        its layer moved, or the shares of the lanes did."""
        placement = self._blocks.placement(table)
        key = (num_blocks, self.split.cpu_share, self._stream.chunk_blocks)
        plan: _Plan | None = placement.plans.get(beside)
        if plan is None or plan.key != key:
            is_grouped = self.group_columns > 1 and not beside
            parts = self._grouped_parts if is_grouped else self._parts
            plan = self._plan_of(table, parts(placement, num_blocks, beside), key)
            placement.plans[beside] = plan
        return plan

    def _plan_of(
        self, table: BlockTable, parts: "Iterable[_Part | tuple[int, int]]", key: tuple[object, ...]
    ) -> "_Plan":
        """The same with columns that go through staging cut into what is staged at once."""
        group = self.group_columns
        columns = max(group, self._stream.chunk_blocks // max(1, table.batch) // group * group)
        ready: list[_Part | _Staging] = []
        cold: list[KVBlock] = []
        for part in parts:
            if isinstance(part, _Part):
                ready.append(part)
                continue
            first, last = part
            for begin in range(first, last, columns):
                end = min(begin + columns, last)
                blocks = [block for block in table.blocks(begin, end) if not block.is_resident]
                cold += blocks
                ready.append(_Staging(begin, end, blocks, len(cold)))
        return _Plan(key, ready, cold)

    def _parts(
        self, placement: Placement, num_blocks: int, beside: bool
    ) -> "Iterator[_Part | tuple[int, int]]":
        """The first columns of a table, by how they come to attention: what is resident where it
        lies, and so the oldest part of each run in host memory, as large as `split` says. The
        others, [first, last), go through staging."""
        shares_host = self._cpu_lane is None or beside
        for run in placement.runs:
            last = min(run.last, num_blocks)
            if last <= run.first:
                return
            cut = run.first
            if run.is_resident:
                cut = last
            elif shares_host and run.rung is not None and self._tiers[run.rung].has_addresses:
                cut = min(last, run.first + round(self.split.cpu_share * (run.last - run.first)))
            if cut > run.first:
                yield _Part(run.first, cut, run)
            if cut < last:
                yield cut, last

    def _grouped_parts(
        self, placement: Placement, num_blocks: int, beside: bool
    ) -> "Iterator[_Part | tuple[int, int]]":
        """The same with borders between groups of columns only: a group that is partly cold goes
        through staging, and its resident blocks are attended where they lie all the same."""
        group, done = self.group_columns, 0
        for run in [run for run in placement.runs if run.is_resident]:
            first = -(-run.first // group) * group
            last = num_blocks if run.last >= num_blocks else run.last // group * group
            if first < last:
                if done < first:
                    yield done, first
                yield _Part(first, last, run)
                done = last
        if done < num_blocks:
            yield done, num_blocks

    def resident_view(self, table: BlockTable, num_tokens: int) -> ops.BlockView | None:
        """The blocks of a table that is wholly resident, in place of a `stream` of one chunk; None
        where there are cold blocks."""
        runs = self._blocks.placement(table).runs
        if len(runs) != 1 or not runs[0].is_resident:
            return None
        columns = self._layout.num_blocks(num_tokens)
        self._counters.resident_reads += columns * table.batch
        view = self.last_view(table)
        return view if columns == table.num_blocks else self.view(Chunk(0, view.table[:, :columns]))

    def slab(self, chunk: Chunk) -> torch.Tensor:
        """The memory that a chunk's slots are in, uint8 `[slots, block_bytes]`."""
        return self._tiers[chunk.rung].slab

    def view(self, chunk: Chunk) -> ops.BlockView:
        """A chunk of `stream` as the kernels take it."""
        first_token = chunk.first * self._layout.block_tokens
        return ops.BlockView(self.slab(chunk), chunk.slots, self._layout, first_token)

    def last_view(self, table: BlockTable) -> ops.BlockView:
        """The last run of a table, which is resident wherever something is appended."""
        placement = self._blocks.placement(table)
        if placement.view is None:
            run = placement.runs[-1]
            assert run.is_resident
            placement.view = self.view(Chunk(run.first, run.slots))
        return placement.view

    def _show(self, part: "_Part") -> ops.BlockView:
        """A part in host memory as the CPU lane takes it, made once."""
        part.view = self.view(part.chunk)
        return part.view

    def _stage(
        self,
        table: BlockTable,
        part: "_Staging",
        plan: "_Plan",
        scan: Sequence[BlockTable],
        beside: bool,
    ) -> Iterator[Chunk]:
        """Bring columns through staging, and what comes next on its way."""
        cold = part.cold
        with self._blocks.changing:
            staged = self._stream.load(cold)
        slots = staged
        if table.batch > 1 or len(cold) < part.last - part.first:
            places = dict(zip(cold, staged, strict=True))
            rows = [row[part.first : part.last] for row in table.rows]
            slots = [b.device_slot if b.is_resident else places[b] for row in rows for b in row]
        self._counters.cold_reads += len(cold)
        # An array first: torch takes a list apart three times as slowly.
        flat = torch.frombuffer(array("i", slots), dtype=torch.int32)
        yield Chunk(part.first, flat.view(table.batch, -1))
        with self._blocks.changing:
            self._stream.release(cold)
            lists = self._upcoming(table, plan.cold, part.num_done, scan, beside)
            self._stream.prefetch(chain.from_iterable(lists))

    def _upcoming(
        self,
        table: BlockTable,
        cold: list[KVBlock],
        num_done: int,
        scan: Sequence[BlockTable],
        beside: bool,
    ) -> Iterator[Sequence[KVBlock]]:
        """Blocks to be staged in the order the next reads will want them: the rest of this table,
        the following layers, and round again (the next token) to where we are."""
        yield cold[num_done:]
        here = next((i for i, other in enumerate(scan) if other is table), len(scan))
        for other in chain(scan[here + 1 :], scan[:here]):
            yield self._plan(other, other.num_blocks, beside).cold
        yield cold[:num_done]


class _Reading:
    """Lives in the frame of a `stream`, and so exactly as long."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False)
class _Part:
    """Columns [first, last) of a run, attended where they lie."""

    first: int
    last: int
    run: Run
    view: ops.BlockView | None = None

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [batch, last - first], on the run's rung."""
        return self.run.slots[:, self.first - self.run.first : self.last - self.run.first]

    @property
    def chunk(self) -> Chunk:
        """All of it, where it lies."""
        assert self.run.rung is not None
        return Chunk(self.first, self.slots, self.run.rung)

    @cached_property
    def slot_list(self) -> list[int]:
        """The same, row by row."""
        return self.slots.flatten().tolist()


@dataclass(frozen=True, eq=False)
class _Staging:
    """Columns [first, last) that go through staging at once."""

    first: int
    last: int
    cold: list[KVBlock]  # those to be staged, each once
    num_done: int  # of the plan's cold blocks, with these


@dataclass(frozen=True, eq=False)
class _Plan:
    """How columns come to attention, in block order."""

    key: tuple[object, ...]  # what it follows from, besides the placement
    parts: list[_Part | _Staging]
    cold: list[KVBlock]  # all that is staged

    @cached_property
    def beside(self) -> list[_Part]:
        """The parts in host memory."""
        parts = [part for part in self.parts if isinstance(part, _Part)]
        return [part for part in parts if not part.run.is_resident]
