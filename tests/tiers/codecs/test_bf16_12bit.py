"""The 12-bit packing: what goes into a record, what does not, and that every kernel makes the same
bytes as plain torch."""

import numpy as np
import pytest
import torch
from tiers.codecs.test_contract import LAYOUTS, SPECIAL, normal, round_trip, same

from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers.codecs import Bf16TwelveBit

LLAMA = LAYOUTS["Llama"]
TINY = BlockLayout(1, 16, 16, 4, torch.bfloat16)  # planes of 64 values, with room for 1 exception
ONE_PLANE = BlockLayout(1, 128, 128, 256, torch.bfloat16)


@pytest.fixture(params=ops.available_kernels())
def kernel(request):
    with ops.use_kernel(request.param):
        yield request.param


def filled(layout: BlockLayout, words) -> torch.Tensor:
    """A block of the bits `words`, from its first value on, and zeros."""
    block = np.zeros(layout.num_bytes // 2, dtype=np.uint16)
    block[: len(words)] = words
    return torch.from_numpy(block.view(np.uint8).copy())


def encode(layout: BlockLayout, block: torch.Tensor) -> torch.Tensor | None:
    codec = Bf16TwelveBit(layout)
    out = torch.full((codec.encoded_bytes,), 0xAA, dtype=torch.uint8)
    return out if codec.encode(block, out) else None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_kernel_makes_the_bytes_of_plain_torch(kernel, layout):
    for seed in range(3):
        block = normal(layout, seed)
        if seed:  # some exceptions of all kinds, small enough for the smallest plane
            block[: 2 * seed].view(torch.int16)[0] = SPECIAL[4 + seed]
        with ops.use_kernel("reference"):
            expected = encode(layout, block)
        assert expected is not None
        assert torch.equal(encode(layout, block), expected)
        assert same(layout, round_trip(Bf16TwelveBit(layout), block), block)


def test_golden_bytes():
    # Channel 0: 1.0, 2^-14, -1.5, 1.0, which one base reaches. Channel 1: four values, one of them
    # too small for the base of the others: an exception. Then -0, a denormal number, zeros.
    words = [0x3F80, 0x3FC0, 0, 0x8000, 0x0001, *[0] * 11, 0x3880, 0x3F81, *[0] * 14]
    words += [0xBFC0, 0x3701, *[0] * 14, 0x3F80, 0x3F82]
    packed = encode(TINY, filled(TINY, words))
    lower, codes, bases = packed[:64], packed[64:96], packed[96:112]
    count, index, word = packed[112:118].view(torch.int16).tolist()
    assert lower[:5].tolist() == [0x80, 0xC0, 0, 0, 1]
    assert lower[16:18].tolist() == [0x80, 0x81]
    assert bases.tolist() == [0x3F, 0x3F, *[0] * 14]
    # In a byte the codes of two values that are 16 apart: how far below the base, 8 for a sign.
    assert codes[:16].tolist() == [0 | 7 << 4, 0, 0, 8, *[0] * 12]
    assert codes[16:].tolist() == [8, *[0] * 15]
    assert (count, index, word) == (1, 33, 0x3701)


def test_every_value_comes_back(kernel):
    """All 65,536 of them, those of one exponent in one plane."""
    exponents = torch.arange(256, dtype=torch.int32)
    mantissas = torch.arange(128, dtype=torch.int32)
    signs = torch.tensor([0, 0x8000], dtype=torch.int32)
    words = (exponents[:, None, None] << 7) | mantissas[:, None] | signs  # [256, 128, 2]
    seen = set()
    for some in words.flatten(1).split(16):  # 16 exponents, a channel each
        block = some.T.repeat(1, 8).flatten().numpy().astype(np.uint16)  # [256 tokens, 128]
        block = filled(ONE_PLANE, block)
        assert same(ONE_PLANE, round_trip(Bf16TwelveBit(ONE_PLANE), block), block)
        seen |= set(some.flatten().tolist())
    assert len(seen) == 65536


@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x8000, 0x7F7F])
def test_infinities_nan_zeros_and_denormals_come_back_among_others(kernel, word):
    block = normal(LLAMA)
    for place in (0, 4097, 65536 + 77, LLAMA.data_bytes // 2 - 1):
        block.view(torch.int16)[place] = word - 0x10000 if word > 0x7FFF else word
    assert same(LLAMA, round_trip(Bf16TwelveBit(LLAMA), block), block)
    everywhere = filled(LLAMA, [word] * (LLAMA.data_bytes // 2))
    assert same(LLAMA, round_trip(Bf16TwelveBit(LLAMA), everywhere), everywhere)


def test_64_exceptions_go_into_a_plane_and_65_do_not(kernel):
    words = np.full(256 * 128, 0x3F80, dtype=np.uint16)
    for count, fits in ((64, True), (65, False)):
        block = words.copy()
        block[np.arange(count) * 500] = 0x3000  # 2^-31
        block = filled(ONE_PLANE, block)
        assert (encode(ONE_PLANE, block) is not None) == fits
        if fits:
            assert same(ONE_PLANE, round_trip(Bf16TwelveBit(ONE_PLANE), block), block)


def test_an_outlier_costs_one_place_whether_large_or_small(kernel):
    """The base follows the many, not the largest."""
    for outlier in (0x7F00, 0x0080):
        block = normal(ONE_PLANE)
        block.view(torch.int16)[: 60 * 129 : 129] = outlier  # in 60 channels
        assert same(ONE_PLANE, round_trip(Bf16TwelveBit(ONE_PLANE), block), block)


def test_random_bits_are_said_not_to_fit(kernel):
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(0, 256, (LLAMA.num_bytes,), dtype=torch.uint8, generator=generator)
    assert encode(LLAMA, block) is None


@pytest.mark.parametrize(
    ("name", "bits"), [("SmolLM2", 12.10), ("Gemma 3", 12.15), ("Llama", 12.12)]
)
def test_bits_per_value(name, bits):
    layout = LAYOUTS[name]
    packed = Bf16TwelveBit(layout)
    assert packed.data_bytes * 8 / (layout.data_bytes / 2) <= bits
    assert packed.encoded_bytes - packed.data_bytes < 4096
