"""A lower tier as a device with a copy lane sees it.

Blocks in pinned memory go over the lane as they lie. Others, pageable ones and disk records, pass
through a ring of pinned bounce slots: two transfers, one behind the other.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from hf_tiered_cache.devices.copy_lane import CopyLane
from hf_tiered_cache.tiers.base import Tier, check_blocks
from hf_tiered_cache.tiers.host import HostTier
from hf_tiered_cache.transfers import AllOf, Then, Transfer


class BounceRing:
    """Slots of `memory` that blocks pass through, given back when their transfer has ended."""

    def __init__(self, memory: HostTier, num_slots: int) -> None:
        """Takes the slots, for which the memory's budget has room, at once. Raises TierIOError when
        the system has no memory."""
        self._memory = memory
        # Those that may still hold slots, in order of their start. All others are free: that is
        # worked out and not kept, so that no interrupt can hand out a slot twice.
        self._bounces: dict[Then, list[int]] = {}
        self.num_slots = num_slots
        for number in range(num_slots):
            slot = memory.allocate()
            assert slot == number, "the ring has its memory for itself"

    def pass_through(
        self,
        num_blocks: int,
        first: Callable[[list[torch.Tensor]], Transfer],
        second: Callable[[list[torch.Tensor]], Transfer],
    ) -> Transfer:
        """Fill bounce slots by `first`, then empty them by `second`; at most `num_slots` blocks."""
        slots = self._take(num_blocks)
        bounced = [self._memory.block(slot) for slot in slots]
        bounce = Then(first(bounced), lambda: second(bounced))
        self._bounces[bounce] = slots
        return bounce

    def drain(self) -> None:
        """Wait until nothing passes through any more."""
        while self._bounces:
            self._wait_for_oldest()

    @property
    def is_pinned(self) -> bool:
        """Whether the memory is pinned; where that was refused, copies are slower."""
        return self._memory.is_pinned(self.num_slots - 1)

    @property
    def slab(self) -> torch.Tensor:
        """uint8 `[num_slots, block_bytes]`, all slots; nobody may be using them."""
        return self._memory.slab[: self.num_slots]

    def close(self) -> None:
        """Give the memory back. Nothing may be passing through. Idempotent."""
        self._memory.close()

    def advance(self) -> None:
        """Begin the second transfers that can begin, take back the slots of those that ended."""
        for bounce in [one for one in self._bounces if one.is_ready()]:
            del self._bounces[bounce]

    def _take(self, num_slots: int) -> list[int]:
        assert num_slots <= self.num_slots, "more blocks than the ring has slots"
        if len(self._free()) < num_slots:
            self.advance()
        while len(self._free()) < num_slots:
            self._wait_for_oldest()
        return self._free()[:num_slots]

    def _free(self) -> list[int]:
        held = {slot for slots in self._bounces.values() for slot in slots}
        return [slot for slot in range(self.num_slots) if slot not in held]

    def _wait_for_oldest(self) -> None:
        bounce = next(iter(self._bounces))
        bounce.outlast()
        del self._bounces[bounce]


class DeviceSideTier(Tier):
    """`tier`, whose blocks come from and go to a device over a lane; see the module."""

    def __init__(self, tier: Tier, lane: CopyLane, ring: BounceRing) -> None:
        super().__init__(tier.block_bytes, tier.budget)
        self.tier = tier
        self.name = tier.name
        self.is_read_only = tier.is_read_only  # type: ignore[misc]
        self._lane = lane
        self._ring = ring
        # By slot, the last transfer of its kind; it may have ended. Each kind keeps its order, so
        # those before have ended with it, but a load and who else reads end as they like.
        self._loads: dict[int, Transfer] = {}
        self._readers: dict[int, Transfer] = {}
        self._writers: dict[int, Transfer] = {}

    def allocate(self) -> int | None:
        """A slot; see `Tier.allocate`."""
        return self.tier.allocate()

    def free(self, slot: int) -> None:
        """Give a slot back, once its transfers have ended: who gets it next may overwrite it."""
        for transfers in (self._loads, self._readers, self._writers):
            if slot in transfers:
                transfers.pop(slot).outlast()
        self.tier.free(slot)

    def hold_slots(self, slots: Sequence[int], until: Transfer) -> None:
        """Let nobody overwrite the slots before `until`, which reads them, has ended. Readers end
        in the order in which they are told here."""
        for slot in slots:
            self._readers[slot] = until

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Load blocks into memory of the device, or of the CPU; see `Tier.read`."""
        if not out or not self._lane.carries(out[0]):
            return self.tier.read(slots, out)
        check_blocks(slots, out, self.block_bytes)
        self._end_writes(slots)
        pinned = self._pinned(slots)
        if pinned is not None:
            transfer = self._lane.load(pinned, out)
            self._loads.update(dict.fromkeys(slots, transfer))
            return transfer

        def load(part: slice) -> Transfer:
            return self._ring.pass_through(
                len(slots[part]),
                lambda bounced: self.tier.read(slots[part], bounced),
                lambda bounced: self._lane.load(bounced, out[part], self._ring.is_pinned),
            )

        return self._in_parts(len(slots), load)

    def advance(self) -> None:
        """Begin the second steps that can begin; see `Tier.advance`."""
        self._ring.advance()

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Store blocks that lie on the device, or in memory of the CPU; see `Tier.write`."""
        if not data or not self._lane.carries(data[0]):
            return self.tier.write(slots, data)
        check_blocks(slots, data, self.block_bytes)
        self.check_allocated(slots)

        def store(part: slice) -> Transfer:
            return self._ring.pass_through(
                len(slots[part]),
                lambda bounced: self._lane.store(data[part], bounced, self._ring.is_pinned),
                lambda bounced: self.tier.write(slots[part], bounced),
            )

        pinned = self._pinned(slots)
        if pinned is not None:
            transfer = self._lane.store(data, pinned)
        else:
            transfer = self._in_parts(len(slots), store)
        for slot in slots:
            self._writers[slot] = transfer
        return transfer

    def drain(self) -> None:
        """Wait until no transfer is under way; see `Tier.drain`."""
        self.tier.drain()  # second steps that were interrupted are begun again
        self._ring.drain()
        self._lane.settle()
        self.tier.drain()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        self._loads, self._readers, self._writers = {}, {}, {}  # they have ended
        self.tier.keep_only(slots)

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        self.tier.check_allocated(slots)

    @property
    def where(self) -> str:
        """That of the tier."""
        return self.tier.where

    @property
    def record_bytes(self) -> int:
        """That of the tier."""
        return self.tier.record_bytes

    @property
    def used_bytes(self) -> int:
        """That of the tier."""
        return self.tier.used_bytes

    @property
    def used_slots(self) -> int:
        """Slots handed out and not freed."""
        return self.tier.used_slots

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget."""
        return self.tier.committed_bytes

    def num_free(self) -> int:
        """Slots that could still be allocated."""
        return self.tier.num_free()

    def close(self) -> None:
        """Close the tier below and the ring, once no copy touches their memory. What passes through
        ends before. Idempotent, and may be repeated after an interrupt."""
        self._lane.settle()
        self.tier.close()
        self._ring.drain()
        self._lane.settle()
        self._ring.close()

    def _end_writes(self, slots: Sequence[int]) -> None:
        """Wait until the slots hold what was last stored there."""
        if not self._writers.keys().isdisjoint(slots):
            for slot in self._writers.keys() & set(slots):
                self._writers.pop(slot).outlast()

    def _pinned(self, slots: Sequence[int]) -> list[torch.Tensor] | None:
        """The blocks of the slots, if the lane can copy them as they lie."""
        return None

    def _in_parts(self, num_blocks: int, start: Callable[[slice], Transfer]) -> Transfer:
        """As many transfers as it takes for each to fit into the ring."""
        step = self._ring.num_slots
        parts = [start(slice(i, i + step)) for i in range(0, num_blocks, step)]
        return parts[0] if len(parts) == 1 else AllOf(parts)


