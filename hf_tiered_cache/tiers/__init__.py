"""Where blocks lie: slots and bytes, and nothing else.

A tier hands out slots, stores and loads the bytes of one block per slot, and gives everything back
on close. It knows no layers, tokens or policies: those are the block and offload managers'.
"""

from hf_tiered_cache.tiers.base import Budget, Surroundings, Tier
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.tiers.disk import DiskTier
from hf_tiered_cache.tiers.host import HostTier
from hf_tiered_cache.tiers.memory import MemoryTier
from hf_tiered_cache.tiers.pooled import PooledTier

__all__ = [
    "Budget",
    "DeviceTier",
    "DiskTier",
    "HostTier",
    "MemoryTier",
    "PooledTier",
    "Surroundings",
    "Tier",
]
