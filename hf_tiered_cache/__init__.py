"""Language models on contexts larger than the accelerator's memory, exactly, from plain
Hugging Face code:

    model.generate(**inputs, past_key_values=TieredCache())

The public names other than errors are loaded when they are first used: importing the package loads
neither torch nor transformers.
"""

import importlib
import typing

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
from hf_tiered_cache.integration.registration import follow_models

if typing.TYPE_CHECKING:  # what editors and type checkers read; a test compares it with _ROOMS
    from hf_tiered_cache.config import TieredCacheConfig
    from hf_tiered_cache.integration.attention import disable, enable, tiered_attention_forward
    from hf_tiered_cache.integration.cache import TieredCache
    from hf_tiered_cache.integration.progress import generation_progress
    from hf_tiered_cache.integration.reuse import Reuse, reuse
    from hf_tiered_cache.integration.speculate import speculate, speculating
    from hf_tiered_cache.integration.warm import warm
    from hf_tiered_cache.kernels.ops import available_kernels
    from hf_tiered_cache.observe.metrics import CacheStats
    from hf_tiered_cache.observe.tracing import Trace, trace
    from hf_tiered_cache.store.block_store import BlockStore, StoreStats

__version__ = "0.1.0"

__all__ = [
    "BackwardError",
    "BlockStateError",
    "BlockStore",
    "CacheInUseError",
    "CacheStats",
    "ClosedCacheError",
    "ConfigError",
    "KernelUnavailableError",
    "OutOfBlocksError",
    "Reuse",
    "StoreStats",
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
    "reuse",
    "speculate",
    "speculating",
    "tiered_attention_forward",
    "trace",
    "warm",
]

# Where a public name that is not here yet is loaded from.
_ROOMS = {
    "Reuse": "integration.reuse",
    "reuse": "integration.reuse",
    "BlockStore": "store.block_store",
    "StoreStats": "store.block_store",
    "CacheStats": "observe.metrics",
    "TieredCache": "integration.cache",
    "TieredCacheConfig": "config",
    "Trace": "observe.tracing",
    "available_kernels": "kernels.ops",
    "disable": "integration.attention",
    "enable": "integration.attention",
    "generation_progress": "integration.progress",
    "speculate": "integration.speculate",
    "speculating": "integration.speculate",
    "tiered_attention_forward": "integration.attention",
    "trace": "observe.tracing",
    "warm": "integration.warm",
}


if not typing.TYPE_CHECKING:  # to a type checker, a module with __getattr__ has every name

    def __getattr__(name: str) -> object:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        room = importlib.import_module(f"{__name__}.{_ROOMS[name]}")
        globals()[name] = value = getattr(room, name)  # from now on found without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


follow_models()
