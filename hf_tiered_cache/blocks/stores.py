"""Blocks on their way down: which stores are under way, and what they make room for.

A full block is immutable, so it is stored at most once on each rung and the copy above is dropped
for free; stores start before their room is needed, so that a decode step seldom waits for one.
"""

from collections.abc import Iterable, Sequence
from time import perf_counter

from hf_tiered_cache.blocks.block_manager import DEVICE, KVBlock, KVBlockManager, Waiting
from hf_tiered_cache.blocks.capacity import Capacity
from hf_tiered_cache.blocks.demotion import DemotionPolicy
from hf_tiered_cache.blocks.pins import Pins
from hf_tiered_cache.errors import BlockStateError, TierIOError
from hf_tiered_cache.observe import tracing
from hf_tiered_cache.observe.metrics import Counters, span
from hf_tiered_cache.observe.tracing import STORE, STORE_WAIT
from hf_tiered_cache.tiers.base import Tier
from hf_tiered_cache.transfers import DONE

# Stores to one rung that may be under way at once: enough to keep a disk's queue full, few enough
# that the rung above keeps room for new blocks.
MAX_STORES = 8


class Stores:
    """Demotes blocks, one rung at a time; the caller changes the books (`KVBlockManager.changing`).

    All tiers but the last have addresses: a store reads memory.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        blocks: KVBlockManager,
        capacity: Capacity,
        policy: DemotionPolicy,
        counters: Counters,
        pins: Pins,
    ) -> None:
        self._tiers = tiers
        self._blocks = blocks
        self._capacity = capacity
        self._policy = policy
        self._counters = counters
        self._pins = pins
        # That nobody waited for yet, by rung, in order of their start.
        self._under_way: list[dict[KVBlock, None]] = [{} for _ in tiers]

    def make_room(self, num_blocks: int, rung: int = DEVICE) -> None:
        """Demote blocks of a rung, as the policy chooses, until `num_blocks` slots of it are free.

        What is being read stays; if there is nothing else, the readers are waited for. Raises
        OutOfBlocksError when everything left there must stay, TierIOError when a store failed (the
        block stays where it is).
        """
        while not self._make_room(num_blocks, rung):
            # What is read just now may be free to go when its reader is done.
            if not self._pins.wait_within(self._blocks.changing):
                raise self._capacity.out_of_blocks(num_blocks)

    def _make_room(self, num_blocks: int, rung: int) -> bool:
        """The same without waiting for readers: False where everything left there must stay."""
        while self._capacity.num_free(rung) < num_blocks:
            block = None
            if rung < self._capacity.last_rung:
                block = self._next_to_demote(rung, self._capacity.num_below(rung) > 0)
            if block is None:
                return False
            copy = block.copy_below(rung)
            if copy is None:
                copy = self._store(block, rung)
            if copy is None:
                return False
            self._finish(block, copy)
            self.free_copy(block, rung)
        return True

    def start_ahead(self, num_blocks: int) -> None:
        """Start storing the blocks that are next to leave, before their room is needed.

        The next forward may ask for `num_blocks`, one per row of every table; as long as so many
        slots of a rung are free or can be dropped without a wait, nothing on it is stored: what
        fits costs nothing.
        """
        if any(self._under_way):
            self._reap()
        for rung in range(self._capacity.last_rung):  # from above: what it takes is made good then
            while (
                self._capacity.num_free(rung) + self._blocks.num_clean_on(rung) < num_blocks
                and (target := self._capacity.rung_below(rung)) is not None
                and len(self._under_way[target]) < MAX_STORES
                and (block := self._next_to_store(rung)) is not None
                and block.stores[rung].is_ready()
                and self._has_room_now(target)
            ):
                try:
                    if self._store(block, rung) is None:
                        break
                except TierIOError:
                    break  # not yet in need: `make_room` tries again and says so if it must

    def free_slots(self, block: KVBlock, first_rung: int) -> None:
        """Free the block's slots from `first_rung` down, after stores under way have ended."""
        for rung in range(max(first_rung, DEVICE + 1), len(self._tiers)):
            block.stores[rung].outlast()  # the copy is given up anyway
            self._forget_one(block, rung)
        for rung in range(first_rung, len(self._tiers)):
            self.free_copy(block, rung)

    def free_copy(self, block: KVBlock, rung: int, other: int | None = None) -> None:
        """Free the block's slot on a rung, if it has one, for another one or none. No store may be
        reading or writing it; loads may: the tier lets them end undisturbed."""
        slot = self._blocks.move(block, rung, other)
        if slot is not None:
            self._tiers[rung].free(slot)

    def forget(self) -> None:
        """All have ended, and the books know what became of them."""
        for under_way in self._under_way:
            under_way.clear()

    def _next_to_demote(self, rung: int, may_store: bool) -> KVBlock | None:
        waiting = self._blocks.waiting[rung]
        if len(self._pins):
            waiting = waiting.without(self._pins.layers)
        block = self._policy.next_to_demote(waiting, may_store)
        if block is not None and not (may_store and block in waiting.dirty[block.layer]):
            self._check_choice(block in waiting.clean[block.layer], block, waiting)
        return block

    def _next_to_store(self, rung: int) -> KVBlock | None:
        waiting = self._blocks.waiting[rung]
        block = self._policy.next_to_store(waiting)
        if block is not None:
            self._check_choice(block in waiting.dirty[block.layer], block, waiting)
        return block

    def _check_choice(self, is_lawful: bool, block: KVBlock, waiting: Waiting) -> None:
        if not is_lawful:
            raise BlockStateError(
                f"the demotion policy {type(self._policy).__name__} chose {block}, which cannot"
                f" leave rung {waiting.rung} now: it may choose among what `waiting` holds"
            )

    def _has_room_now(self, rung: int) -> bool:
        """Whether a slot of a lower rung is free, or can be made so without a wait."""
        if self._capacity.num_free(rung) > 0:
            return True
        if rung == self._capacity.last_rung:
            return False
        block = self._next_to_demote(rung, may_store=False)
        copy = None if block is None else block.copy_below(rung)
        return block is not None and copy is not None and block.stores[copy].is_ready()

    def _store(self, block: KVBlock, rung: int) -> int | None:
        """Start writing a block from a rung to the one below, which is returned; it counts as
        stored there once its transfer is done. None where there is no room for it just now."""
        self._finish(block, rung)
        target = self._capacity.rung_below(rung)
        if target is None:
            raise self._capacity.out_of_blocks(1)
        if not self._make_room(1, target):
            return None
        tier = self._tiers[target]
        source, slot = block.slots[rung], tier.allocate()
        assert source is not None
        if slot is None:  # another manager on the same budget took it
            raise self._capacity.out_of_blocks(1)
        issued = perf_counter()
        try:
            data = self._tiers[rung].block(source)
            block.stores[target] = transfer = tier.write([slot], [data])
        except BaseException:
            tier.free(slot)
            raise
        self._blocks.move(block, target, slot)
        self._under_way[target][block] = None
        size = tier.record_bytes
        self._counters.stores += 1
        self._counters.stored_bytes += size
        if tracing.recorder is not None:
            tracing.recorder.watch(STORE, tier.name, [block.layer], 1, size, issued, transfer)
        return target

    def _finish(self, block: KVBlock, rung: int) -> None:
        """Wait until a block's copy on a rung is there; if its store failed that copy is given up
        and TierIOError raised."""
        store = block.stores[rung]
        try:
            if not store.is_ready():
                with span(STORE_WAIT), self._counters.waiting("store_wait_seconds"):
                    store.wait()
            store.wait()
        except TierIOError:
            self.free_slots(block, first_rung=rung)
            raise
        self._forget_one(block, rung)

    def _reap(self) -> None:
        """Forget finished stores; a failed one makes its block dirty again, to be retried later."""
        for rung, under_way in enumerate(self._under_way):
            ended = [block for block in under_way if block.stores[rung].is_ready()]
            for block in reversed(ended):  # so that of those that failed the oldest is first again
                try:
                    block.stores[rung].wait()
                except TierIOError:
                    self.free_slots(block, first_rung=rung)
                else:
                    self._forget_one(block, rung)

    def _forget_one(self, block: KVBlock, rung: int) -> None:
        """A store ended, or its outcome no longer matters."""
        self._under_way[rung].pop(block, None)
        block.stores[rung] = DONE

    def check_integrity(self, held: Iterable[KVBlock]) -> None:
        """Verify the laws of the stores of all blocks that tables hold; for tests."""
        held = set(held)
        for block in held:
            self._check_block(block)
        under_way = {block for blocks in self._under_way for block in blocks}
        assert under_way <= held, "a block that nobody holds is being stored"

    def _check_block(self, block: KVBlock) -> None:
        """The highest copy is there. One on its way is on the list of its rung and has its slot,
        and the next one above, from which it comes, is there."""
        highest = block.highest
        assert block.stores[highest].is_ready(), f"{block} was dropped above too early"
        block.stores[highest].wait()  # raises if it failed
        for rung, store in enumerate(block.stores):
            if not store.is_ready():
                assert block in self._under_way[rung], f"{block}: rung {rung} lost sight of it"
                assert block.slots[rung] is not None, f"{block}: a store without a slot, {rung=}"
                above = [up for up in range(rung) if block.slots[up] is not None]
                assert above, f"{block}: what is stored to rung {rung} is gone above"
                assert block.stores[above[-1]].is_ready(), f"{block}: stored before it was there"
