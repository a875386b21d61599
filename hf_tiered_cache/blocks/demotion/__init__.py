"""Whose turn it is to leave a rung: policies, a file each. What is imported here
can be asked for by name."""

from hf_tiered_cache.blocks.demotion.base import DemotionPolicy
from hf_tiered_cache.blocks.demotion.by_age import ByAge

__all__ = ["ByAge", "DemotionPolicy"]
