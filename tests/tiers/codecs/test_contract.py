"""What every codec promises, over the registry: a new codec is tested by existing."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers.codecs import Codec

LAYOUTS = {
    "of tests": BlockLayout(2, 16, 16, 4, torch.bfloat16),
    "SmolLM2": BlockLayout(3, 64, 64, 512, torch.bfloat16),
    "Gemma 3": BlockLayout(1, 256, 256, 128, torch.bfloat16),
    "Llama": BlockLayout(2, 128, 128, 256, torch.bfloat16),
    "of two dims": BlockLayout(2, 192, 128, 64, torch.bfloat16),
    "of odd dims": BlockLayout(3, 7, 81, 4, torch.bfloat16),
}
CODECS = [name for name, kind in Codec.registry.items() if kind.__module__.startswith("hf_tiered")]
EXACT = [name for name in CODECS if Codec.by_name(name).exact]


def normal(layout: BlockLayout, seed: int = 0) -> torch.Tensor:
    """A block of values as they come: normal ones, every channel of its own size."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for part, dim in ((layout.keys, layout.key_dim), (layout.values, layout.value_dim)):
        sizes = torch.exp2(torch.randint(-20, 20, (layout.kv_heads, 1, dim), generator=generator))
        values = torch.randn(layout.kv_heads, layout.block_tokens, dim, generator=generator)
        part(block[None])[0].copy_(values * sizes)
    return block


def round_trip(codec: Codec, block: torch.Tensor) -> torch.Tensor:
    encoded = torch.full((codec.encoded_bytes,), 0xAA, dtype=torch.uint8)
    assert codec.encode(block, encoded)
    out = torch.full_like(block, 0x55)
    codec.decode(encoded, out)
    return out


def same(layout: BlockLayout, one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one[: layout.data_bytes], other[: layout.data_bytes])


@pytest.fixture(params=[(codec, layout) for codec in CODECS for layout in LAYOUTS], ids=str)
def codec(request):
    name, layout = request.param
    return Codec.by_name(name)(LAYOUTS[layout])


def test_the_size_is_whole_pages_and_no_more_than_the_block(codec):
    assert codec.encoded_bytes % 4096 == 0
    assert 0 < codec.encoded_bytes <= codec.layout.num_bytes


def test_exact_ones_give_back_every_bit(codec):
    if codec.exact:
        block = normal(codec.layout)
        assert same(codec.layout, round_trip(codec, block), block)


def test_the_same_block_gives_the_same_bytes(codec):
    block = normal(codec.layout)
    first, second = (torch.full((codec.encoded_bytes,), fill, dtype=torch.uint8) for fill in (0, 9))
    codec.encode(block, first)
    codec.encode(block.clone(), second)
    assert torch.equal(first, second)


def test_neither_encoding_nor_decoding_writes_elsewhere(codec):
    layout = codec.layout
    block = normal(layout)
    before = block.clone()
    room = torch.full((codec.encoded_bytes + 128,), 0xAA, dtype=torch.uint8)
    encoded = room[64:-64]
    assert codec.encode(block, encoded)
    assert torch.equal(block, before)
    kept = encoded.clone()
    out = torch.full((layout.num_bytes + 128,), 0xAA, dtype=torch.uint8)
    codec.decode(encoded, out[64:-64])
    assert torch.equal(encoded, kept)
    for memory in (room, out):
        assert (memory[:64] == 0xAA).all()
        assert (memory[-64:] == 0xAA).all()


def test_threads_do_not_disturb_one_another(codec):
    blocks = [normal(codec.layout, seed) for seed in range(4)]
    found = {}

    def work(number):
        found[number] = [round_trip(codec, blocks[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outs in found.items():
        expected = round_trip(codec, blocks[number])
        assert all(same(codec.layout, out, expected) for out in outs)


@pytest.mark.parametrize("name", CODECS)
def test_a_layout_that_it_does_not_know_is_refused(name):
    kind = Codec.by_name(name)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layout = BlockLayout(1, 64, 64, 512, dtype)
        if kind.refusal(layout):
            with pytest.raises(ConfigError, match=f"packing='{name}'"):
                kind(layout)
        else:
            kind(layout)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_is_said_to_be_encoded_comes_back(name, data):
    """Any bits at all: what does not fit is said not to."""
    layout = LAYOUTS[data.draw(st.sampled_from(["of tests", "of odd dims"]))]
    codec = Codec.by_name(name)(layout)
    words = st.integers(0, 0xFFFF) | st.sampled_from(SPECIAL)
    values = data.draw(st.lists(words, min_size=1, max_size=64))
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    filled = torch.tensor(values).repeat(-(-layout.data_bytes // 2 // len(values)))
    filled = ((filled ^ 0x8000) - 0x8000).short()[: layout.data_bytes // 2]
    block[: layout.data_bytes] = filled.view(torch.uint8)
    encoded = torch.zeros(codec.encoded_bytes, dtype=torch.uint8)
    if codec.encode(block, encoded):
        out = torch.full_like(block, 0x55)
        codec.decode(encoded, out)
        assert same(layout, out, block)


SPECIAL = [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0xFFFF, 0x7F7F]
