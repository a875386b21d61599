"""The contract of a codec: `Codec`.

A codec is made for blocks of one layout and writes each of them into the same number of bytes, so
that a tier has slots, and a file records, of one size. A block that does not go into so few is said
to, by `encode`, and is kept as it is by the tier (`tiers.encoded`).

Subclassing with a name, `class XCodec(Codec, name="x")`, registers a codec, and the contract tests
run over every registered one.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.layout import ALIGNMENT_BYTES, BlockLayout
from hf_tiered_cache.registry import Registered


class Codec(Registered, ABC, kind="codec"):
    """Encodes blocks of one layout. Called from any thread, several at a time."""

    exact: ClassVar[bool]
    """Whether what is decoded has every bit of what was encoded."""

    is_attended: ClassVar[bool] = False
    """Whether the CPU's kernels attend encoded blocks, without their being decoded first."""

    core_arguments: tuple[Any, ...] | None = None
    """For a codec of the compiled core: what its `Move` takes as `packing`. Any other one runs in
    threads of Python."""

    def __init__(self, layout: BlockLayout) -> None:
        """Raises ConfigError for a layout that it does not know."""
        if reason := self.refusal(layout):
            raise ConfigError(f"packing={self.name!r}: {reason}")
        self.layout = layout

    @classmethod
    def refusal(cls, layout: BlockLayout) -> str:  # noqa: ARG003
        """Why it cannot encode blocks of a layout; empty if it can."""
        return ""

    @property
    @abstractmethod
    def encoded_bytes(self) -> int:
        """Bytes of every encoded block, a multiple of 4096, at most the layout's `num_bytes`."""

    @abstractmethod
    def encode(self, block: torch.Tensor, out: torch.Tensor) -> bool:
        """Write a block (uint8 `[layout.num_bytes]`) into `out` (uint8 `[encoded_bytes]`). False
        where it does not go into so few bytes; `out` is undefined then. Which bytes come out
        depends on nothing but the block."""

    @abstractmethod
    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        """Write into `out` what `encode` was given; both as there. What pads a block is
        undefined."""


def whole_pages(num_bytes: int) -> int:
    """Bytes of the pages of 4 KiB that so many bytes take."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
