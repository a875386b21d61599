"""How a table's blocks come to attention: where they lie, through staging, or beside it.

Resident blocks are attended where they lie. Cold ones are staged in the ring, whose loads run
ahead along the order of a forward. Of those in host memory a part, as large as `InPlaceShare` says,
is attended in place: by the kernels themselves where the device is the CPU, else beside the device
(`devices.in_place`).

The lock is held while the books are looked at or changed; kernels run and disks are waited for
without it. What is attended meanwhile is pinned (`pins`).
"""

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Protocol

import torch

from hf_tiered_cache.blocks.block_manager import (
    DEVICE,
    BlockTable,
    KVBlock,
    KVBlockManager,
    Placement,
)
from hf_tiered_cache.blocks.pins import Pin, Pins
from hf_tiered_cache.blocks.reading_plan import InPlace, ReadingPlan, Staging, reading_plan
from hf_tiered_cache.blocks.selection import ALL, Columns, SelectionPolicy
from hf_tiered_cache.blocks.staging import StagingRing
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.devices.share import InPlaceShare
from hf_tiered_cache.errors import BlockStateError, TierIOError
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.view import BlockDecoder
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.observe.metrics import Counters, span
from hf_tiered_cache.observe.tracing import LOAD_WAIT
from hf_tiered_cache.tiers.base import Tier
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.transfers import Transfer

