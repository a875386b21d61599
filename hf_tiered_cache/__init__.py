"""Language models on contexts larger than the accelerator's memory, exactly, from plain
Hugging Face code:

    model.generate(**inputs, past_key_values=TieredCache())
"""

from hf_tiered_cache.attention import disable, enable, tiered_attention_forward
from hf_tiered_cache.cache import TieredCache
from hf_tiered_cache.config import TieredCacheConfig
from hf_tiered_cache.errors import (
    BackwardError,
    BlockStateError,
    CacheInUseError,
    ClosedCacheError,
    ConfigError,
    KernelUnavailableError,
    OutOfBlocksError,
    TieredCacheError,
    TierIOError,
    TornCacheError,
    UnsupportedInputError,
)
from hf_tiered_cache.kernels.ops import available_kernels
from hf_tiered_cache.metrics import CacheStats
from hf_tiered_cache.progress import generation_progress
from hf_tiered_cache.tracing import Trace, trace

__version__ = "0.1.0"

__all__ = [
    "BackwardError",
    "BlockStateError",
    "CacheInUseError",
    "CacheStats",
    "ClosedCacheError",
    "ConfigError",
    "KernelUnavailableError",
    "OutOfBlocksError",
    "TierIOError",
    "TieredCache",
    "TieredCacheConfig",
    "TieredCacheError",
    "TornCacheError",
    "Trace",
    "UnsupportedInputError",
    "available_kernels",
    "disable",
    "enable",
    "generation_progress",
    "tiered_attention_forward",
    "trace",
]
