"""Which columns of a table attention reads: policies, a file each. What is imported here can be
asked for by name."""

from hf_tiered_cache.blocks.selection.all import ALL, All
from hf_tiered_cache.blocks.selection.base import Columns, SelectionPolicy
from hf_tiered_cache.blocks.selection.resident_only import RESIDENT_ONLY, ResidentOnly

__all__ = ["ALL", "RESIDENT_ONLY", "All", "Columns", "ResidentOnly", "SelectionPolicy"]
