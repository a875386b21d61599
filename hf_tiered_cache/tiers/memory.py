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
from hf_tiered_cache.tiers.base import Budget
from hf_tiered_cache.tiers.pooled import PooledTier
from hf_tiered_cache.transfers import DONE, Transfer

HUGE_PAGE_BYTES = 2 * 1024 * 1024

# Missing from the mmap module before Python 3.13; the value is that of the machines named.
_MAP_NORESERVE = getattr(
    mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64", "riscv64") else 0
)


class MemoryTier(PooledTier):
    """Blocks in a slab, uint8 `[max_slots, block_bytes]`; every block 4 KiB aligned on the CPU.

    Slots are handed out lowest first, so that physical memory stays near what is used; freed slots
    keep theirs. With `poison` (for tests) a freed slot is filled with 0xFF, which reads as NaN in
    every float dtype. A subclass sets `_slab`, `_mapping` (None where torch allocated the slab) and
    `_pool`.
    """

    has_addresses = True

    _slab: torch.Tensor | None
    _mapping: mmap.mmap | None

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        super().__init__(block_bytes, budget)
        self.poison = False

    @property
    def slab(self) -> torch.Tensor:
        """uint8 `[max_slots, block_bytes]`, a block a row. Raises ClosedCacheError once closed."""
        if self._slab is None:
            raise ClosedCacheError(f"the {self.name} tier is closed; make a new cache")
        return self._slab

    def free(self, slot: int) -> None:
        """Give a slot back; its physical memory stays for the next one."""
        slab = self.slab
        self._pool.free(slot)
        if self.poison:
            slab[slot].fill_(0xFF)

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Copy blocks out of the slab, at once."""
        self.check_move(slots, out)
        for block, stored in zip(out, map(self.block, slots), strict=True):
            block.copy_(stored)
        return DONE

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Copy blocks into the slab, at once."""
        self.check_move(slots, data)
        for stored, block in zip(map(self.block, slots), data, strict=True):
            stored.copy_(block)
        return DONE

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        slab = self.slab
        for slot in self._pool.keep_only(slots):
            if self.poison:
                slab[slot].fill_(0xFF)

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
    num_slots: int, block_bytes: int, knob: str
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
                f"cannot map {num_bytes} bytes of memory ({error}); lower {knob}"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
                mapping.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
        slab = torch.frombuffer(
            mapping, dtype=torch.uint8, count=num_bytes, offset=-address % HUGE_PAGE_BYTES
        )
        return mapping, slab.view(num_slots, block_bytes)
