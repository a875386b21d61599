"""bfloat16 in 12 bits a value, losslessly: `Bf16TwelveBit`.

The values of one channel (a dim of one head's keys or values) differ little in their exponents. So
the lower byte of each is kept as it is (the last bit of the exponent, and the mantissa), and of the
upper one, a sign and seven bits of the exponent, four bits: the sign, and three that count from a base
of the channel down, over 16 exponents. On keys and values of real models that misses about one value
in 10,000; there are places for 64 exceptions in a plane of 32,768. Fixed places keep records of one
size, and let a tile be unpacked by itself into the L1 cache (csrc/cpu/packing.h). An entropy coder
would save another 10 to 15 %, at a hundredth of the speed. SplitZip (arXiv 2605.01708) is close to
it, with a codebook of exponents in place of bases.

Where the parts lie is written in csrc/packed_blocks.h. Here is the same in plain torch: what it
means, and what runs without the compiled core.
"""

import torch
from torch import Tensor

from hf_tiered_cache.kernels.cores import CpuCore
from hf_tiered_cache.kernels.loader import kernel_for
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers.codecs.base import Codec, whole_pages

GROUP = 32  # values whose codes are interleaved
REACH = 8  # upper bytes that a base reaches
MOST_EXCEPTIONS = 64
MOST_VALUES = 1 << 16  # of a plane: an index is 16 bits
MOST_DIM = 1024


class Bf16TwelveBit(Codec, name="bf16_12bit"):
    """Blocks of bfloat16 in three quarters of their bytes; 12.09 bits a value at head_dim 128."""

    exact = True
    is_attended = True

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__(layout)
        self._parts = [_Plane(layout, dim) for dim in (layout.key_dim, layout.value_dim)]
        self._shape = (layout.kv_heads, layout.block_tokens, layout.key_dim, layout.value_dim)
        core = kernel_for(torch.empty(0)).core
        if isinstance(core, CpuCore):
            self.core_arguments = core.number, self._shape, self.encoded_bytes

    @classmethod
    def refusal(cls, layout: BlockLayout) -> str:
        """Why it cannot encode blocks of a layout; empty if it can."""
        dim = max(layout.key_dim, layout.value_dim)
        if layout.dtype != torch.bfloat16:
            return f"it packs bfloat16; these blocks are {layout.dtype}"
        if dim > MOST_DIM or layout.block_tokens * dim > MOST_VALUES:
            return (
                f"it packs up to {MOST_VALUES} values of one head; {layout.block_tokens} tokens of"
                f" {dim} are more: choose a smaller block_tokens"
            )
        return ""

    @property
    def data_bytes(self) -> int:
        """Bytes of an encoded block, without the padding."""
        return sum(self.layout.kv_heads * plane.num_bytes for plane in self._parts)

    @property
    def encoded_bytes(self) -> int:
        """See `Codec.encoded_bytes`."""
        return whole_pages(self.data_bytes)

    def encode(self, block: Tensor, out: Tensor) -> bool:
        """See `Codec.encode`."""
        out[self.data_bytes :] = 0
        core = kernel_for(block).core
        if isinstance(core, CpuCore):
            pointers = (block.data_ptr(), out.data_ptr())
            return core.module.pack(core.number, self._shape, *pointers)
        planes = self._planes(block, out)
        return all([part.pack(raw, packed) for part, raw, packed in planes])

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """See `Codec.decode`."""
        core = kernel_for(encoded).core
        if isinstance(core, CpuCore):
            core.module.unpack(core.number, self._shape, encoded.data_ptr(), out.data_ptr())
            return
        for part, raw, packed in self._planes(out, encoded):
            part.unpack(packed, raw)

    def num_exceptions(self, encoded: Tensor) -> list[int]:
        """Of every plane of an encoded block: what no code reached."""
        planes = self._planes(torch.empty(self.layout.num_bytes, dtype=torch.uint8), encoded)
        return [int(part.words(plane)[0]) for part, _, packed in planes for plane in packed]

    def _planes(self, block: Tensor, encoded: Tensor) -> list[tuple["_Plane", Tensor, Tensor]]:
        """Keys, then values: raw as int16 `[heads, tokens, dim]`, packed as uint8 `[heads, n]`."""
        layout, found = self.layout, []
        raw_start = packed_start = 0
        for part in self._parts:
            raw_end = raw_start + layout.kv_heads * layout.block_tokens * part.dim * 2
            packed_end = packed_start + layout.kv_heads * part.num_bytes
            raw = block[raw_start:raw_end].view(torch.int16)
            found.append(
                (
                    part,
                    raw.view(layout.kv_heads, layout.block_tokens, part.dim),
                    encoded[packed_start:packed_end].view(layout.kv_heads, part.num_bytes),
                )
            )
            raw_start, packed_start = raw_end, packed_end
        return found


