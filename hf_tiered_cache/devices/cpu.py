"""The CPU as the device."""

from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.devices.base import Device


class CpuDevice(Device, name="cpu"):
    """The CPU."""

    @classmethod
    def is_available(cls) -> bool:
        """Always."""
        return True

    def free_bytes(self) -> int:
        """Bytes of RAM this process may still take."""
        return free_memory_bytes()
