"""Tiers whose blocks can be addressed: one slab, one view per block.

On the CPU the slab is virtual memory as large as the budget, of which only what is touched becomes
physical.
"""

import contextlib
import mmap
import platform
from collections.abc import Iterable, Sequence

import torch

from hf_tiered_cache.errors import ClosedCacheError, ConfigError
from hf_tiered_cache.tiers.base import DONE, Budget, Tier, Transfer, check_block_bytes, check_blocks
from hf_tiered_cache.tiers.slots import SlotPool

HUGE_PAGE_BYTES = 2 * 1024 * 1024

# Missing from the mmap module before Python 3.13; the value is that of the machines named.
_MAP_NORESERVE = getattr(
    mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64", "riscv64") else 0
)


class MemoryTier(Tier):
    """Blocks in a slab, uint8 `[max_slots, block_bytes]`; every block 4 KiB aligned on the CPU.

    Slots are handed out lowest first, so that physical memory stays near what is used; freed slots
    keep theirs. With `poison` (for tests) a freed slot is filled with 0xFF, which reads as NaN in
    every float dtype. A subclass sets `_slab`, `_mapping` (None where torch allocated the slab) and
    `_pool`.
    """

    _slab: torch.Tensor | None
    _mapping: mmap.mmap | None
    _pool: SlotPool

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        """Raises ConfigError when `block_bytes` is no multiple of 4096."""
        check_block_bytes(block_bytes)
        self.block_bytes = block_bytes
        self.budget = budget
        self.poison = False

    @property
    def slab(self) -> torch.Tensor:
        """uint8 `[max_slots, block_bytes]`, a block a row. Raises ClosedCacheError once closed."""
        if self._slab is None:
            raise ClosedCacheError(f"the {self.name} tier is closed; make a new cache")
        return self._slab

    def block(self, slot: int) -> torch.Tensor:
        """A view of the block in `slot`: uint8 `[block_bytes]`."""
        return self.slab[slot]

    def blocks(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """`block` of each slot. Raises BlockStateError for one that is not allocated."""
        self.check_allocated(slots)
        return [self.slab[slot] for slot in slots]

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        self._check_open()
        self._pool.check(slots)

    def allocate(self) -> int | None:
        """A slot; see `Tier.allocate`."""
        self._check_open()
        return self._pool.allocate()

    def free(self, slot: int) -> None:
        """Give a slot back; its physical memory stays for the next one."""
        slab = self.slab
        self._pool.free(slot)
        if self.poison:
            slab[slot].fill_(0xFF)

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Copy blocks out of the slab, at once."""
        self._check_open()
        check_blocks(slots, out, self.block_bytes)
        for block, stored in zip(out, self.blocks(slots), strict=True):
            block.copy_(stored)
        return DONE

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Copy blocks into the slab, at once."""
        self._check_open()
        check_blocks(slots, data, self.block_bytes)
        for stored, block in zip(self.blocks(slots), data, strict=True):
            stored.copy_(block)
        return DONE

    def drain(self) -> None:
        """Nothing to do: copies are done when `read` and `write` return."""
        self._check_open()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        slab = self.slab
        for slot in self._pool.keep_only(slots):
            if self.poison:
                slab[slot].fill_(0xFF)

    @property
    def used_slots(self) -> int:
        """Slots handed out and not freed."""
        return self._pool.num_used

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget; on the CPU physical memory may be up to a huge page more."""
        return self._pool.committed_bytes

    def num_free(self) -> int:
        """Slots that could still be allocated."""
        return self._pool.num_free()

    @property
    def can_shrink(self) -> bool:
        """Whether memory can be returned to the budget before the tier is closed."""
        return self._mapping is not None

    def shrink(self, num_slots: int) -> None:
        """Return the memory behind the first `num_slots` slots, none of which may be in use, to the
        budget and to the system. Raises BlockStateError; for tiers that `can_shrink`."""
        assert self._mapping is not None, "this memory comes and goes as a whole"
        stop = self.committed_bytes
        self._pool.shrink(num_slots)
        start = -(-num_slots * self.block_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        if start < stop:
            base = torch.frombuffer(self._mapping, dtype=torch.uint8, count=1).data_ptr()
            offset = self.slab.data_ptr() - base
            self._mapping.madvise(mmap.MADV_DONTNEED, offset + start, stop - start)

    def _give_back(self) -> None:
        """Return the memory at once, even while views of the slab are alive (they read zeros)."""
        self._slab = None
        if self._mapping is not None:
            # Not mapping.close(): torch.frombuffer does not lock the mapping, so a view that is
            # still alive would point to nothing. The addresses go with the last view.
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._mapping = None

    def _check_open(self) -> None:
        _ = self.slab


def virtual_slab(
    num_slots: int, block_bytes: int, budget_name: str
) -> tuple[mmap.mmap | None, torch.Tensor]:
    """Map uint8 `[num_slots, block_bytes]` on a huge page boundary, physical where touched.

    Raises ConfigError, naming the knob, when there are not so many addresses.
    """
    with torch.inference_mode(False):  # it is written to outside of inference mode as well
        if num_slots == 0:
            return None, torch.empty((0, block_bytes), dtype=torch.uint8)
        num_bytes = num_slots * block_bytes
        try:
            mapping = mmap.mmap(
                -1,
                num_bytes + HUGE_PAGE_BYTES,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot map {num_bytes} bytes of memory ({error}); lower {budget_name}_bytes"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
                mapping.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
        slab = torch.frombuffer(
            mapping, dtype=torch.uint8, count=num_bytes, offset=-address % HUGE_PAGE_BYTES
        )
        return mapping, slab.view(num_slots, block_bytes)
