"""New tokens land where the layout says, and nowhere else."""

import pytest
import torch

from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout

BATCH, KV_HEADS = 2, 3


def written(
    layout: BlockLayout, start: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0
):
    """(blocks, expected blocks) after appending to zeroed blocks at position `start`, by a table
    whose column 0 starts at position `first`."""
    columns = layout.num_blocks(start - first + keys.shape[2])
    slots = BATCH * columns + 2
    table = torch.randperm(slots, generator=torch.Generator().manual_seed(3))
    table = table[: BATCH * columns].view(BATCH, columns).int()
    blocks = torch.zeros(slots, layout.num_bytes, dtype=torch.uint8)
    expected = blocks.clone()
    expected_keys, expected_values = layout.keys(expected), layout.values(expected)
    for token in range(keys.shape[2]):
        column, inside = divmod(start - first + token, layout.block_tokens)
        for sequence in range(BATCH):
            slot = int(table[sequence, column])
            expected_keys[slot, :, inside] = keys[sequence, :, token]
            expected_values[slot, :, inside] = values[sequence, :, token]
    ops.append_tokens(keys, values, ops.BlockView(blocks, table, layout, first), start)
    return blocks, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 50, 300])
@pytest.mark.parametrize("start", [0, 5, 15, 16, 37])
def test_tokens_land_at_any_offset_across_blocks(kernel, dtype, tokens, start):
    layout = BlockLayout(KV_HEADS, 24, 40, 16, dtype)
    keys = torch.randn(BATCH, KV_HEADS, tokens, 24).to(dtype)
    values = torch.randn(BATCH, KV_HEADS, tokens, 40).to(dtype)
    blocks, expected = written(layout, start, keys, values)
    assert torch.equal(blocks, expected)


def test_any_strides_are_read(kernel):
    layout = BlockLayout(KV_HEADS, 24, 40, 8, torch.float32)
    keys = torch.randn(BATCH, 20, KV_HEADS, 24).transpose(1, 2)  # as models project them
    values = torch.randn(BATCH, KV_HEADS, 40, 20).transpose(2, 3)  # last dimension strided
    blocks, expected = written(layout, 3, keys, values)
    assert torch.equal(blocks, expected)
    expanded = torch.randn(1, 1, 20, 24).expand(BATCH, KV_HEADS, 20, 24)
    blocks, expected = written(layout, 3, expanded, values)
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("first", [0, 8, 16])
def test_a_table_may_begin_anywhere_before_the_new_tokens(kernel, first):
    layout = BlockLayout(KV_HEADS, 24, 40, 8, torch.float32)
    keys, values = torch.randn(BATCH, KV_HEADS, 11, 24), torch.randn(BATCH, KV_HEADS, 11, 40)
    blocks, expected = written(layout, 19, keys, values, first)
    assert torch.equal(blocks, expected)


def test_no_tokens_write_nothing(kernel):
    layout = BlockLayout(KV_HEADS, 24, 40, 8, torch.float32)
    blocks, expected = written(
        layout, 3, torch.empty(BATCH, KV_HEADS, 0, 24), torch.empty(BATCH, KV_HEADS, 0, 40)
    )
    assert torch.equal(blocks, expected)


def test_what_is_appended_is_what_is_attended(make_case, kernel):
    case = make_case(batch=2, tokens=75, dtype=torch.bfloat16)
    blocks = torch.full_like(case.blocks, 0xFF)
    for start, stop in ((0, 30), (30, 31), (31, 75)):
        ops.append_tokens(
            case.keys[:, :, start:stop],
            case.values[:, :, start:stop],
            ops.BlockView(blocks, case.table, case.layout),
            start,
        )
    assert torch.equal(case.attend(blocks=blocks).out, case.attend().out)
