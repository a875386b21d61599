"""What is demoted and when: `OffloadManager`.

Exact decode reads every block of every layer once per token, in layer order. Against such a
cyclic scan LRU hits nothing, so placement is by age: the newest blocks stay on the device, the
same share in every layer, older ones lie one rung down, and the oldest on the last rung. A full
block is immutable, so it is stored at most once on each rung and the copy above is dropped for
free; stores start before their room is needed, so that a decode step seldom waits for one. Blocks
never go up but through staging (`block_reader`).

One manager serves all layers whose blocks have the same layout and device. Forks of a cache share
it; `lock` is held by whoever moves or reads blocks.
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from time import perf_counter

import torch

from hf_tiered_cache import tracing
from hf_tiered_cache.block_manager import DEVICE, BlockTable, KVBlock, KVBlockManager
from hf_tiered_cache.block_reader import BlockReader
from hf_tiered_cache.cpu_lane import CpuLane
from hf_tiered_cache.errors import ClosedCacheError, OutOfBlocksError, TierIOError
from hf_tiered_cache.kernels import checks, ops
from hf_tiered_cache.lane_split import STAGE_ALL, LaneSplit
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.metrics import Counters, span
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.stream import BlockStream
from hf_tiered_cache.tiers.base import DONE, Tier
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.tiers.lane_tier import HostLaneTier
from hf_tiered_cache.tiers.memory import MemoryTier
from hf_tiered_cache.tracing import STORE, STORE_WAIT

# Groups of columns that staging must be able to hold: one is attended while one loads.
STAGED_GROUPS = 2

# Stores to one rung that may be under way at once: enough to keep a disk's queue full, few enough
# that the rung above keeps room for new blocks.
MAX_STORES = 8


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
        split: LaneSplit = STAGE_ALL,
        cpu_lane: CpuLane | None = None,
        group_columns: int = 1,
        lock: "threading.RLock | None" = None,
    ) -> None:
        """split, cpu_lane, group_columns: see `BlockReader`. lock: one for all that share a device,
        of its own where none is given."""
        device = tiers[DEVICE]
        memory = [tier for tier in tiers if isinstance(tier, MemoryTier | HostLaneTier)]
        assert isinstance(device, DeviceTier)
        assert len(memory) >= len(tiers) - 1, "a store reads memory: only the last tier may be none"
        self.layout = layout
        self.tiers = tuple(tiers)
        self.device_tier = device
        self.blocks = KVBlockManager(len(tiers))
        self.counters = Counters()
        self.lock = lock or threading.RLock()
        self._memory = memory  # the tiers whose blocks have addresses: all but the last, at least
        self._lower = tiers[DEVICE + 1 :]
        self._staging_slots = staging_slots if self._lower else 0  # as many as wished for
        self._stream = BlockStream(tiers, 0, self.counters)  # grows with the first append
        self._reader = BlockReader(
            self.blocks, layout, memory, self._stream, self.counters, split, cpu_lane, group_columns
        )
        self._expected_tables = expected_tables
        # Stores that nobody waited for yet, by rung, in order of their start.
        self._storing: list[dict[KVBlock, None]] = [{} for _ in tiers]
        self._abandoned: deque[BlockTable] = deque()
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
        if self._reader.is_reading or not self.device_tier.can_shrink:
            return
        self._tidy()
        with self.blocks.changing:
            least_staging = self._least_staging
            committed = self.device_tier.committed_bytes // self.layout.num_bytes
            keep = max(self._least_slots, committed - -(-num_bytes // self.layout.num_bytes))
            if keep >= committed:
                return
            self._stream.resize(0)
            surplus = self.device_tier.used_slots + least_staging - keep
            if surplus > 0:
                self.make_room(self._num_free_slots() + surplus)
            held = {block for table in self.blocks.tables for block in table.blocks()}
            for block in held:
                slot = block.slots[DEVICE]
                if slot is not None and slot >= keep:
                    lower = self._allocate()
                    self.device_tier.copy_block(slot, lower)
                    self._free_copy(block, DEVICE, lower)
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
        room = table.num_blocks * self.layout.block_tokens - start
        must_own = room > 0 and not self.blocks.placement(table).is_writable
        if num_tokens < room and not must_own:  # in decode nearly always: one number changes
            self._write(table, keys, values)
            return
        with self.blocks.changing:
            if must_own or num_tokens > room:
                checks.check_new_tokens(keys, values, self.layout, table.batch)
                self._check_capacity(table, num_tokens)
            done = 0
            try:
                if must_own:
                    self._own_last_blocks(table)
                while done < num_tokens:
                    if room == 0:
                        room = self._add_columns(table, num_tokens - done)
                    count = min(num_tokens - done, room)
                    if count == num_tokens:  # slicing costs as much as writing
                        self._write(table, keys, values)
                    else:
                        part = slice(done, done + count)
                        self._write(table, keys[:, :, part], values[:, :, part])
                    done, room = done + count, 0
            except BaseException:
                self._drop(self.blocks.truncate(table, start))
                raise

    def _write(self, table: BlockTable, keys: torch.Tensor, values: torch.Tensor) -> None:
        start = table.num_tokens
        ops.append_tokens(keys, values, self._reader.last_view(table), start)
        if self.blocks.advance(table, keys.shape[2]):
            self._store_ahead(self._num_layers * table.batch)

    def _add_columns(self, table: BlockTable, num_tokens: int) -> int:
        """Add as many empty columns as fit now, at least one, at most for `num_tokens` tokens;
        return the tokens they take."""
        wanted = self.layout.num_blocks(num_tokens)
        columns = min(wanted, max(1, self._num_free_slots() // table.batch))
        self.make_room(columns * table.batch)
        for _ in range(columns):
            for row in range(table.batch):
                self.blocks.append_block(table, row, self._allocate())
        return columns * self.layout.block_tokens

    def _own_last_blocks(self, table: BlockTable) -> None:
        """Make the filling blocks writable: resident, unshared and without copies below."""
        for row in range(table.batch):
            block = table.rows[row][-1]
            if block.ref_count > 1:
                self._copy_last_block(table, row)
            else:
                self._promote(block)

    def _copy_last_block(self, table: BlockTable, row: int) -> None:
        self.make_room(1)
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
            self.make_room(1)
            slot = self._allocate()
            try:
                self._read_block(block, slot)
            except BaseException:
                self.device_tier.free(slot)
                raise
            self.blocks.move(block, DEVICE, slot)
        self.blocks.start_filling(block)
        self._stream.discard(block)
        self._free_slots(block, first_rung=DEVICE + 1)

    def _read_block(self, block: KVBlock, slot: int) -> None:
        """Copy a block's bytes, wherever they are, into another device slot."""
        own = block.slots[DEVICE]
        if own is not None:
            self.device_tier.copy_block(own, slot)
            return
        (staged,) = self._stream.load([block])
        self.device_tier.copy_block(staged, slot)
        self._stream.release([block])

    def make_room(self, num_blocks: int, rung: int = DEVICE) -> None:
        """Demote the oldest blocks of a rung until `num_blocks` slots of it are free.

        Raises OutOfBlocksError when everything left there must stay, TierIOError when a store
        failed (the block stays where it is).
        """
        while self._num_free_slots(rung) < num_blocks:
            block = None
            if rung < self._last_rung:
                block = self.blocks.next_to_demote(self._num_slots_below(rung) > 0, rung)
            if block is None:
                raise self._out_of_blocks(num_blocks)
            copy = block.copy_below(rung)
            if copy is None:
                copy = self._store(block, rung)
            self._finish_store(block, copy)
            self._free_copy(block, rung)

    def _store_ahead(self, num_blocks: int) -> None:
        """Start storing the blocks that are next to leave, before their room is needed.

        The next forward may ask for `num_blocks`, one per row of every table; as long as so many
        slots of a rung are free or can be dropped without a wait, nothing on it is stored: what
        fits costs nothing.
        """
        if any(self._storing):
            self._reap_stores()
        for rung in range(self._last_rung):  # from above: what it takes below is made good then
            while (
                self._num_free_slots(rung) + self.blocks.num_clean_on(rung) < num_blocks
                and (target := self._rung_below(rung)) is not None
                and len(self._storing[target]) < MAX_STORES
                and (block := self.blocks.next_to_store(rung)) is not None
                and block.stores[rung].is_ready()
                and self._has_room_now(target)
            ):
                try:
                    self._store(block, rung)
                except TierIOError:
                    break  # not yet in need: `make_room` tries again and says so if it must

    def _has_room_now(self, rung: int) -> bool:
        """Whether a slot of a lower rung is free, or can be made so without a wait."""
        if self._num_free_slots(rung) > 0:
            return True
        if rung == self._last_rung:
            return False
        block = self.blocks.next_to_demote(may_store=False, rung=rung)
        copy = None if block is None else block.copy_below(rung)
        return block is not None and copy is not None and block.stores[copy].is_ready()

    def _store(self, block: KVBlock, rung: int) -> int:
        """Start writing a block from a rung to the one below, which is returned; it counts as
        stored there once its transfer is done."""
        self._finish_store(block, rung)
        target = self._rung_below(rung)
        if target is None:
            raise self._out_of_blocks(1)
        self.make_room(1, target)
        source, slot = block.slots[rung], self.tiers[target].allocate()
        assert source is not None
        if slot is None:  # another manager on the same budget took it
            raise self._out_of_blocks(1)
        issued = perf_counter()
        try:
            data = self._memory[rung].block(source)
            block.stores[target] = self.tiers[target].write([slot], [data])
        except BaseException:
            self.tiers[target].free(slot)
            raise
        self.blocks.move(block, target, slot)
        self._storing[target][block] = None
        self.counters.stores += 1
        self.counters.stored_bytes += self.layout.num_bytes
        if tracing.recorder is not None:
            name, transfer = self.tiers[target].name, block.stores[target]
            size = self.layout.num_bytes
            tracing.recorder.watch(STORE, name, [block.layer], 1, size, issued, transfer)
        return target

    def _finish_store(self, block: KVBlock, rung: int) -> None:
        """Wait until a block's copy on a rung is there; if its store failed that copy is given up
        and TierIOError raised."""
        store = block.stores[rung]
        try:
            if not store.is_ready():
                with span(STORE_WAIT), self.counters.waiting("store_wait_seconds"):
                    store.wait()
            store.wait()
        except TierIOError:
            self._free_slots(block, first_rung=rung)
            raise
        self._forget_store(block, rung)

    def _reap_stores(self) -> None:
        """Forget finished stores; a failed one makes its block dirty again, to be retried later."""
        for rung, storing in enumerate(self._storing):
            ended = [block for block in storing if block.stores[rung].is_ready()]
            for block in reversed(ended):  # so that of those that failed the oldest is first again
                try:
                    block.stores[rung].wait()
                except TierIOError:
                    self._free_slots(block, first_rung=rung)
                else:
                    self._forget_store(block, rung)

    def _forget_store(self, block: KVBlock, rung: int) -> None:
        """A store ended, or its outcome no longer matters."""
        self._storing[rung].pop(block, None)
        block.stores[rung] = DONE

    def _check_capacity(self, table: BlockTable, num_tokens: int) -> None:
        """Raise OutOfBlocksError unless `num_tokens` more tokens fit, whatever must be demoted for
        it; then fit staging to the batch."""
        columns = self.layout.num_blocks(table.num_tokens + num_tokens) - table.num_blocks
        copies, pinned = self._fill_needs(table)
        needed = columns * table.batch + copies
        least_staging = self._least_staging
        pinned = max(pinned, self._num_layers * table.batch)
        most = self._most_slots(pinned + least_staging)
        if pinned + least_staging > most:
            raise self._budget_too_small(table.batch, pinned, least_staging)
        staging = min(max(self._staging_slots, least_staging), most - pinned) if self._lower else 0
        free = self._num_free_slots() + self._stream.num_slots - staging
        droppable = self.blocks.num_clean_on(DEVICE)
        if needed > free + droppable + self._num_slots_below(DEVICE):
            raise self._out_of_blocks(needed)
        self._resize_staging(staging)

    @property
    def _least_staging(self) -> int:
        """Staging slots without which a forward cannot go on."""
        staged_columns = STAGED_GROUPS * self._reader.group_columns if self._lower else 0
        return staged_columns * self.blocks.max_batch

    @property
    def _least_slots(self) -> int:
        """Device slots without which a forward cannot go on."""
        filling = self.device_tier.used_slots - self._stream.num_taken - self.blocks.num_demotable()
        filling = max(filling, self._num_layers * self.blocks.max_batch)
        return filling + self._least_staging

    def _most_slots(self, wanted: int) -> int:
        """The device slots that this manager has or may get; neighbours that hold more than they
        need give some back, where those are less than wanted."""
        tier = self.device_tier
        for neighbour in self._neighbours:
            missing = wanted * self.layout.num_bytes - tier.committed_bytes - tier.budget.free_bytes
            if missing > 0:
                with contextlib.suppress(OutOfBlocksError, TierIOError):
                    neighbour.yield_device(missing)
        return tier.used_slots + tier.num_free()

    def _fill_needs(self, table: BlockTable) -> tuple[int, int]:
        """(blocks to copy before the table's last blocks can be written, blocks pinned to the
        device once they, or those of a new column, are). Pinned are the filling ones of all
        tables."""
        pinned = self.device_tier.used_slots - self._stream.num_taken
        pinned -= self.blocks.num_demotable()
        if not table.is_filling:
            return 0, pinned + table.batch
        copies = 0
        for block, num_rows in Counter(row[-1] for row in table.rows).items():
            is_ours = block.ref_count == num_rows  # nobody else holds it: one row can keep it
            copies += num_rows - is_ours
            is_pinned = block.is_resident and not self.blocks.is_demotable(block)
            pinned += num_rows - (is_ours and is_pinned)
        return copies, pinned

    def _resize_staging(self, num_slots: int) -> None:
        before = self._stream.num_slots
        if num_slots == before:
            return
        self._stream.resize(num_slots)
        try:
            self.make_room(0)
        except BaseException:
            self._stream.resize(before)
            raise
        if self._neighbours:
            self._stream.claim()

    @property
    def _last_rung(self) -> int:
        return len(self.tiers) - 1

    @property
    def _num_layers(self) -> int:
        """Layers of a forward: each pins its filling blocks."""
        return max(self.blocks.num_layers, self._expected_tables)

    def _num_free_slots(self, rung: int = DEVICE) -> int:
        """Slots of a rung that blocks may take: free ones, less those kept for staging."""
        kept = self._stream.num_reserved if rung == DEVICE else 0
        return self.tiers[rung].num_free() - kept

    def _num_slots_below(self, rung: int) -> int:
        """Blocks that could still come to the rungs below: into free slots, and into those of
        copies that can be dropped."""
        lower = range(rung + 1, len(self.tiers))
        free = sum(self.tiers[one].num_free() for one in lower)
        return free + sum(self.blocks.num_clean_on(one) for one in lower[:-1])

    def _rung_below(self, rung: int) -> int | None:
        """The next rung down, without those of which other managers hold the whole budget."""
        for lower in range(rung + 1, len(self.tiers)):
            if self.tiers[lower].used_slots + self.tiers[lower].num_free():
                return lower
        return None

    def _allocate(self) -> int:
        slot = self.device_tier.allocate()
        assert slot is not None, "make_room promised a slot"
        return slot

    def _budget_too_small(self, batch: int, pinned: int, staging: int) -> OutOfBlocksError:
        budget = self.device_tier.budget.limit_bytes
        others = sum(it._least_slots * it.layout.num_bytes for it in self._neighbours)
        smallest = (pinned + staging) * self.layout.num_bytes + others
        beside = f", and {format_bytes(others)} for blocks of other shapes" if others else ""
        return OutOfBlocksError(
            f"device_bytes={format_bytes(budget)} is too small: {pinned} filling blocks (one for "
            f"each of {self._num_layers} layers x {batch} sequences, and of forks) and {staging} "
            f"staging blocks of {format_bytes(self.layout.num_bytes)} must be there{beside}: the "
            f"smallest device_bytes that works is {smallest} "
            f"({format_bytes(smallest)}); or choose a smaller block_tokens "
            f"(now {self.layout.block_tokens})"
        )

    def _out_of_blocks(self, num_blocks: int) -> OutOfBlocksError:
        tiers = ", ".join(
            f"{tier.name}: {tier.used_slots} of {tier.used_slots + tier.num_free()} blocks used"
            for tier in self.tiers
        )
        knob = "raise " + " or ".join(f"{tier.name}_bytes" for tier in reversed(self.tiers))
        if not any(tier.name == "disk" for tier in self.tiers):
            knob += " or allow disk_bytes"
        size = format_bytes(num_blocks * self.layout.num_bytes)
        return OutOfBlocksError(
            f"no room for {num_blocks} more blocks ({size}) of {self.layout.block_tokens} tokens "
            f"({tiers}): {knob}, or shorten the sequence"
        )

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of every row."""
        self._tidy()
        with self.blocks.changing:
            self._drop(self.blocks.truncate(table, num_tokens))

    def select_rows(self, table: BlockTable, rows: Sequence[int]) -> None:
        """Make row `i` what row `rows[i]` was; blocks are shared, not copied."""
        self._tidy()
        with self.blocks.changing:
            self._drop(self.blocks.select_rows(table, rows))

    def drop_table(self, table: BlockTable) -> None:
        """Free everything only this table held; harmless after close."""
        self._tidy()
        self._drop_table(table)

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
        if self.blocks.changing.was_interrupted and not self._is_closed:
            self._mend()
        while self._abandoned:
            self._drop_table(self._abandoned.popleft())

    def _mend(self) -> None:
        """Make good what an interrupt left half done: slots that no block is in are given back, and
        staging begins anew. Repeatable, should it be interrupted."""
        with self.blocks.changing:
            for tier in self.tiers:
                tier.drain()
            held = self.blocks.mend()
            for storing in self._storing:
                storing.clear()
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
            self._free_slots(block, first_rung=DEVICE)

    def _free_slots(self, block: KVBlock, first_rung: int) -> None:
        """Free the block's slots from `first_rung` down, after stores under way have ended."""
        for rung in range(max(first_rung, DEVICE + 1), len(self.tiers)):
            block.stores[rung].outlast()  # the copy is given up anyway
            self._forget_store(block, rung)
        for rung in range(first_rung, len(self.tiers)):
            self._free_copy(block, rung)

    def _free_copy(self, block: KVBlock, rung: int, other: int | None = None) -> None:
        """Free the block's slot on a rung, if it has one, for another one or none. No store may be
        reading or writing it; loads may: the tier lets them end undisturbed."""
        slot = self.blocks.move(block, rung, other)
        if slot is not None:
            self.tiers[rung].free(slot)

    def reader(self, table: BlockTable) -> BlockReader:
        """What reads the table's blocks; raises ClosedCacheError when the table was dropped, or its
        cache is closed."""
        self._check_held(table)
        return self._reader

    @property
    def split(self) -> LaneSplit:
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
        for block in held:
            self._check_stores(block)
        storing = {block for blocks in self._storing for block in blocks}
        assert storing <= held, "a block that nobody holds is being stored"

    def _check_stores(self, block: KVBlock) -> None:
        """The highest copy is there. One on its way is on the list of its rung and has its slot,
        and the next one above, from which it comes, is there."""
        highest = block.highest
        assert block.stores[highest].is_ready(), f"{block} was dropped above too early"
        block.stores[highest].wait()  # raises if it failed
        for rung, store in enumerate(block.stores):
            if not store.is_ready():
                assert block in self._storing[rung], f"{block}: rung {rung} lost sight of its store"
                assert block.slots[rung] is not None, f"{block}: a store without a slot, {rung=}"
                above = [up for up in range(rung) if block.slots[up] is not None]
                assert above, f"{block}: what is stored to rung {rung} is gone above"
                assert block.stores[above[-1]].is_ready(), f"{block}: stored before it was there"

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
        self._check_open()
        self._tidy()
        if not table.rows:
            raise ClosedCacheError("the cache that held these keys and values is gone")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedCacheError("this cache is closed: make a new TieredCache")
