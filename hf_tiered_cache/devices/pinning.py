"""Page-locked memory: what lets a GPU copy it at full speed while the CPU does something else."""

from typing import Protocol

import torch

CUDA_HOST_REGISTER_PORTABLE = 1  # pinned for every device, whichever thread asked


class Pinning(Protocol):
    """Locks ranges of memory in place. Called from any thread."""

    def register(self, address: int, num_bytes: int) -> bool:
        """Lock a range; False, and nothing changed, where that is refused."""

    def unregister(self, address: int) -> None:
        """Unlock the range that was registered at `address`."""


class CudaPinning:
    """Ranges are registered with the CUDA driver, in the context of one device: a thread that has
    set none would make one on the first device, which may be in nobody's use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> bool:
        """Lock a range; False, and nothing changed, where that is refused."""
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(
                address, num_bytes, CUDA_HOST_REGISTER_PORTABLE
            )
        return int(status) == 0

    def unregister(self, address: int) -> None:
        """Unlock the range that was registered at `address`."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)
