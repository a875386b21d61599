"""Which block leaves a full store: `EvictionPolicy` and its kinds, by name."""

from hf_tiered_cache.store.policies.base import EvictionPolicy
from hf_tiered_cache.store.policies.fifo import FIFO
from hf_tiered_cache.store.policies.lru import LRU
from hf_tiered_cache.store.policies.s3fifo import S3FIFO

__all__ = ["FIFO", "LRU", "S3FIFO", "EvictionPolicy"]