# Layers and tokens between two corrections of the lanes' shares: some tokens, so that waits add up
# to more than noise.
READINGS_PER_CORRECTION = 256


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive columns of a table, ready for the kernels: all slots are of one tier."""

    first: int  # column of slots[:, 0]
    slots: torch.Tensor  # int32 [batch, columns]
    rung: int = DEVICE
    codec: BlockDecoder | None = None  # of complemented slots (`BlockView`)


class BlockReader:
    """Reads tables of one layout and device, each by a `Reading`.

    `tiers`: from the device down. `split`: how much of those blocks below it that have addresses is
    attended where it lies: by `in_place`, or without one in line with all others, as where the
    device is the CPU. `group_columns`: chunks that the device attends begin and end at multiples of
    so many columns, or with the table. `lock`: for the books. `check_held` raises ClosedCacheError
    where a table cannot be read any more, and mends the books where need be.
    """

    def __init__(
        self,
        blocks: KVBlockManager,
        layout: BlockLayout,
        tiers: Sequence[Tier],
        stream: StagingRing,
        counters: Counters,
        split: InPlaceShare,
        in_place: InPlaceAttention | None,
        group_columns: int,
        *,
        lock: "threading.RLock",
        check_held: Callable[[BlockTable], None],
    ) -> None:
        device = tiers[DEVICE]
        assert isinstance(device, DeviceTier)
        self.split = split
        self.group_columns = group_columns
        self.pins = Pins(lock)
        self.layout = layout
        self._lock = lock
        self._check_held = check_held
        self._blocks = blocks
        self._tiers = tiers
        self._lower_rungs = tuple(
            rung for rung, tier in enumerate(tiers) if rung > DEVICE and tier.has_addresses
        )
        self._device = device
        self._stream = stream
        self._counters = counters
        self._in_place = in_place
        self.codec = stream.codec
        self._num_readings = 0
        # Of the copy lane and of in-place attention, at the last correction.
        self._lane_waits = [0.0, 0.0]

    def select(self, selection: SelectionPolicy, table: BlockTable, num_blocks: int) -> Columns:
        """What is to be read of the first columns of a table."""
        return selection.select(self._blocks.placement(table), num_blocks)

    def plan(
        self, table: BlockTable, selected: Columns, has_gaps: bool, beside: bool
    ) -> ReadingPlan:
        """How the selected columns of a table come to attention."""
        is_shared = self._in_place is None or beside
        return reading_plan(
            table,
            self._blocks.placement(table),
            selected,
            has_gaps,
            self._stream.chunk_blocks,
            self.group_columns,
            self._lower_rungs if is_shared else (),
            self.split.cpu_share,
            beside,
        )

    def resident_view(self, table: BlockTable, num_blocks: int) -> ops.BlockView | None:
        """The blocks of a table that is wholly resident; None where there are cold blocks."""
        placement = self._blocks.placement(table)
        runs = placement.runs
        if len(runs) != 1 or runs[0].rung != DEVICE or num_blocks == 0:
            return None
        self._counters.resident_reads += num_blocks * len(table.rows)
        view = self.last_view(placement)
        if num_blocks == runs[0].last:
            return view
        return self.view(Chunk(0, view.table[:, :num_blocks]))

    def view(self, chunk: Chunk) -> ops.BlockView:
        """A chunk of a reading as the kernels take it."""
        first_token = chunk.first * self.layout.block_tokens
        slab = self._tiers[chunk.rung].slab
        return ops.BlockView(slab, chunk.slots, self.layout, first_token, chunk.codec)

    def last_view(self, placement: Placement) -> ops.BlockView:
        """The last run of a table, which is resident wherever something is appended."""
        if placement.view is None:
            run = placement.runs[-1]
            assert run.is_resident
            placement.view = self.view(Chunk(run.first, run.slots))
        return placement.view

    def begin_beside(
        self, parts: Sequence[InPlace], query: torch.Tensor, call: ops.AttentionCall
    ) -> None:
        """Let the CPU attend parts in host memory where they lie."""
        assert self._in_place is not None
        views = [part.view or self._show(part) for part in parts]
        with self._blocks.changing:
            attended = self._in_place.begin(query, views, call)
            for part in parts:
                self._counters.in_place_reads += part.slots.numel()
                self._tiers[part.rung].hold_slots(part.slot_list, attended)

    def can_attend_beside(self, query: torch.Tensor, call: ops.AttentionCall) -> bool:
        """Whether a part of the host's blocks is for the CPU to attend. Now and then the
        lanes' parts are set anew, as the device had to wait for them."""
        lane = self._in_place
        if lane is None or (self.split.is_fixed and self.split.cpu_share == 0):
            return False
        if not lane.can_attend(query, self.layout.kv_heads, call):
            return False
        self._num_readings += 1
        if self._num_readings % READINGS_PER_CORRECTION == 0:
            self._correct_split()
        return self.split.cpu_share > 0

    def join_in_place(self, state: ops.RunningState) -> None:
        """Fold what the CPU attended into the state of the rest."""
        assert self._in_place is not None
        self._in_place.join(state)

    def _correct_split(self) -> None:
        copy_lane = self._device.lane
        assert self._in_place is not None and copy_lane is not None
        lanes = (copy_lane, self._in_place)
        before, self._lane_waits = self._lane_waits, [lane.measure().wait_seconds for lane in lanes]
        copy_wait, cpu_wait = (b - a for a, b in zip(before, self._lane_waits, strict=True))
        self.split.correct(copy_wait, cpu_wait, perf_counter())
        # What is staged stays, but for blocks that are the CPU's now: by the new share, or because
        # more blocks came to the host. Nobody else would give their slots back.
        with self._blocks.changing:
            for table in self._blocks.tables:
                everything = self.select(ALL, table, table.num_blocks)
                for part in self.plan(table, everything, has_gaps=False, beside=True).below:
                    for block in table.blocks(part.first, part.last):
                        self._stream.discard(block)

    def count(self, part: InPlace) -> None:
        """Note that a part is read where it lies."""
        with self._lock:
            if part.run.is_resident:
                self._counters.resident_reads += part.slots.numel()
            else:
                self._counters.in_place_reads += part.slots.numel()

    def _show(self, part: InPlace) -> ops.BlockView:
        """A part in host memory as the CPU takes it, made once."""
        part.view = self.view(Chunk(part.first, part.slots, part.rung))
        return part.view

    def stage(self, pin: Pin, table: BlockTable, part: Staging) -> torch.Tensor:
        """Bring columns into staging, where `pin` keeps them; slots, int32 `[batch, columns]`.

        Raises TierIOError when a cold block cannot be loaded or is not what was stored.
        """
        cold = part.cold
        has_prefetched, slots, transfers = self._begin(pin, table, cold)
        try:
            self._wait(pin, cold, transfers)
        except TierIOError:
            if not has_prefetched:
                raise
            # What failed while it was loaded ahead is tried again.
            _, slots, transfers = self._begin(pin, table, cold)
            self._wait(pin, cold, transfers)
        if table.batch > 1 or part.resident:
            places = {**part.resident, **dict(zip(cold, slots, strict=True))}
            slots = [places[block] for row in part.rows for block in row]
        # An array first: torch takes a list apart three times as slowly.
        return torch.frombuffer(array("i", slots), dtype=torch.int32).view(table.batch, -1)

    def unstage(
        self,
        pin: Pin,
        table: BlockTable,
        part: Staging,
        plan: ReadingPlan,
        scan: Sequence[BlockTable],
        selection: SelectionPolicy,
        beside: bool,
    ) -> None:
        """The columns were attended: their slots are for what comes next."""
        with self._lock:
            pin.staged = ()
            self.pins.wake()
            if self._blocks.changing.was_interrupted:  # by another thread: all that is staged goes
                return
            others = self.pins.staged() if len(self.pins) > 1 else ()
            with self._blocks.changing:
                self._stream.release(
                    [block for block in part.cold if block not in others] if others else part.cold
                )
                upcoming = self._upcoming(table, plan.cold, part.num_done, scan, selection, beside)
                self._stream.prefetch(chain.from_iterable(upcoming))

    def _begin(
        self, pin: Pin, table: BlockTable, cold: Sequence[KVBlock]
    ) -> tuple[bool, list[int], list[Transfer]]:
        """Start the loads of what is not staged yet: whether any was, all slots, all loads."""
        with self._lock:
            self._check_held(table)
            kept = self.pins.staged() if len(self.pins) > 1 else set()
            while kept and not self._stream.has_room(cold, kept):
                if not self.pins.wait(lambda other: other.staged):
                    raise BlockStateError(
                        f"a reading of layer {table.layer} inside another one finds no staging slot"
                    )
                self._check_held(table)
                kept = self.pins.staged()
            with self._blocks.changing:
                has_prefetched = self._stream.begin(cold, kept)
            pin.staged = cold
            self._counters.cold_reads += len(cold)
            return has_prefetched, self._stream.places(cold), self._stream.transfers(cold)

    def _wait(self, pin: Pin, cold: Sequence[KVBlock], transfers: Sequence[Transfer]) -> None:
        """Wait, or let the device wait, for the loads; when one fails none of them stays staged."""
        try:
            pending = [transfer for transfer in transfers if not transfer.is_ready()]
            if pending:
                self._wait_for(pending)
            for transfer in transfers:
                if transfer.has_failed:
                    transfer.wait()  # raises
        except TierIOError:
            with self._lock:
                pin.staged = ()
                self.pins.wake()
                kept = self.pins.staged()
                self._counters.cold_reads -= len(cold)
                if not self._blocks.changing.was_interrupted:
                    with self._blocks.changing:
                        for block in cold:
                            if block not in kept:
                                self._stream.discard(block)
            raise

    def _wait_for(self, transfers: Sequence[Transfer]) -> None:
        began = perf_counter()
        try:
            with span(LOAD_WAIT):
                for transfer in transfers:
                    transfer.hold_device()
        finally:
            with self._lock:
                self._counters.load_wait_seconds += perf_counter() - began

    def _upcoming(
        self,
        table: BlockTable,
        cold: list[KVBlock],
        num_done: int,
        scan: Sequence[BlockTable],
        selection: SelectionPolicy,
        beside: bool,
    ) -> Iterator[Sequence[KVBlock]]:
        """Blocks to be staged in the order the next reads will want them: the rest of this table,
        the following layers, and round again (the next token) to where we are."""
        yield cold[num_done:]
        here = next((i for i, other in enumerate(scan) if other is table), len(scan))
        for other in chain(scan[here + 1 :], scan[:here]):
            selected = self.select(selection, other, other.num_blocks)
            yield self.plan(other, selected, has_gaps(selected, other.num_blocks), beside).cold
        yield cold[:num_done]


