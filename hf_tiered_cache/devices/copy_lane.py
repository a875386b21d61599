"""The copy lane: how blocks go between a device and the memory below it, while the device works.

A device that is not the CPU does what it is given in the order it is given, some time later. Copies
go on queues of their own, so what they may overtake has to be said:

- a load may begin once every moment that was told to `hold_loads` has passed (the slots it fills
  are no longer read), and the device waits for it where `Transfer.hold_device` was called;
- a store begins when all that the device was given before it is done (the bytes are there);
- loads keep their order, and so do stores.

Where the device is the CPU there is no lane: everything happens at once.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from hf_tiered_cache.observe.metrics import LaneCounters
from hf_tiered_cache.transfers import Transfer


class Mark(Protocol):
    """A moment in the device's order: all that it was given until then is done."""

    def hold_loads(self) -> None:
        """Let the loads that the lane is given from now on come after this moment."""


class CopyLane(Protocol):
    """Copies blocks, uint8 `[block_bytes]` each, to and from a device."""

    def carries(self, block: torch.Tensor) -> bool:
        """Whether `block` is memory of the device."""

    def mark(self) -> Mark:
        """The moment at which all that the device was given so far is done."""

    def load(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        is_pinned: bool = True,
    ) -> Transfer:
        """Copy host memory to the device; where that is not pinned the CPU may wait for it."""

    def load_rows(
        self,
        source: torch.Tensor,
        rows: Sequence[int],
        target: torch.Tensor,
        target_rows: Sequence[int],
    ) -> Transfer:
        """`load` from rows of pinned memory into rows of the device's, uint8 `[slots, block_bytes]`
        both, as many of one as of the other."""

    def store(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        is_pinned: bool = True,
    ) -> Transfer:
        """Copy memory of the device to host memory, likewise."""

    def settle(self) -> None:
        """Wait until no copy is under way: the memory may go."""

    def settle_device(self) -> None:
        """Wait until the device is done with all that anybody gave it: its memory may go."""

    def probe(self, pinned: Sequence[torch.Tensor], target: torch.Tensor) -> float:
        """Bytes per second that blocks take to the device, from a few short copies into `target`,
        which nobody uses."""

    def occupy(self, pinned: Sequence[torch.Tensor], target: torch.Tensor, num_bytes: int) -> None:
        """Begin to carry so many bytes as `probe` does, for others to be measured beside it. Not
        waited for, but settled by `settle`."""

    def measure(self) -> LaneCounters:
        """The totals so far."""
