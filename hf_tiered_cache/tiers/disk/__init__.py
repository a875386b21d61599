"""Blocks in files: records with checksums, the threads that move them, what to do about errors."""

from hf_tiered_cache.tiers.disk.tier import DiskTier

__all__ = ["DiskTier"]
