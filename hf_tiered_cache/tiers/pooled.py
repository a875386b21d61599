"""Tiers whose slots come from a `SlotPool`: what is left to a subclass is moving bytes."""

from collections.abc import Iterable, Sequence

import torch

from hf_tiered_cache.errors import ClosedCacheError
from hf_tiered_cache.tiers.base import Budget, Tier, check_blocks
from hf_tiered_cache.tiers.slots import SlotPool


class PooledTier(Tier):
    """Slots, lowest first, within the budget. A subclass adds `read` and `write`, which are done
    when they return (else `drain` as well), and what else it must forget in `free` and `close`.

    It may put a pool that grows in other steps in the place of `_pool`.
    """

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        super().__init__(block_bytes, budget)
        self._pool = SlotPool(block_bytes, budget, self.name)
        self._is_closed = False

    def allocate(self) -> int | None:
        """A slot; see `Tier.allocate`."""
        self._check_open()
        return self._pool.allocate()

    def free(self, slot: int) -> None:
        """Give a slot back; its bytes stay committed for the next one."""
        self._check_open()
        self._pool.free(slot)

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        self._check_open()
        self._pool.check(slots)

    def check_move(self, slots: Sequence[int], blocks: Sequence[torch.Tensor]) -> None:
        """Raise what `read` and `write` raise before anything is moved."""
        self._check_open()
        check_blocks(slots, blocks, self.block_bytes)
        self._pool.check(slots)

    def drain(self) -> None:
        """Nothing to do: copies are done when `read` and `write` return."""
        self._check_open()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        self._check_open()
        self._pool.keep_only(slots)

    @property
    def used_slots(self) -> int:
        """Slots handed out and not freed."""
        return self._pool.num_used

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget."""
        return self._pool.committed_bytes

    def num_free(self) -> int:
        """Slots that could still be allocated."""
        return self._pool.num_free()

    def close(self) -> None:
        """Give the budget back. Idempotent."""
        self._is_closed = True
        self._pool.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedCacheError(f"the {self.name} tier is closed; make a new cache")
