"""`BlockView`: the blocks of a table as the kernels see them, checked once, attended many times."""

from dataclasses import dataclass, field
from typing import Never, Protocol

import torch
from torch import Tensor

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.layout import BlockLayout


class BlockDecoder(Protocol):
    """What opens encoded blocks; a `tiers.codecs.Codec` is one."""

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Write into `out` the block that `encoded` begins with; uint8."""


@dataclass(frozen=True, eq=False)
class BlockView:
    """Consecutive blocks of every sequence, in the slots of a slab.

    blocks: uint8 [slots, layout.num_bytes]. table: int32 [batch, n], rows may be strided; its
    column 0 starts at position `first_token` (a multiple of block_tokens). Raises
    UnsupportedInputError for anything else. Both tensors must keep their memory as long as the
    view is used.

    codec: what decodes the blocks of complemented slots (`~slot`), which are encoded at the start
    of theirs; None: there are none. On the CPU only; the compiled kernels attend them as they are,
    so it must be one that they know (`Codec.is_attended`).

    Where the blocks are, their table must be too: one on the CPU is checked and sent to the blocks'
    device once, here, as `device_table`. Slots of CPU blocks are checked where they are read; those
    of a table that was on the device already cannot be without waiting for it, so the kernels
    leave alone what is outside the slab.
    """

    blocks: Tensor
    table: Tensor
    layout: BlockLayout
    first_token: int = 0
    codec: BlockDecoder | None = None
    batch: int = field(init=False)
    device_table: Tensor = field(init=False, repr=False)  # int32 [batch, n] beside the blocks
    # Handle of the CUDA stream on which `device_table` was made; None where it was given.
    table_stream: int | None = field(init=False, repr=False)
    # For the compiled core: the order is that of `block_view` in csrc/python_arguments.h.
    core_arguments: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        blocks, table, layout = self.blocks, self.table, self.layout
        stream = None
        object.__setattr__(self, "batch", table.size(0))
        if table.is_cpu and not blocks.is_cpu:
            self.check_slots()
            table = table.contiguous().to(blocks.device, non_blocking=True)
            if table.is_cuda:
                stream = torch.cuda.current_stream(table.device).cuda_stream
        object.__setattr__(self, "table_stream", stream)
        object.__setattr__(self, "device_table", table)
        core_arguments = (
            blocks.data_ptr(),
            blocks.stride(0),
            blocks.size(0),
            layout.kv_heads,
            layout.block_tokens,
            layout.key_dim,
            layout.value_dim,
            layout.dtype.itemsize,
            table.data_ptr(),
            table.stride(0),
            table.size(1),
            self.first_token,
            self.codec is not None,
        )
        object.__setattr__(self, "core_arguments", core_arguments)

    def note_stream(self, stream: int) -> None:
        """Kernels of this stream (its handle; torch's current one) are about to read
        `device_table`. Where it was made on another one, torch's allocator, which would reuse the
        memory at once when the view has gone, is told."""
        if self.table_stream is not None and self.table_stream != stream:
            self.device_table.record_stream(torch.cuda.current_stream(self.device_table.device))

    def decoded(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks as uint8 `[n, block bytes]`, and where in them those of `slots`, of any shape, are
        decoded: in the slab, if none of them is encoded, else in memory of their own."""
        if self.codec is None or not (slots < 0).any():
            return self.blocks, slots.long()
        own = self.blocks.new_empty((slots.numel(), self.blocks.size(1)))
        for block, slot in zip(own, slots.flatten().tolist(), strict=True):
            if slot < 0:
                self.codec.decode(self.blocks[~slot], block)
            else:
                block.copy_(self.blocks[slot])
        return own, torch.arange(slots.numel()).view(slots.shape)

    def check_slots(self) -> None:
        """Raise UnsupportedInputError if a slot of the CPU's table is outside the slab."""
        if not self.table.is_cpu or self.table.numel() == 0:
            return
        least, most = (int(slot) for slot in self.table.aminmax())
        if least < 0 or most >= self.blocks.size(0):
            refuse("table slots", f"{least} .. {most}", f"0 .. {self.blocks.size(0) - 1}")

    def _check(self) -> None:
        blocks, table, layout = self.blocks, self.table, self.layout
        if blocks.dtype != torch.uint8 or blocks.dim() != 2:
            refuse("blocks", f"{blocks.dtype} {list(blocks.shape)}", "uint8 [slots, block bytes]")
        if blocks.size(1) < layout.data_bytes or blocks.stride(1) != 1:
            refuse(
                "blocks [slots, block bytes]",
                f"{list(blocks.shape)} with strides {blocks.stride()}",
                f"contiguous rows of {layout.num_bytes} bytes ({layout})",
            )
        if table.dtype != torch.int32 or table.dim() != 2:
            refuse("table", f"{table.dtype} {list(table.shape)}", "int32 [batch, num_blocks]")
        if table.stride(1) != 1 and table.size(1) > 1:
            refuse("table strides", table.stride(), "a contiguous last dimension")
        if not table.is_cpu and table.device != blocks.device:
            refuse("table device", table.device, f"cpu, or that of the blocks, {blocks.device}")
        if self.codec is not None and not blocks.is_cpu:
            refuse("codec", f"one for blocks on {blocks.device}", "blocks on the CPU, or None")
        if self.first_token < 0 or self.first_token % layout.block_tokens != 0:
            refuse(
                "first_token", self.first_token, f"a multiple of block_tokens {layout.block_tokens}"
            )


def refuse(what: str, got: object, expected: object) -> Never:
    """Raise UnsupportedInputError with what was got and what is expected."""
    raise UnsupportedInputError(f"{what}: got {got}, expected {expected}")