class _Plane:
    """One head's keys, or values: see csrc/packed_blocks.h."""

    def __init__(self, layout: BlockLayout, dim: int) -> None:
        self.dim = dim
        self.num_values = layout.block_tokens * dim
        self.padded = -(-self.num_values // GROUP) * GROUP
        self.bases = self.padded + self.padded // 2
        self.exceptions = (self.bases + dim + 1) // 2 * 2
        self.most = min(MOST_EXCEPTIONS, max(1, self.padded // 512))
        self.num_bytes = -(-(self.exceptions + 2 + 4 * self.most) // 64) * 64

    def pack(self, raw: Tensor, packed: Tensor) -> bool:
        """Pack int16 `[heads, tokens, dim]` into uint8 `[heads, num_bytes]`; whether it went."""
        uppers = (raw >> 8 & 0x7F).int()
        bases = _best_bases(uppers)
        below = bases[:, None] - uppers
        is_missed = (below < 0) | (below >= REACH)
        if int(is_missed.sum((1, 2)).max()) > self.most:
            return False
        packed.zero_()
        packed[:, : self.num_values] = (raw & 0xFF).flatten(1)
        codes = ((raw >> 12 & 8) | (below & 7)).flatten(1)
        codes = torch.nn.functional.pad(codes, (0, self.padded - self.num_values))
        lower, upper = codes.unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
        packed[:, self.padded : self.bases] = (lower | upper << 4).flatten(1)
        packed[:, self.bases : self.bases + self.dim] = bases
        for head, missed in enumerate(is_missed.flatten(1)):
            indices = missed.nonzero().flatten()
            words, start = self.words(packed[head]), 1 + self.most
            words[0] = len(indices)
            words[1 : 1 + len(indices)] = _signed(indices)
            words[start : start + len(indices)] = raw[head].flatten()[indices]
        return True

    def unpack(self, packed: Tensor, raw: Tensor) -> None:
        """What `pack` packed."""
        codes = packed[:, self.padded : self.bases].int().unflatten(1, (-1, 1, GROUP // 2))
        codes = torch.cat((codes & 15, codes >> 4), 2).flatten(1)[:, : self.num_values]
        codes = codes.view(raw.shape)
        bases = packed[:, self.bases : self.bases + self.dim].int()
        uppers = ((bases[:, None] - (codes & 7)) | (codes & 8) << 4) & 0xFF
        raw.copy_(_signed(uppers << 8 | packed[:, : self.num_values].int().view(raw.shape)))
        for head in range(len(packed)):
            words, start = self.words(packed[head]), 1 + self.most
            count = int(words[0])
            indices = words[1 : 1 + count].long() & 0xFFFF
            raw[head].view(-1)[indices] = words[start : start + count]

    def words(self, plane: Tensor) -> Tensor:
        """int16: the count of exceptions, the places for their indices, then for the values."""
        end = self.exceptions + 2 * (1 + 2 * self.most)
        return plane[self.exceptions : end].view(torch.int16)


def _signed(words: Tensor) -> Tensor:
    """The same 16 bits as int16."""
    return ((words ^ 0x8000) - 0x8000).short()


def _best_bases(uppers: Tensor) -> Tensor:
    """int32 `[heads, dim]`: for every channel of `[heads, tokens, dim]` the smallest base that
    reaches most of its values."""
    bases = uppers.amax(1)
    is_wide = bases - uppers.amin(1) >= REACH
    if is_wide.any():
        channels = uppers.transpose(1, 2)[is_wide].long()  # [channels, tokens]
        counts = torch.zeros(len(channels), 128, dtype=torch.int32)
        counts.scatter_add_(1, channels, torch.ones_like(channels, dtype=torch.int32))
        upto = counts.cumsum(1)
        reached = upto.clone()
        reached[:, REACH:] -= upto[:, :-REACH]
        bases[is_wide] = reached.argmax(1).int()
    return bases
