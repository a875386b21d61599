"""The bytes of a block, by golden numbers."""

import pytest
import torch

from hf_tiered_cache.layout import BlockLayout, default_block_tokens


@pytest.mark.parametrize(
    ("head_dim", "dtype", "tokens"),
    [
        (128, torch.bfloat16, 256),
        (64, torch.bfloat16, 512),
        (128, torch.float32, 128),
        (80, torch.float16, 256),  # 409.6 rounded down to a power of two
        (576, torch.bfloat16, 64),  # never less
    ],
)
def test_a_plane_of_64_kib_chooses_the_tokens_of_a_block(head_dim, dtype, tokens):
    assert default_block_tokens(head_dim, dtype) == tokens


def test_a_block_is_keys_then_values_head_by_head_padded_to_4_kib():
    layout = BlockLayout(kv_heads=2, key_dim=3, value_dim=5, block_tokens=4, dtype=torch.float16)
    assert (layout.value_offset, layout.data_bytes, layout.num_bytes) == (48, 128, 4096)
    blocks = torch.zeros(2, layout.num_bytes, dtype=torch.uint8)
    layout.keys(blocks)[1] = torch.arange(24).view(2, 4, 3)
    layout.values(blocks)[1] = 100 + torch.arange(40).view(2, 4, 5)
    data = blocks[1, : layout.data_bytes].view(torch.float16)
    assert data.tolist() == [*range(24), *range(100, 140)]
    assert not blocks[0].any()
    assert not blocks[1, layout.data_bytes :].any()


def test_blocks_of_so_many_tokens():
    layout = BlockLayout(1, 8, 8, block_tokens=4, dtype=torch.float32)
    assert [layout.num_blocks(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
