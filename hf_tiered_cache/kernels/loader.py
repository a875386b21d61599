"""Which kernels there are, which one runs, and why the others do not.

The compiled core (`hf_tiered_cache._C`) holds the same kernels built for several instruction
sets; "reference" is plain torch and always there. The best one the processor can run is chosen
once. `HF_TIERED_CACHE_KERNEL` or `use_kernel` forces one.

Tensors on a CUDA device go to the kernels of `hf_tiered_cache._cuda`, if it was built and finds
that device; tensors anywhere else to the reference. To force "reference" forces it everywhere.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib import import_module

import torch
from torch import Tensor
from transformers.utils import logging

from hf_tiered_cache.compiled import compiled_core
from hf_tiered_cache.errors import KernelUnavailableError
from hf_tiered_cache.kernels.cores import Core, CpuCore, CudaCore

logger = logging.get_logger(__name__)

REFERENCE = "reference"
ENVIRONMENT_VARIABLE = "HF_TIERED_CACHE_KERNEL"
CUDA_CAPABILITY = (8, 0)  # the oldest that the CUDA core is compiled for (setup.py)
BUILD_COMMAND = "pip install --no-build-isolation -e . (or: python setup.py build_ext --inplace)"


class Kernel:
    """A chosen kernel: its name and, if compiled, the core that runs it."""

    __slots__ = ("core", "name")

    def __init__(self, name: str, core: Core | None) -> None:
        self.name = name
        self.core = core


_REFERENCE_KERNEL = Kernel(REFERENCE, None)
_forced: ContextVar[Kernel | None] = ContextVar("hf_tiered_cache_kernel", default=None)


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
    return Kernel(name, CpuCore(core, numbers[name]))


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
    """The kernel for the CPU: the one forced by `use_kernel`, else the default."""
    return _forced.get() or default_kernel()


@lru_cache(maxsize=1)
def cuda_core() -> tuple[CudaCore | None, str]:
    """The CUDA core, or None and the reason why it cannot run here."""
    try:
        module = import_module("hf_tiered_cache._cuda")
    except ImportError as error:
        return None, f"the CUDA core was not built ({error}); install again where nvcc is found"
    num_devices, reason = module.device_count()
    if num_devices == 0:
        return None, reason
    for device in range(num_devices):
        found = module.device_properties(device)
        if found["capability"] < CUDA_CAPABILITY:
            return None, (
                f"device {device} ({found['name']}) has compute capability {found['capability']},"
                f" expected {CUDA_CAPABILITY} or later; hide it (CUDA_VISIBLE_DEVICES) if another"
                " one is meant"
            )
    return CudaCore(module), ""


def missing_core(device: torch.device) -> str:
    """Why no compiled core works on tensors of this device; empty if one does."""
    if device.type == "cpu":
        return compiled_core()[1]
    if device.type == "cuda":
        return cuda_core()[1]
    return "compiled kernels are for cpu and cuda"


@lru_cache(maxsize=1)
def _environment_says_reference() -> bool:
    """As it was at the first call of the process: to look is a tenth of a layer's Python."""
    return os.environ.get(ENVIRONMENT_VARIABLE) == REFERENCE


@cache
def _device_kernel(device_type: str) -> Kernel:
    """The kernel for tensors that are not on the CPU; says once why it is not a compiled one."""
    core = cuda_core()[0] if device_type == "cuda" else None
    if core is None:
        why = missing_core(torch.device(device_type))
        logger.warning_once(
            f"hf_tiered_cache runs on plain torch on {device_type}, which is slower: {why}."
        )
        return _REFERENCE_KERNEL
    return Kernel("cuda", core)


def kernel_for(tensor: Tensor) -> Kernel:
    """The kernel that works on tensors beside this one."""
    if tensor.is_cpu:
        return _forced.get() or default_kernel()
    return _kernel_on(tensor.device.type)


def _kernel_on(device_type: str) -> Kernel:
    if device_type == "cpu":
        return chosen_kernel()
    forced = _forced.get()
    is_reference = _environment_says_reference() if forced is None else forced.name == REFERENCE
    return _REFERENCE_KERNEL if is_reference else _device_kernel(device_type)


def backend(device: torch.device | str = "cpu") -> str:
    """Name of the kernel that runs attention on a device, e.g. "avx512", "cuda", "reference"."""
    return _kernel_on(torch.device(device).type).name


@contextmanager
def use_kernel(kernel: str | Kernel) -> Iterator[None]:
    """Force one kernel inside the `with`, for this thread. Raises KernelUnavailableError."""
    token = _forced.set(kernel_named(kernel) if isinstance(kernel, str) else kernel)
    try:
        yield
    finally:
        _forced.reset(token)
