"""The device that attention runs on: `Device`.

`kernels` decides which kernel runs on a device, `tiers.device` how its memory is allocated.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from transformers.utils import logging

from hf_tiered_cache.devices.copy_lane import CopyLane
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.devices.pinning import Pinning
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.registry import Registered

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

    in_place: InPlaceAttention | None = None
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
        if self.in_place is not None:
            self.in_place.close()


def has_accelerator() -> bool:
    """Whether attention may be computed elsewhere than in the host's memory."""
    kinds = Device.registry.values()
    return any(kind.is_available() for kind in kinds if not kind.is_host)
