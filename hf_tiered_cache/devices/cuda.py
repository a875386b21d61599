"""A CUDA device: a copy lane, pinned host memory and, where the CUDA core was built, attention in
place beside it."""

from types import ModuleType

import torch
from transformers.utils import logging

from hf_tiered_cache.devices import numa
from hf_tiered_cache.devices.base import Device
from hf_tiered_cache.devices.cuda_lane import CudaFlags, CudaLane
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.devices.pinning import CudaPinning
from hf_tiered_cache.kernels import flash
from hf_tiered_cache.kernels.loader import chosen_kernel, cuda_core
from hf_tiered_cache.layout import BlockLayout

logger = logging.get_logger(__name__)


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
                self.in_place = self._in_place(module)

    def _in_place(self, module: ModuleType) -> InPlaceAttention | None:
        """None, said once, where the device refuses flags."""
        flags = CudaFlags(self.torch_device, module)
        reason = flags.refusal()
        if not reason:
            return InPlaceAttention(flags)
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


def _cuda_module() -> ModuleType | None:
    core, _ = cuda_core()
    return None if core is None else core.module
