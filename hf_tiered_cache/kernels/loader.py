"""Which kernels there are, which one runs, and why the others do not.

The compiled core (`hf_tiered_cache._C`) holds the same kernels built for several instruction
sets; "reference" is plain torch and always there. The best one the processor can run is chosen
once. `HF_TIERED_CACHE_KERNEL` or `use_kernel` forces one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

from transformers.utils import logging

from hf_tiered_cache.errors import KernelUnavailableError

logger = logging.get_logger(__name__)

REFERENCE = "reference"
ENVIRONMENT_VARIABLE = "HF_TIERED_CACHE_KERNEL"
BUILD_COMMAND = "pip install --no-build-isolation -e . (or: python setup.py build_ext --inplace)"

_forced: ContextVar[str | None] = ContextVar("hf_tiered_cache_kernel", default=None)


class Kernel:
    """A chosen kernel: its name and, if compiled, the core and its number there."""

    __slots__ = ("core", "name", "number")

    def __init__(self, name: str, core: ModuleType | None, number: int) -> None:
        self.name = name
        self.core = core
        self.number = number


_REFERENCE_KERNEL = Kernel(REFERENCE, None, -1)


@lru_cache(maxsize=1)
def compiled_core() -> tuple[ModuleType | None, str]:
    """The compiled core, or None and the reason why it could not be imported."""
    try:
        return import_module("hf_tiered_cache._C"), ""
    except ImportError as error:
        return None, str(error)


@lru_cache(maxsize=1)
def unavailable_kernels() -> dict[str, str]:
    """Every known kernel that cannot run here, with the reason."""
    core, reason = compiled_core()
    if core is None:
        return {"compiled kernels": f"the core was not built ({reason}); build: {BUILD_COMMAND}"}
    return {name: reason for name, reason in core.kernels() if reason}


@lru_cache(maxsize=1)
def available_kernels() -> tuple[str, ...]:
    """Kernels that can run here, the preferred one first."""
    core, _ = compiled_core()
    names = [] if core is None else [name for name, reason in core.kernels() if not reason]
    return (*names, REFERENCE)


@cache
def kernel_named(name: str) -> Kernel:
    """The kernel of that name. Raises KernelUnavailableError with what is there and why."""
    if name == REFERENCE:
        return _REFERENCE_KERNEL
    core, _ = compiled_core()
    if core is None or name not in available_kernels():
        missing = "; ".join(f"{key}: {why}" for key, why in unavailable_kernels().items())
        raise KernelUnavailableError(
            f"kernel {name!r} was forced but cannot run here. "
            f"Available: {', '.join(available_kernels())}. Unavailable: {missing or 'none'}."
        )
    numbers = {known: number for number, (known, _) in enumerate(core.kernels())}
    return Kernel(name, core, numbers[name])


@lru_cache(maxsize=1)
def default_kernel() -> Kernel:
    """The kernel named in the environment, else the best one; says once if it is not compiled."""
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        return kernel_named(name)
    core, reason = compiled_core()
    if core is None:
        logger.warning_once(
            f"hf_tiered_cache runs on plain torch, which is slower: its compiled core is missing "
            f"({reason}). Build it with: {BUILD_COMMAND}"
        )
    return kernel_named(available_kernels()[0])


def chosen_kernel() -> Kernel:
    """The kernel for this call: the one forced by `use_kernel`, else the default."""
    name = _forced.get()
    return default_kernel() if name is None else kernel_named(name)


def backend() -> str:
    """Name of the kernel that runs CPU attention, e.g. "avx512" or "reference"."""
    return chosen_kernel().name


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Force one kernel inside the `with`, for this thread. Raises KernelUnavailableError."""
    kernel_named(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
