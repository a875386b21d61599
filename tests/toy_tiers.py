"""Tiers as somebody else might write them."""

from hf_tiered_cache.tiers import PooledTier
from hf_tiered_cache.tiers.memory import MemoryTier, virtual_slab
from hf_tiered_cache.transfers import DONE


class Shelf(MemoryTier, name="shelf"):
    """Memory like any other."""

    def __init__(self, block_bytes, budget):
        super().__init__(block_bytes, budget)
        num_slots = budget.limit_bytes // block_bytes
        self._mapping, self._slab = virtual_slab(num_slots, block_bytes, budget.knob)

    @property
    def where(self):
        return "on the wall"

    def close(self):
        super().close()
        self._give_back()


class Drawer(PooledTier, name="drawer"):
    """Blocks without addresses."""

    def __init__(self, block_bytes, budget):
        super().__init__(block_bytes, budget)
        self.blocks = {}

    def write(self, slots, data):
        self.check_move(slots, data)
        self.blocks |= {slot: block.clone() for slot, block in zip(slots, data, strict=True)}
        return DONE

    def read(self, slots, out):
        self.check_move(slots, out)
        for slot, block in zip(slots, out, strict=True):
            block.copy_(self.blocks[slot])
        return DONE
