"""What attention runs on, and how blocks come there: a `Device` of each kind, its copy lane, pinned
memory, and attention in place beside it."""

from hf_tiered_cache.devices.base import Device, has_accelerator
from hf_tiered_cache.devices.cpu import CpuDevice
from hf_tiered_cache.devices.cuda import CudaDevice

__all__ = ["CpuDevice", "CudaDevice", "Device", "has_accelerator"]
