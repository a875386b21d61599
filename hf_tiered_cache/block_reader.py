"""How a table's blocks come to attention: where they lie, through staging, or beside it.

Resident blocks are attended where they lie. Cold ones are staged in the ring, whose loads run
ahead along the order of a forward. Of those in host memory a part, as large as `LaneSplit` says, is
attended in place: by the kernels themselves where the device is the CPU, else by the CPU lane.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch

from hf_tiered_cache.block_manager import (
    DEVICE,
    HOST,
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
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.tiers.lane_tier import HostLaneTier
from hf_tiered_cache.tiers.memory import MemoryTier

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

    `memory`: the tiers whose blocks have addresses, from the device down. `split`: how much of the
    host's blocks is attended where it lies: by `cpu_lane`, or without one in line with all others,
    as where the device is the CPU. `group_columns`: chunks that the device attends begin and end at
    multiples of so many columns, or with the table.
    """

    def __init__(
        self,
        blocks: KVBlockManager,
        layout: BlockLayout,
        memory: Sequence[MemoryTier | HostLaneTier],
        stream: BlockStream,
        counters: Counters,
        split: LaneSplit,
        cpu_lane: CpuLane | None,
        group_columns: int,
    ) -> None:
        device = memory[DEVICE]
        assert isinstance(device, DeviceTier)
        self.split = split
        self.group_columns = group_columns
        self._blocks = blocks
        self._layout = layout
        self._memory = memory
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
        for part in self._parts(table, num_blocks, beside):
            num_reads = (part.last - part.first) * table.batch
            if part.run is None:
                yield from self._stream_cold(table, part, scan, beside)
            elif part.run.is_resident:
                self._counters.resident_reads += num_reads
                yield Chunk(part.first, part.slots)
            elif not beside:
                self._counters.in_place_reads += num_reads
                yield Chunk(part.first, part.slots, HOST)

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
        if lane is None or not lane.can_attend(query, self._layout.kv_heads, call):
            return False
        num_blocks = min(table.num_blocks, self._layout.num_blocks(call.kv_tokens))
        parts = [
            part
            for part in self._parts(table, num_blocks, beside=True)
            if part.run is not None and not part.run.is_resident
        ]
        if not parts:
            return False
        views = [self.view(Chunk(part.first, part.slots, HOST)) for part in parts]
        host = self._memory[HOST]
        assert isinstance(host, HostLaneTier)
        with self._blocks.changing:
            attended = lane.begin(query, views, call)
            for part in parts:
                self._counters.in_place_reads += part.slots.numel()
                host.keep(part.slots.flatten().tolist(), attended)
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
        self.split.correct(copy_wait, cpu_wait, perf_counter())
        # What is staged stays, but for blocks that are the CPU's now: by the new share, or because
        # more blocks came to the host. Nobody else would give their slots back.
        with self._blocks.changing:
            for table in self._blocks.tables:
                for part in self._parts(table, table.num_blocks, beside=True):
                    if part.run is not None and not part.run.is_resident:
                        for block in table.blocks(part.first, part.last):
                            self._stream.discard(block)

    def _parts(self, table: BlockTable, num_blocks: int, beside: bool) -> Iterator["_Part"]:
        """The first columns of a table, by how they come to attention: what is resident where it
        lies, and so the oldest part of each run in host memory, as large as `split` says."""
        placement = self._blocks.placement(table)
        if self.group_columns > 1 and not beside:
            yield from self._grouped_parts(placement, num_blocks)
            return
        shares_host = self._cpu_lane is None or beside
        for run in placement.runs:
            last = min(run.last, num_blocks)
            if last <= run.first:
                return
            cut = run.first
            if run.is_resident:
                cut = last
            elif run.rung == HOST < len(self._memory) and shares_host:
                cut = min(last, run.first + round(self.split.cpu_share * (run.last - run.first)))
            if cut > run.first:
                yield _Part(run.first, cut, run)
            if cut < last:
                yield _Part(cut, last, None)

    def _grouped_parts(self, placement: Placement, num_blocks: int) -> Iterator["_Part"]:
        """The same with borders between groups of columns only: a group that is partly cold goes
        through staging, and its resident blocks are attended where they lie all the same."""
        group, done = self.group_columns, 0
        for run in [run for run in placement.runs if run.is_resident]:
            first = -(-run.first // group) * group
            last = num_blocks if run.last >= num_blocks else run.last // group * group
            if first < last:
                if done < first:
                    yield _Part(done, first, None)
                yield _Part(first, last, run)
                done = last
        if done < num_blocks:
            yield _Part(done, num_blocks, None)

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
        return self._memory[chunk.rung].slab

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

    def _stream_cold(
        self, table: BlockTable, part: "_Part", scan: Sequence[BlockTable], beside: bool
    ) -> Iterator[Chunk]:
        group = self.group_columns
        columns = max(group, self._stream.chunk_blocks // table.batch // group * group)
        for begin in range(part.first, part.last, columns):
            end = min(begin + columns, part.last)
            cold = [block for block in table.blocks(begin, end) if not block.is_resident]
            with self._blocks.changing:
                staged = dict(zip(cold, self._stream.load(cold), strict=True))
            slots = [
                [staged[b] if (slot := b.slots[DEVICE]) is None else slot for b in row[begin:end]]
                for row in table.rows
            ]
            self._counters.cold_reads += len(cold)
            yield Chunk(begin, torch.tensor(slots, dtype=torch.int32))
            with self._blocks.changing:
                self._stream.release(cold)
                self._stream.prefetch(self._upcoming(table, end, scan, beside))

    def _upcoming(
        self, table: BlockTable, column: int, scan: Sequence[BlockTable], beside: bool
    ) -> Iterator[KVBlock]:
        """Blocks to be staged in the order the next reads will want them: the rest of this table,
        the following layers, and round again (the next token) to where we are."""
        yield from self._to_stage(table, column, table.num_blocks, beside)
        here = next((i for i, other in enumerate(scan) if other is table), len(scan))
        for other in [*scan[here + 1 :], *scan[:here]]:
            yield from self._to_stage(other, 0, other.num_blocks, beside)
        yield from self._to_stage(table, 0, column, beside)

    def _to_stage(
        self, table: BlockTable, first: int, last: int, beside: bool
    ) -> Iterator[KVBlock]:
        for part in self._parts(table, last, beside):
            if part.run is None and part.last > first:
                for block in table.blocks(max(first, part.first), part.last):
                    if not block.is_resident:
                        yield block


class _Reading:
    """Lives in the frame of a `stream`, and so exactly as long."""

    __slots__ = ("__weakref__",)


class _Part(NamedTuple):
    """Columns [first, last) of a table: of a run that is attended where it lies, or (None) what
    goes through staging."""

    first: int
    last: int
    run: Run | None

    @property
    def slots(self) -> torch.Tensor:
        """int32 [batch, last - first], on the run's rung."""
        assert self.run is not None
        return self.run.slots[:, self.first - self.run.first : self.last - self.run.first]
