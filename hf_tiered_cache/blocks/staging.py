"""The ring of staging slots through which cold blocks pass on their way to attention.

Loads run ahead of compute: whoever consumes blocks says which ones a forward will read next, over
the layers and over the token boundary (cold blocks never change and their order is known, so no
query is needed to load them), and as many loads as there are free staging slots are started.
Staging slots are ordinary slots of the device tier, so they count in its budget.

On a device with a copy lane the slot of an attended block is filled again only when the device,
which lags behind, is past the attention that reads it: `release` marks that moment.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import filterfalse, islice, repeat
from time import perf_counter

from hf_tiered_cache.blocks.block_manager import DEVICE, KVBlock
from hf_tiered_cache.devices.copy_lane import Mark
from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.observe import tracing
from hf_tiered_cache.observe.metrics import Counters
from hf_tiered_cache.observe.tracing import LOAD
from hf_tiered_cache.tiers.base import Tier
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.transfers import DONE, Transfer

# One read of neighbouring records up to this size: below it the calls, not the bytes, cost.
READ_BYTES = 1024 * 1024
# With a copy lane: a link reaches its rate from about 4 MiB up, and a read costs the host about 20
# us, in which a link carries 1 MiB. So as much as a quarter of the ring at once, but no more than
# what is attended first should wait for.
LANE_READ_BYTES = (4 * READ_BYTES, 32 * READ_BYTES)
READS_PER_RING = 4

_Staged = tuple[int, Transfer]  # the place of a block and its load


class StagingRing:
    """Loads cold blocks into at most `num_slots` staging slots, ahead of their use.

    A staged block is wanted (loading or loaded, not yet attended). `begin` starts the loads of what
    is to be attended next, `release` makes its slots free for the next ones. Anything else that is
    staged may be discarded: a tier below still holds it. Loads come from the highest one that does.

    A place is a staging slot, complemented (`~slot`) where the block in it is encoded: the CPU's
    kernels attend those of `codec` as they are.
    """

    def __init__(self, tiers: Sequence[Tier], num_slots: int, counters: Counters) -> None:
        device = tiers[DEVICE]
        assert isinstance(device, DeviceTier)
        self._device = device
        self._tiers = tiers
        self._counters = counters
        self._num_slots = num_slots
        self.codec = next((tier.codec for tier in tiers if _is_attended(tier, device)), None)
        """Of the blocks that are encoded in staging; None: none are."""
        self._free: list[int] = []
        self._last_reads: dict[int, Mark] = {}  # by free slot, on a device with a lane
        self._staged: dict[KVBlock, _Staged] = {}  # in order of their use

    @property
    def chunk_blocks(self) -> int:
        """Blocks to consume at once: half of the ring, while the other half is loading."""
        return max(1, self._num_slots // 2)

    @property
    def num_slots(self) -> int:
        """Staging slots, the most blocks that can be staged at once."""
        return self._num_slots

    @property
    def num_taken(self) -> int:
        """Staging slots taken from the device tier."""
        return len(self._free) + len(self._staged)

    @property
    def num_reserved(self) -> int:
        """Staging slots not yet taken from the device tier; nobody else may take these."""
        return self._num_slots - self.num_taken

    def resize(self, num_slots: int) -> None:
        """Allow so many staging slots, giving back those above it: nothing that is staged may be
        attended then. Where that is more than before, the caller sees to it that the device tier
        can give them."""
        self._num_slots = num_slots
        while self.num_reserved < 0:
            if not self._free:
                self.discard(next(reversed(self._staged)))  # the last to be used
            slot = self._free.pop()
            self._last_reads.pop(slot, None)
            self._device.free(slot)

    def claim(self) -> None:
        """Take all staging slots from the device tier now, before somebody else does."""
        for _ in range(self.num_reserved):
            slot = self._device.allocate()
            assert slot is not None, "the caller sees to it that the device tier can give them"
            self._free.append(slot)

    def has_room(self, blocks: Sequence[KVBlock], kept: Collection[KVBlock]) -> bool:
        """Whether all `blocks` (at most `num_slots`, no repeats) can be staged while those in
        `kept` stay, which are attended just now."""
        wanted = self._num_slots - sum(block not in kept for block in blocks)
        return wanted >= len(kept)

    def begin(self, blocks: Sequence[KVBlock], kept: Collection[KVBlock] = ()) -> bool:
        """Start loading those of `blocks`, for which there is room, that are not staged yet;
        whether any was. What failed is loaded again."""
        staged = self._staged
        for transfer in dict.fromkeys([staged[block][1] for block in blocks if block in staged]):
            if transfer.has_failed:  # nobody can be attending what it did not bring
                for block in [b for b, (_, load) in staged.items() if load is transfer]:
                    self.discard(block)
        missing = [block for block in blocks if block not in staged]
        surplus = len(missing) - len(self._free) - self.num_reserved
        if surplus > 0:
            wanted = {*blocks, *kept}
            # What lies furthest ahead gives way: it is the last to be used.
            for block in [b for b in reversed(self._staged) if b not in wanted][:surplus]:
                self.discard(block)
        self._start(missing)
        return len(missing) < len(blocks)

    def load(self, blocks: Sequence[KVBlock], kept: Collection[KVBlock] = ()) -> list[int]:
        """`begin` and wait; the places. What failed while it was loaded ahead is tried once more.
        Raises TierIOError when a load failed; the blocks are then no longer staged."""
        has_prefetched = self.begin(blocks, kept)
        try:
            self._wait(blocks, kept)
        except TierIOError:
            if not has_prefetched:
                raise
            self.begin(blocks, kept)
            self._wait(blocks, kept)
        return self.places(blocks)

    def _wait(self, blocks: Sequence[KVBlock], kept: Collection[KVBlock]) -> None:
        try:
            for transfer in self.transfers(blocks):
                transfer.hold_device()
        except TierIOError:
            for block in blocks:
                if block not in kept:
                    self.discard(block)
            raise

    def transfers(self, blocks: Iterable[KVBlock]) -> list[Transfer]:
        """The loads of staged blocks, each once."""
        return list(dict.fromkeys([self._staged[block][1] for block in blocks]))

    def places(self, blocks: Iterable[KVBlock]) -> list[int]:
        """Where blocks are staged."""
        return [self._staged[block][0] for block in blocks]

    def release(self, blocks: Iterable[KVBlock]) -> None:
        """The blocks were attended; their staging slots are free."""
        slots = [_slot(place) for place, _ in map(self._staged.pop, blocks)]
        self._free += slots
        if self._device.lane is not None and slots:
            self._last_reads.update(dict.fromkeys(slots, self._device.lane.mark()))

    def prefetch(self, upcoming: Iterable[KVBlock]) -> None:
        """Start loading `upcoming` blocks, in order of use, into the free staging slots. A block
        may come more than once: tables share blocks."""
        if self._device.lane is not None:
            for tier in self._tiers:
                tier.advance()
        room = len(self._free) + self.num_reserved
        if not room:
            return
        absent = filterfalse(self._staged.__contains__, upcoming)
        missing: dict[KVBlock, None] = {}
        while more := list(islice(absent, room - len(missing))):
            missing.update(dict.fromkeys(more))
        self._start(list(missing))

    def discard(self, block: KVBlock) -> None:
        """Forget a staged block, after its load has ended; nothing happens if it is not staged."""
        entry = self._staged.pop(block, None)
        if entry is not None:
            place, transfer = entry
            transfer.outlast()
            self._free.append(_slot(place))

    def copy_block(self, place: int, target: int) -> None:
        """Copy a staged block, as it is when it is not encoded, into another slot of the device."""
        if place < 0:
            assert self.codec is not None
            self.codec.decode(self._device.block(_slot(place)), self._device.block(target))
        else:
            self._device.copy_block(place, target)

    def clear(self) -> None:
        """Forget everything that is staged."""
        for block in list(self._staged):
            self.discard(block)

    def forget(self) -> None:
        """Hold no staging slots and no blocks, whatever the books say; for whoever gives the slots
        back himself, once no load is under way."""
        self._staged.clear()
        self._last_reads.clear()
        self._free.clear()

    def _start(self, blocks: Sequence[KVBlock]) -> None:
        """Start the loads of `blocks`, neighbouring records in one read."""
        per_read = self._blocks_per_read()
        for first in range(0, len(blocks), per_read):
            part = blocks[first : first + per_read]
            sources = [block.slots[DEVICE + 1] for block in part]
            if None not in sources:
                self._read(DEVICE + 1, part, sources)  # type: ignore[arg-type]
                continue
            by_rung: dict[int, list[KVBlock]] = {}
            for block in part:
                rung = block.copy_below(DEVICE)
                assert rung is not None, f"{block} has no copy below the device"
                by_rung.setdefault(rung, []).append(block)
            for rung, members in by_rung.items():
                self._read(rung, members, [block.slots[rung] for block in members])  # type: ignore[misc]

    def _blocks_per_read(self) -> int:
        num_bytes = READ_BYTES
        if self._device.lane is not None:
            least, most = LANE_READ_BYTES
            part = self._num_slots * self._device.block_bytes // READS_PER_RING
            num_bytes = min(max(least, part), most)
        return max(1, num_bytes // self._device.block_bytes)

    def _read(self, rung: int, blocks: Sequence[KVBlock], sources: Sequence[int]) -> None:
        """Start the loads of blocks that lie in slots `sources` of a rung."""
        stores = [store for block in blocks if (store := block.stores[rung]) is not DONE]
        for store in stores:
            store.wait()  # a copy still being written may not be relied on
        tier = self._tiers[rung]
        if not _is_attended(tier, self._device):
            self._load(tier, blocks, sources, is_encoded=False)
            return
        for is_encoded in (True, False):
            part = [
                (block, source)
                for block, source in zip(blocks, sources, strict=True)
                if tier.is_encoded(source) is is_encoded
            ]
            if part:
                self._load(tier, *zip(*part, strict=True), is_encoded=is_encoded)

    def _load(
        self, tier: Tier, blocks: Sequence[KVBlock], sources: Sequence[int], *, is_encoded: bool
    ) -> None:
        slots = self._take_slots(len(blocks))
        self._hold_loads(slots)
        issued = perf_counter()
        try:
            if is_encoded:
                memory = [self._device.block(slot)[: tier.record_bytes] for slot in slots]
                transfer = tier.read_encoded(sources, memory)
            else:
                transfer = tier.load(sources, self._device, slots)
        except BaseException:
            self._free += slots
            raise
        self._counters.loads += len(blocks)
        num_bytes = len(blocks) * tier.record_bytes
        self._counters.loaded_bytes += num_bytes
        if tracing.recorder is not None:
            layers = [block.layer for block in blocks]
            tracing.recorder.watch(LOAD, tier.name, layers, len(blocks), num_bytes, issued, transfer)
        places = [~slot for slot in slots] if is_encoded else slots
        self._staged.update(zip(blocks, zip(places, repeat(transfer)), strict=True))

    def _take_slots(self, count: int) -> list[int]:
        """Free staging slots, the ones last used first."""
        slots = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - len(slots) :]
        while len(slots) < count:
            slot = self._device.allocate()
            assert slot is not None, "the device tier gave staging's slots away"
            slots.append(slot)
        return slots

    def _hold_loads(self, slots: Sequence[int]) -> None:
        """Make the next loads wait until the device reads the slots no more: until it is past the
        attention over what was staged there before or, for a slot that staging did not have before,
        past everything that it was given so far."""
        lane = self._device.lane
        if lane is None:
            return
        marks = set(map(self._last_reads.pop, slots, repeat(None)))
        for mark in marks:
            (mark or lane.mark()).hold_loads()


def _slot(place: int) -> int:
    """The slot of a place."""
    return place if place >= 0 else ~place


def _is_attended(tier: Tier, device: DeviceTier) -> bool:
    """Whether what a tier encodes is attended on the device as it is."""
    return device.device.type == "cpu" and tier.codec is not None and tier.codec.is_attended