class DeviceSideMemoryTier(DeviceSideTier):
    """A tier in memory as a device with a copy lane sees it: its pinned blocks need no ring."""

    has_addresses = True

    @property
    def slab(self) -> torch.Tensor:
        """See `Tier.slab`."""
        return self.tier.slab

    def load(self, slots: Sequence[int], memory: Tier, targets: Sequence[int]) -> Transfer:
        """Load blocks into slots of a tier in memory, in one copy where they lie in pinned memory;
        see `Tier.load`."""
        if not slots or not self._lane.carries(memory.slab) or not self._are_pinned(slots):
            return super().load(slots, memory, targets)
        self.check_allocated(slots)
        self._end_writes(slots)
        transfer = self._lane.load_rows(self.slab, slots, memory.slab, targets)
        self._loads.update(dict.fromkeys(slots, transfer))
        return transfer

    def _pinned(self, slots: Sequence[int]) -> list[torch.Tensor] | None:
        self.check_allocated(slots)
        return list(map(self.block, slots)) if self._are_pinned(slots) else None

    def _are_pinned(self, slots: Sequence[int]) -> bool:
        return self.tier.is_pinned(max(slots))  # memory is pinned from the first slot on


def behind_lane(tier: Tier, lane: CopyLane, ring: BounceRing) -> DeviceSideTier:
    """`tier` as a device with a copy lane sees it."""
    kind = DeviceSideMemoryTier if tier.has_addresses else DeviceSideTier
    return kind(tier, lane, ring)
