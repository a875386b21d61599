"""What a manager must know of the device that attention runs on.

Where that is the CPU, its memory is the host's and everything happens at once. A CUDA device has a
copy lane, pinned host memory and, where the CUDA core was built, a CPU lane. (`kernels` decides
which kernel runs on a device, `tiers.device` how its memory is allocated.)
"""

from types import ModuleType

import torch
from transformers.utils import logging

from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.cpu_lane import CpuLane
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import flash
from hf_tiered_cache.kernels.loader import chosen_kernel, cuda_core
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers import numa
from hf_tiered_cache.tiers.cuda_lane import CudaFlags, CudaLane
from hf_tiered_cache.tiers.lane import CopyLane
from hf_tiered_cache.tiers.pinning import CudaPinning, Pinning

logger = logging.get_logger(__name__)

SUPPORTED = ("cpu", "cuda")


def check_supported(device: torch.device) -> None:
    """Raise UnsupportedInputError unless blocks can be attended on `device`."""
    if device.type not in SUPPORTED:
        raise UnsupportedInputError(
            f"keys and values on {device}: expected one of {', '.join(SUPPORTED)}; move the model "
            "there, or use transformers' DynamicCache on this device"
        )


def has_accelerator() -> bool:
    """Whether attention may be computed elsewhere than on the CPU."""
    return torch.cuda.is_available()


def free_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that this process may still take."""
    if device.type == "cpu":
        return free_memory_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def copy_lane(device: torch.device) -> CopyLane | None:
    """What carries blocks between the device and host memory; None where they are the same."""
    return None if device.type == "cpu" else CudaLane(device, _cuda_module())


def pinning(device: torch.device) -> Pinning | None:
    """What locks host memory for the device's copies; None where there are none."""
    return None if device.type == "cpu" else CudaPinning(device)


def cpus_near(device: torch.device) -> frozenset[int]:
    """The processors whose memory the device reaches fastest; none where that is not known."""
    module = None if device.type == "cpu" else _cuda_module()
    if module is None:
        return frozenset()
    return numa.cpus_near(module.device_properties(device.index)["pci_bus_id"])


def cpu_lane(device: torch.device) -> CpuLane | None:
    """What attends host blocks on the CPU while the device attends the rest; None where the device
    is the CPU, where the compiled cores that it needs do not run, or, said once, where the device
    refuses flags."""
    module = None if device.type == "cpu" else _cuda_module()
    if module is None or chosen_kernel().core is None:
        return None
    flags = CudaFlags(device, module)
    reason = flags.refusal()
    if reason:
        logger.warning_once(
            f"the CPU attends no host blocks beside {device}, all are carried there (cpu_share=0):"
            f" the device and the CPU cannot wait for one another ({reason})"
        )
        return None
    return CpuLane(flags)


def group_columns(layout: BlockLayout, device: torch.device) -> int:
    """Blocks of a sequence that attention on the device takes at once."""
    return 1 if device.type == "cpu" else flash.group_columns(layout)


def _cuda_module() -> ModuleType | None:
    core, _ = cuda_core()
    return None if core is None else core.module
