"""The device that attention runs on: `Device`, and the kinds of it that are known.

Where that is the CPU, its memory is the host's and everything happens at once. A CUDA device has a
copy lane, pinned host memory and, where the CUDA core was built, a CPU lane. (`kernels` decides
which kernel runs on a device, `tiers.device` how its memory is allocated.)
"""

from abc import ABC, abstractmethod
from types import ModuleType
from typing import ClassVar

import torch
from transformers.utils import logging

from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.cpu_lane import CpuLane
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import flash, ops
from hf_tiered_cache.kernels.loader import chosen_kernel, cuda_core
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.registry import Registered
from hf_tiered_cache.tiers import numa
from hf_tiered_cache.tiers.cuda_lane import CudaFlags, CudaLane
from hf_tiered_cache.tiers.lane import CopyLane
from hf_tiered_cache.tiers.pinning import CudaPinning, Pinning

logger = logging.get_logger(__name__)


class Device(Registered, ABC, kind="device"):
    """What one cache and its forks use of one torch device. Registered by that device's type.

    What is said here is said of a device in the host's own memory, which does at once what it is
    given; any other overrides it.
    """

    is_host: ClassVar[bool] = True
    """Whether its memory is the host's."""

    copy_lane: CopyLane | None = None
    """What carries blocks between the device and host memory; None where they are the same."""

    cpu_lane: CpuLane | None = None
    """What attends host blocks on the CPU while the device attends the rest; None where nobody can,
    or need."""

    pinning: Pinning | None = None
    """What locks host memory for the device's copies; None where there are none."""

    cpus_near: frozenset[int] = frozenset()
    """The processors whose memory the device reaches fastest; none where that is not known."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    @classmethod
    def kind_of(cls, torch_device: torch.device) -> type["Device"]:
        """The class for a torch device. Raises UnsupportedInputError where there is none: blocks
        cannot be attended there."""
        kind = cls.registry.get(torch_device.type)
        if kind is None:
            raise UnsupportedInputError(
                f"keys and values on {torch_device}: expected one of {', '.join(cls.registry)};"
                " move the model there, or use transformers' DynamicCache on this device (what"
                " another kind of device must provide is in docs/extending.md)"
            )
        return kind

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Whether this machine has one."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes of the device's memory that this process may still take."""

    @property
    def kernel(self) -> str:
        """The kernel that attends on it, as `ops.backend` names it."""
        return ops.backend(self.torch_device)

    def group_columns(self, layout: BlockLayout) -> int:
        """Blocks of a sequence that attention on the device takes at once."""
        return 1

    def close(self) -> None:
        """End what it does behind the caller; host blocks are no longer read. Idempotent."""
        if self.cpu_lane is not None:
            self.cpu_lane.close()


class CpuDevice(Device, name="cpu"):
    """The CPU."""

    @classmethod
    def is_available(cls) -> bool:
        """Always."""
        return True

    def free_bytes(self) -> int:
        """Bytes of RAM this process may still take."""
        return free_memory_bytes()


class CudaDevice(Device, name="cuda"):
    """A GPU that torch calls "cuda"."""

    is_host = False

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        module = _cuda_module()
        self.copy_lane = CudaLane(torch_device, module)
        self.pinning = CudaPinning(torch_device)
        if module is not None:
            address = module.device_properties(torch_device.index)["pci_bus_id"]
            self.cpus_near = numa.cpus_near(address)
            if chosen_kernel().core is not None:
                self.cpu_lane = self._cpu_lane(module)

    def _cpu_lane(self, module: ModuleType) -> CpuLane | None:
        """None, said once, where the device refuses flags."""
        flags = CudaFlags(self.torch_device, module)
        reason = flags.refusal()
        if not reason:
            return CpuLane(flags)
        logger.warning_once(
            f"the CPU attends no host blocks beside {self.torch_device}, all are carried there"
            f" (cpu_share=0): the device and the CPU cannot wait for one another ({reason})"
        )
        return None

    @classmethod
    def is_available(cls) -> bool:
        """Whether torch finds a driver and a device."""
        return torch.cuda.is_available()

    def free_bytes(self) -> int:
        """Free memory of the device, with what torch's allocator holds and does not use."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        reserved = torch.cuda.memory_reserved(self.torch_device)
        return free + reserved - torch.cuda.memory_allocated(self.torch_device)

    def group_columns(self, layout: BlockLayout) -> int:
        """Those of a group that flash attention takes in prefill."""
        return flash.group_columns(layout)


def has_accelerator() -> bool:
    """Whether attention may be computed elsewhere than in the host's memory."""
    kinds = Device.registry.values()
    return any(kind.is_available() for kind in kinds if not kind.is_host)


def _cuda_module() -> ModuleType | None:
    core, _ = cuda_core()
    return None if core is None else core.module
