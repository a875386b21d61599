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
    """Ranges are registered with the CUDA driver."""

    def register(self, address: int, num_bytes: int) -> bool:
        """Lock a range; False, and nothing changed, where that is refused."""
        status = torch.cuda.cudart().cudaHostRegister(
            address, num_bytes, CUDA_HOST_REGISTER_PORTABLE
        )
        return int(status) == 0

    def unregister(self, address: int) -> None:
        """Unlock the range that was registered at `address`."""
        torch.cuda.cudart().cudaHostUnregister(address)