def has_gaps(selected: Columns, num_blocks: int) -> bool:
    """Whether some of the first columns are not among the selected ones."""
    return sum(map(len, selected)) < num_blocks


class Readable(Protocol):
    """The first `num_tokens` tokens of a table. `scan`: the tables of the same cache in the order a
    forward reads them; loads run ahead along it."""

    @property
    def table(self) -> BlockTable: ...
    @property
    def scan(self) -> Sequence[BlockTable]: ...
    @property
    def num_tokens(self) -> int: ...


class Reading:
    """One reading of a table: a context, in which what is attended stays where it is.

    A table that is wholly resident, and read as a whole, is `resident`; any other comes chunk by
    chunk, each with its own first position. Where a device works behind the host, whoever reads
    holds the manager's lock (`OffloadManager.read_lock`).
    """

    __slots__ = (
        *("_pin", "_reader", "_selected", "_selection", "_shown", "_table"),
        *("beside", "has_gaps", "resident"),
    )

    def __init__(self, reader: BlockReader, shown: Readable, selection: SelectionPolicy) -> None:
        self._reader = reader
        self._shown = shown
        self._selection = selection
        self._table = shown.table
        self._selected: Columns = ()
        self._pin: Pin | None = None
        self.beside = False
        """Whether a part is attended by the CPU beside the device."""
        self.has_gaps = False
        """Whether columns are left out: who attends is to be told (`AttentionCall.has_gaps`)."""
        self.resident: ops.BlockView | None = None
        """All blocks, where all are on the device, in place of one chunk."""

    def __enter__(self) -> "Reading":
        reader = self._reader
        with reader._lock:
            reader.pins.wait_for_turn()
            reader._check_held(self._shown.table)
            # It may be another one by now: who changes a table gives its readers a fork of it.
            self._table = table = self._shown.table
            self._pin = reader.pins.add(table)
            try:
                asked = reader.layout.num_blocks(self._shown.num_tokens)
                num_blocks = min(len(table.rows[0]), asked)
                self._selected = reader.select(self._selection, table, num_blocks)
                self.has_gaps = has_gaps(self._selected, num_blocks)
                if not self.has_gaps:
                    self.resident = reader.resident_view(table, num_blocks)
            except BaseException:
                reader.pins.remove(self._pin)
                raise
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        reader, pin = self._reader, self._pin
        with reader._lock:
            try:
                if error is None:
                    reader._check_held(self._table)  # else what was read may have been zeros
            finally:
                if pin is not None:
                    reader.pins.remove(pin)
                    self._pin = None
                # Frames that a failure keeps may outlive the reading, and with them this object.
                del self._shown

    def attend_in_place(self, query: torch.Tensor, call: ops.AttentionCall) -> None:
        """Let the CPU attend its part of the host's blocks where they lie, if there is any:
        `beside` then. `chunks` are the rest, and `join_in_place` folds both."""
        reader = self._reader
        if reader.can_attend_beside(query, call):
            parts = reader.plan(self._table, self._selected, self.has_gaps, beside=True).below
            if parts:
                reader.begin_beside(parts, query, call)
                self.beside = True

    def join_in_place(self, state: ops.RunningState) -> None:
        """Fold what the CPU attended into the state of the rest."""
        self._reader.join_in_place(state)

    def chunks(self) -> Iterator[Chunk]:
        """The selected columns in block order, chunk by chunk, each where attention can read it
        until the next is asked for: resident runs where they lie, cold ones through staging, or
        where they lie where the device is the CPU. Without those that are attended beside.

        Raises TierIOError when a cold block cannot be loaded or is not what was stored.
        """
        reader, table, pin = self._reader, self._table, self._pin
        assert pin is not None, "a reading is entered first"
        if self.resident is not None:
            yield Chunk(0, self.resident.table)
            return
        with reader._lock:
            plan = reader.plan(table, self._selected, self.has_gaps, self.beside)
        for part in plan.parts:
            if isinstance(part, Staging):
                slots = reader.stage(pin, table, part)
                yield Chunk(part.first, slots, codec=reader.codec)
                scan = self._shown.scan
                reader.unstage(pin, table, part, plan, scan, self._selection, self.beside)
            elif part.run.is_resident or not self.beside:
                reader.count(part)
                yield Chunk(part.first, part.slots, part.rung)

    def view(self, chunk: Chunk) -> ops.BlockView:
        """A chunk as the kernels take it."""
        return self._reader.view(chunk)
