"""Tokens come in, blocks go down: `OffloadManager`.

A full block is immutable. Which ones leave a rung says a policy (`demotion`), `stores` takes them
down, `capacity` says what fits. Blocks never go up but through staging (`block_reader`).

One manager serves all layers whose blocks have the same layout and device. Forks of a cache share
it; `lock` is held by whoever changes the books, or looks at them, and by no reader while attention
runs and its loads are waited for: what is read then is pinned.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from hf_tiered_cache.blocks.block_manager import (
    DEVICE,
    BlockTable,
    KVBlock,
    KVBlockManager,
    Placement,
)
from hf_tiered_cache.blocks.block_reader import BlockReader, Readable, Reading
from hf_tiered_cache.blocks.capacity import Capacity
from hf_tiered_cache.blocks.demotion import ByAge, DemotionPolicy
from hf_tiered_cache.blocks.selection import ALL, SelectionPolicy
from hf_tiered_cache.blocks.staging import StagingRing
from hf_tiered_cache.blocks.stores import Stores
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.devices.share import STAGE_ALL, InPlaceShare
from hf_tiered_cache.errors import ClosedCacheError, OutOfBlocksError, TierIOError
from hf_tiered_cache.kernels import checks, ops
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.observe.metrics import Counters
from hf_tiered_cache.tiers.base import Tier
from hf_tiered_cache.tiers.device import DeviceTier


class OffloadManager:
    """Appends tokens and demotes the oldest blocks; `reader` brings cold ones back.

    `tiers` is the chain from the device down, all but the last in memory; blocks go down one rung
    at a time. `expected_tables` is the number of layers, where the model's config told it (0:
    unknown): it lets the first append say that a budget is too small for the layers still to come.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tiers: Sequence[Tier],
        staging_slots: int,
        expected_tables: int = 0,
        *,
        split: InPlaceShare = STAGE_ALL,
        in_place: InPlaceAttention | None = None,
        group_columns: int = 1,
        lock: "threading.RLock | None" = None,
        demotion: DemotionPolicy | None = None,
    ) -> None:
        """split, in_place, group_columns: see `BlockReader`. lock: one for all that share a device,
        of its own where none is given. demotion: by age where none is given."""
        device = tiers[DEVICE]
        assert isinstance(device, DeviceTier)
        *written, _ = [tier for tier in tiers if not tier.is_read_only]
        assert all(tier.has_addresses for tier in written), "a store reads memory"
        self.layout = layout
        self.tiers = tuple(tiers)
        self.device_tier = device
        self.blocks = KVBlockManager(len(tiers))
        self.counters = Counters()
        self.lock = lock or threading.RLock()
        self._stream = StagingRing(tiers, 0, self.counters)  # grows with the first append
        self._capacity = Capacity(
            layout, tiers, self.blocks, self._stream, staging_slots, group_columns, expected_tables
        )
        self._reader = BlockReader(
            self.blocks,
            layout,
            tiers,
            self._stream,
            self.counters,
            split,
            in_place,
            group_columns,
            lock=self.lock,
            check_held=self._check_held,
        )
        self._pins = self._reader.pins
        self.stores = Stores(
            tiers,
            self.blocks,
            self._capacity,
            demotion or ByAge(),
            self.counters,
            self._pins,
        )
        # Kernels of a device behind a lane return at once: nothing is gained by going on without.
        self.read_lock: contextlib.AbstractContextManager[object] = (
            contextlib.nullcontext() if device.lane is None else self.lock
        )
        """What a reader holds all the while."""
        self._abandoned: deque[BlockTable] = deque()
        self.group_columns = group_columns
        self._neighbours: list[OffloadManager] = []  # on the same device budget
        self._is_closed = False

    def share_device(self, neighbour: "OffloadManager") -> None:
        """Another manager draws on the same device budget from now on, under the same lock. The
        slots that staging may need are taken at once: the other manager would not leave them
        free."""
        assert neighbour.lock is self.lock
        with self.lock:
            self._tidy()
            with self.blocks.changing:
                self._neighbours.append(neighbour)
                self._stream.claim()

    def yield_device(self, num_bytes: int) -> None:
        """Give device memory back to the budget, for a neighbour that has less than it needs: as
        much as this manager can go without, at most so many bytes. Nothing where the device's
        memory cannot shrink, or while blocks are being read."""
        if len(self._pins) or not self.device_tier.can_shrink:
            return
        self._tidy()
        with self.blocks.changing:
            least_staging = self._capacity.least_staging
            committed = self.device_tier.committed_bytes // self.layout.num_bytes
            keep = max(
                self._capacity.least_slots, committed - -(-num_bytes // self.layout.num_bytes)
            )
            if keep >= committed:
                return
            self._stream.resize(0)
            surplus = self.device_tier.used_slots + least_staging - keep
            if surplus > 0:
                self.stores.make_room(self._capacity.num_free() + surplus)
            held = {block for table in self.blocks.tables for block in table.blocks()}
            for block in held:
                slot = block.slots[DEVICE]
                if slot is not None and slot >= keep:
                    lower = self._allocate()
                    self.device_tier.copy_block(slot, lower)
                    self.stores.free_copy(block, DEVICE, lower)
            self.device_tier.shrink(keep)
            self._stream.resize(least_staging)
            self._stream.claim()

    def new_table(self, layer: int, batch: int) -> BlockTable:
        """An empty table for a layer of `batch` sequences."""
        self._check_open()
        self._tidy()
        return self.blocks.new_table(layer, self.layout, batch)

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks; neither notices what is written to the other."""
        self._check_held(table)
        with self.blocks.changing:
            return self.blocks.fork(table)

    def adopt(self, table: BlockTable, slots: Sequence[int]) -> None:
        """Let an empty table begin with full blocks that lie in these slots of the last rung, which
        is read-only; all rows share them."""
        self._check_open()
        self._tidy()
        with self.blocks.changing:
            self.blocks.adopt(table, self._capacity.last_rung, slots)

    def export(self, table: BlockTable, block: KVBlock, out: torch.Tensor) -> None:
        """Copy the bytes of a full block of a table, wherever they are, into memory of the CPU,
        uint8 `[block_bytes]`. From any thread. Raises TierIOError, ClosedCacheError."""
        with self.lock:
            self._check_held(table)
            rung = block.highest
            slot, tier = block.slots[rung], self.tiers[rung]
            assert slot is not None
            if tier.has_addresses:
                out.copy_(tier.block(slot))
                return
            transfer = tier.read([slot], [out])
        transfer.wait()

    def append(self, table: BlockTable, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens behind the last ones of every row; older blocks are demoted to make room.

        keys `[batch, kv_heads, tokens, key_dim]`, values `[batch, kv_heads, tokens, value_dim]`.
        Raises UnsupportedInputError for tensors that do not fit the blocks, OutOfBlocksError, both
        before anything changed; TierIOError when making room failed, and the table then holds what
        it held.
        """
        self._check_held(table)
        num_tokens, start = keys.shape[2], table.num_tokens
        if num_tokens == 0:
            return
        placement = self.blocks.placement(table)
        room = -start % self.layout.block_tokens  # left in the filling blocks
        must_own = room > 0 and not placement.is_writable
        if num_tokens < room and not must_own:  # in decode nearly always: one number changes
            self._write(table, placement, keys, values)
            return
        if must_own:
            self._wait_for_readers(table)
        with self.blocks.changing:
            if must_own or num_tokens > room:
                checks.check_new_tokens(keys, values, self.layout, table.batch)
                self._ensure_capacity(table, num_tokens)
            done = 0
            try:
                if must_own:
                    self._own_last_blocks(table)
                while done < num_tokens:
                    if room == 0:
                        room = self._add_columns(table, num_tokens - done)
                    count = min(num_tokens - done, room)
                    placement = self.blocks.placement(table)
                    if count == num_tokens:  # slicing costs as much as writing
                        self._write(table, placement, keys, values)
                    else:
                        part = slice(done, done + count)
                        self._write(table, placement, keys[:, :, part], values[:, :, part])
                    done, room = done + count, 0
            except BaseException:
                self._drop(self.blocks.truncate(table, start))
                raise

    def _write(
        self, table: BlockTable, placement: Placement, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        start = table.num_tokens
        ops.append_tokens(keys, values, self._reader.last_view(placement), start)
        if self.blocks.advance(table, keys.shape[2]):
            self.stores.start_ahead(self._capacity.num_layers * table.batch)

    def _add_columns(self, table: BlockTable, num_tokens: int) -> int:
        """Add as many empty columns as fit now, at least one, at most for `num_tokens` tokens;
        return the tokens they take."""
        wanted = self.layout.num_blocks(num_tokens)
        columns = min(wanted, max(1, self._capacity.num_free() // table.batch))
        self.stores.make_room(columns * table.batch)
        for _ in range(columns):
            for row in range(table.batch):
                self.blocks.append_block(table, row, self._allocate())
        return columns * self.layout.block_tokens

    def _own_last_blocks(self, table: BlockTable) -> None:
        """Make the filling blocks writable: resident, unshared and without copies below."""
        for row in range(table.batch):
            block = table.rows[row][-1]
            if block.ref_count > 1 or not block.is_resident:
                self._make_room_for_copy(block)  # others may go on meanwhile, and let the block go
            if block.ref_count > 1:
                self._copy_last_block(table, row)
            else:
                self._promote(block)

    def _make_room_for_copy(self, block: KVBlock) -> None:
        """See to it that there is a slot for a block's copy, and one in staging if it is cold."""
        self.stores.make_room(1)
        while not (block.is_resident or self._stream.has_room([block], self._pins.staged())):
            if not self._pins.wait_within(self.blocks.changing):
                raise self._capacity.out_of_blocks(1)
            self.stores.make_room(1)

    def _copy_last_block(self, table: BlockTable, row: int) -> None:
        slot = self._allocate()
        try:
            self._read_block(table.rows[row][-1], slot)
        except BaseException:
            self.device_tier.free(slot)
            raise
        self.blocks.replace_last(table, row, slot)

    def _promote(self, block: KVBlock) -> None:
        """Keep a block that fills (again) on the device, alone: drop the copies below it."""
        if not block.is_resident:
            slot = self._allocate()
            try:
                self._read_block(block, slot)
            except BaseException:
                self.device_tier.free(slot)
                raise
            self.blocks.move(block, DEVICE, slot)
        self.blocks.start_filling(block)
        self._stream.discard(block)
        self.stores.free_slots(block, first_rung=DEVICE + 1)

    def _read_block(self, block: KVBlock, slot: int) -> None:
        """Copy a block's bytes, wherever they are, into another device slot."""
        own = block.slots[DEVICE]
        if own is not None:
            self.device_tier.copy_block(own, slot)
            return
        (place,) = self._stream.load([block], self._pins.staged())
        self._stream.copy_block(place, slot)
        if block not in self._pins.staged():
            self._stream.release([block])

    def _ensure_capacity(self, table: BlockTable, num_tokens: int) -> None:
        """Raise OutOfBlocksError unless `num_tokens` more tokens fit, whatever must be demoted for
        it; then fit staging to the batch."""
        while True:
            needs = self._capacity.needs(table, num_tokens)
            if self._ask_neighbours(needs.least):
                continue
            others = sum(it._capacity.least_bytes for it in self._neighbours)
            num_slots = self._capacity.check(needs, others)
            if num_slots == self._stream.num_slots:
                return
            if not self._pins.drain_within(self.blocks.changing):  # plans go by the ring's size
                break
        self._resize_staging(num_slots)

    def _ask_neighbours(self, num_slots: int) -> bool:
        """Let neighbours that hold more than they need give some of the device back, where this
        manager cannot get `num_slots` in all. True where their readers were waited for, so that
        all is to be counted again."""
        budget = self.device_tier.budget
        for neighbour in self._neighbours:
            wanted = num_slots * self.layout.num_bytes
            missing = wanted - self.device_tier.committed_bytes - budget.free_bytes
            if missing > 0:
                if neighbour._pins.drain_within(self.blocks.changing):
                    return True
                with contextlib.suppress(OutOfBlocksError, TierIOError):
                    neighbour.yield_device(missing)
        return False

    def _resize_staging(self, num_slots: int) -> None:
        """While nobody else reads."""
        self.stores.make_room(max(num_slots - self._stream.num_slots, 0))
        self._stream.resize(num_slots)
        if self._neighbours:
            self._stream.claim()

    def _allocate(self) -> int:
        slot = self.device_tier.allocate()
        assert slot is not None, "make_room promised a slot"
        return slot

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of every row."""
        self._tidy()
        self._wait_for_readers(table)
        with self.blocks.changing:
            self._drop(self.blocks.truncate(table, num_tokens))

    def select_rows(self, table: BlockTable, rows: Sequence[int]) -> None:
        """Make row `i` what row `rows[i]` was; blocks are shared, not copied."""
        self._tidy()
        self._wait_for_readers(table)
        with self.blocks.changing:
            self._drop(self.blocks.select_rows(table, rows))

    def drop_table(self, table: BlockTable) -> None:
        """Free everything only this table held; harmless after close."""
        self._tidy()
        self._wait_for_readers(table)
        self._drop_table(table)

    def _wait_for_readers(self, table: BlockTable) -> None:
        """Return when no other thread reads the table, whose rows are to change."""
        while self._pins.wait(lambda pin: pin.table is table):
            self._tidy()

    def abandon_table(self, table: BlockTable) -> None:
        """Drop a table before the next change or read. For finalizers: they run in any thread and
        in the middle of anything, so here nothing is touched and no lock is taken."""
        self._abandoned.append(table)

    def _drop_table(self, table: BlockTable) -> None:
        with self.blocks.changing:
            dropped = self.blocks.drop_table(table)
            if not self._is_closed:
                self._drop(dropped)

    def _tidy(self) -> None:
        """What must be done before the books are read or changed."""
        while self.blocks.changing.was_interrupted and not self._is_closed:
            if not self._pins.wait(lambda pin: pin.staged):
                self._mend()
        for _ in range(len(self._abandoned)):
            table = self._abandoned.popleft()
            if self._pins.holds(table) and not self._is_closed:
                self._abandoned.append(table)  # it is read to the end
            else:
                self._drop_table(table)

    def _mend(self) -> None:
        """Make good what an interrupt left half done: slots that no block is in are given back, and
        staging begins anew. Repeatable, should it be interrupted."""
        with self.blocks.changing:
            for tier in self.tiers:
                tier.drain()
            held = self.blocks.mend()
            self.stores.forget()
            self._stream.forget()
            for rung, tier in enumerate(self.tiers):
                slots = [slot for block in held if (slot := block.slots[rung]) is not None]
                tier.keep_only(slots)
            self._stream.resize(min(self._stream.num_slots, self.device_tier.num_free()))
            if self._neighbours:
                self._stream.claim()

    def _drop(self, blocks: Iterable[KVBlock]) -> None:
        for block in blocks:
            self._stream.discard(block)
            self.stores.free_slots(block, first_rung=DEVICE)

    def read(self, shown: Readable, selection: SelectionPolicy = ALL) -> Reading:
        """A reading of a table's blocks, those that `selection` chooses, to be entered while
        `read_lock` is held. Entering raises ClosedCacheError when the table was dropped, or its
        cache is closed."""
        return Reading(self._reader, shown, selection)

    @property
    def split(self) -> InPlaceShare:
        """How host blocks are shared between the lanes."""
        return self._reader.split

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def num_staging_slots(self) -> int:
        return self._stream.num_slots

    def num_cold_blocks(self) -> int:
        """Distinct blocks without a copy on the device."""
        with self.lock:
            self._tidy()
            blocks = {block for table in self.blocks.tables for block in table.blocks()}
            return sum(not block.is_resident for block in blocks)

    def check_integrity(self) -> None:
        """Verify the laws of the block tables and that no slot is lost; for tests."""
        self._tidy()
        self.blocks.check_integrity()
        held = {block for table in self.blocks.tables for block in table.blocks()}
        for rung, tier in enumerate(self.tiers):
            slots = sum(block.slots[rung] is not None for block in held)
            if rung == DEVICE:
                slots += self._stream.num_taken
            assert slots == tier.used_slots, f"{tier.name}: {slots} held, {tier.used_slots} used"
        self.stores.check_integrity(held)

    def close(self) -> None:
        """Give every tier's memory, files and threads back; what is not yet stored never will be.
        Idempotent.

        The tiers below end their transfers before the device's memory goes. Nothing is waited for
        here: garbage collection may call this from one of their threads.
        """
        self._is_closed = True
        self.blocks.forget_places()
        for tier in reversed(self.tiers):
            tier.close()

    def _check_held(self, table: BlockTable) -> None:
        """Raise ClosedCacheError unless the table's cache is there, and still holds the table."""
        if self._abandoned or self.blocks.changing.was_interrupted:
            self._tidy()  # others may go on meanwhile, and close the cache
        if self._is_closed:
            self._check_open()
        if not table.rows:
            raise ClosedCacheError("the cache that held these keys and values is gone")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedCacheError("this cache is closed: make a new TieredCache")
