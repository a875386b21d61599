"""The tier where attention is computed.

On the CPU its slab grows by what is touched. On any other torch device it is one allocation of the
whole budget, made at construction.
"""

import torch

from hf_tiered_cache.devices.copy_lane import CopyLane
from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.tiers.base import Budget
from hf_tiered_cache.tiers.memory import MemoryTier, virtual_slab
from hf_tiered_cache.tiers.slots import SlotPool


class DeviceTier(MemoryTier, name="device"):
    """Blocks in the memory attention reads; see `MemoryTier`.

    `lane`: what copies blocks to and from it; None where the device is the CPU.
    """

    def __init__(
        self,
        block_bytes: int,
        budget: Budget,
        device: torch.device | str = "cpu",
        lane: CopyLane | None = None,
    ) -> None:
        """Raises ConfigError when the budget cannot be mapped, or `block_bytes` is no multiple of
        4096. On a device other than the CPU what is left of the budget is allocated here; a
        ConfigError says if the device has less."""
        super().__init__(block_bytes, budget)
        self.device = torch.device(device)
        self.lane = lane
        if self.device.type == "cpu":
            max_slots, step_slots = budget.limit_bytes // block_bytes, 1
            self._mapping, self._slab = virtual_slab(max_slots, block_bytes, budget.knob)
        else:  # all allocated now, so all accounted for at once
            max_slots = step_slots = budget.free_bytes // block_bytes
            self._mapping = None
            self._slab = _allocate(max_slots, block_bytes, self.device)
        self._pool = SlotPool(
            block_bytes, budget, self.name, step_slots=step_slots, max_slots=max_slots
        )
        if self.device.type != "cpu":
            first = self._pool.allocate()
            if first is not None:
                self._pool.free(first)

    @property
    def where(self) -> str:
        """The device."""
        return str(self.device)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block from one slot to another, in the device's own order."""
        self.slab[target].copy_(self.slab[source])

    def drain(self) -> None:
        """Wait until the lane copies nothing any more."""
        super().drain()
        if self.lane is not None:
            self.lane.settle()

    def close(self) -> None:
        """Return the memory: on the CPU at once, even while views of the slab are alive (they read
        zeros); that of another device once it has come to the end of its work and the last view
        has gone, to torch's allocator."""
        if self.lane is not None:
            self.lane.settle_device()
        self._give_back()
        self._pool.close()


def _allocate(num_slots: int, block_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        with torch.inference_mode(False):  # it is written to outside of inference mode as well
            return torch.empty((num_slots, block_bytes), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        size = format_bytes(num_slots * block_bytes)
        raise ConfigError(f"device_bytes: no {size} are free on {device}; lower it") from error
