"""The compiled core, where it was built."""

from functools import lru_cache
from importlib import import_module
from types import ModuleType


@lru_cache(maxsize=1)
def compiled_core() -> tuple[ModuleType | None, str]:
    """`hf_tiered_cache._C`, or None and the reason why it could not be imported."""
    try:
        return import_module("hf_tiered_cache._C"), ""
    except ImportError as error:
        return None, str(error)
