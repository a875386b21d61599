"""Whose turn it is to leave a rung: policies, a file each. What is imported here
can be asked for by name."""

from hf_tiered_cache.blocks.demotion.base import DemotionPolicy
from hf_tiered_cache.blocks.demotion.by_age import ByAge
from hf_tiered_cache.blocks.demotion.sinks_and_recent import SinksAndRecent

__all__ = ["ByAge", "DemotionPolicy", "SinksAndRecent"]
