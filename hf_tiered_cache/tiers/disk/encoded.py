"""Blocks that are encoded on disk, and those few as they are that cannot be: `EncodedTier`."""

import errno
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from hf_tiered_cache.errors import io_error
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.tiers.base import Tier, check_blocks
from hf_tiered_cache.tiers.disk.record_jobs import NOT_ENCODED
from hf_tiered_cache.transfers import AllOf, OrElse, Transfer


class EncodedTier(Tier):
    """`encoded`, a tier with a codec, and for blocks that it cannot encode another one, of whole
    blocks, on the same budget.

    A slot is one of `encoded`. Its block is there or, where a write found that it cannot be
    encoded, in a slot of the other tier, which is made for the first such block. (Of trained
    models none came across so far.) Such a block takes more than a slot: where the budget has no
    room for it its write fails with a TierIOError, and the block stays where it was.
    """

    def __init__(self, encoded: Tier, make_whole: Callable[[], Tier]) -> None:
        super().__init__(encoded.block_bytes, encoded.budget)
        self.codec = encoded.codec
        self.name = encoded.name
        self._encoded = encoded
        self._make_whole = make_whole
        self._whole: Tier | None = None
        self._whole_slots: dict[int, int] = {}  # by slot, of those that could not be encoded
        self._writes: dict[int, Transfer] = {}  # by slot; they may have ended

    def allocate(self) -> int | None:
        """A slot; see `Tier.allocate`."""
        return self._encoded.allocate()

    def free(self, slot: int) -> None:
        """Give a slot back, once its write has ended; see `Tier.free`."""
        self._end_writes([slot])
        self._encoded.free(slot)
        self._free_whole(slot)

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Load blocks; see `Tier.read`."""
        check_blocks(slots, out, self.block_bytes)
        self._encoded.check_allocated(slots)
        self._end_writes(slots)
        if self._whole_slots.keys().isdisjoint(slots):
            return self._encoded.read(slots, out)
        parts: tuple[list[int], list[int]] = ([], [])
        for index, slot in enumerate(slots):
            parts[slot in self._whole_slots].append(index)
        encoded, whole = parts
        assert self._whole is not None
        transfers = [
            self._whole.read(
                [self._whole_slots[slots[index]] for index in whole], [out[index] for index in whole]
            )
        ]
        if encoded:
            transfers.append(
                self._encoded.read(
                    [slots[index] for index in encoded], [out[index] for index in encoded]
                )
            )
        return AllOf(transfers)

    def is_encoded(self, slot: int) -> bool:
        """See `Tier.is_encoded`."""
        return slot not in self._whole_slots

    def read_encoded(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """See `Tier.read_encoded`."""
        return self._encoded.read_encoded(slots, out)

    def advance(self) -> None:
        """Store as they are those blocks of which it is known by now that they cannot be
        encoded."""
        for slot in [slot for slot, write in self._writes.items() if write.is_ready()]:
            del self._writes[slot]

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Store blocks; see `Tier.write`."""
        self.advance()
        first = self._encoded.write(slots, data)
        if not slots:
            return first
        self._end_writes(slots)
        for slot in slots:
            self._free_whole(slot)  # it is written over
        write = OrElse(first, NOT_ENCODED, lambda: self._write_whole(slots, data))
        self._writes.update(dict.fromkeys(slots, write))
        return write

    def drain(self) -> None:
        """Wait until no transfer is under way; see `Tier.drain`."""
        self._encoded.drain()
        self._end_writes(list(self._writes))
        if self._whole is not None:
            self._whole.drain()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        kept = set(slots)
        self._encoded.keep_only(kept)
        self._writes = {}  # they have ended
        self._whole_slots = {slot: at for slot, at in self._whole_slots.items() if slot in kept}
        if self._whole is not None:
            self._whole.keep_only(self._whole_slots.values())

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        self._encoded.check_allocated(slots)

    @property
    def where(self) -> str:
        """That of the encoded blocks."""
        return self._encoded.where

    @property
    def record_bytes(self) -> int:
        """Bytes of an encoded block."""
        return self._encoded.record_bytes

    @property
    def used_slots(self) -> int:
        """Slots handed out and not freed."""
        return self._encoded.used_slots

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots handed out, in both tiers."""
        return self._encoded.used_bytes + (self._whole.used_bytes if self._whole else 0)

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget, by both tiers."""
        return self._encoded.committed_bytes + (self._whole.committed_bytes if self._whole else 0)

    def num_free(self) -> int:
        """Slots that could still be allocated."""
        return self._encoded.num_free()

    def close(self) -> None:
        """Close both tiers; see `Tier.close`."""
        self._encoded.close()
        if self._whole is not None:
            self._whole.close()

    def _write_whole(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Store blocks of which one at least cannot be encoded. Raises TierIOError where there is
        no room."""
        if len(slots) > 1:  # which one it is comes out when each is written alone
            return AllOf(
                [
                    OrElse(
                        self._encoded.write([slot], [block]),
                        NOT_ENCODED,
                        partial(self._write_whole, [slot], [block]),
                    )
                    for slot, block in zip(slots, data, strict=True)
                ]
            )
        if self._whole is None:
            self._whole = self._make_whole()
        at = self._whole.allocate()
        if at is None:
            raise io_error(
                errno.ENOSPC,
                f"a block cannot be packed, and the {self.name} tier has no"
                f" {format_bytes(self.block_bytes)} left to keep it as it is: raise"
                f" {self.budget.knob}",
            )
        self._whole_slots[slots[0]] = at
        return self._whole.write([at], data)

    def _free_whole(self, slot: int) -> None:
        at = self._whole_slots.pop(slot, None)
        if at is not None:
            assert self._whole is not None
            self._whole.free(at)

    def _end_writes(self, slots: Sequence[int]) -> None:
        """Wait until it is known where the blocks of the slots are."""
        for slot in self._writes.keys() & set(slots):
            self._writes.pop(slot).outlast()
