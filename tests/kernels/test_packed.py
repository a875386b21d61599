"""Packed blocks are attended with the bits of raw ones."""

import pytest
import torch

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.tiers.codecs import Bf16TwelveBit, Codec


@pytest.fixture(params=ops.available_kernels())
def cpu_kernel(request):
    with ops.use_kernel(request.param):
        yield request.param


def packed(case, every: int = 1) -> ops.BlockView:
    """The case's table with every `every`-th full column packed; the rest of its slots is NaN."""
    codec = Bf16TwelveBit(case.layout)
    blocks, table = case.blocks.clone(), case.table.clone()
    for column in range(0, case.tokens // case.block_tokens, every):
        for row in range(case.batch):
            slot = int(table[row, column])
            encoded = torch.zeros(codec.encoded_bytes, dtype=torch.uint8)
            assert codec.encode(case.blocks[slot], encoded)
            blocks[slot] = 0xFF
            blocks[slot, : codec.encoded_bytes] = encoded
            table[row, column] = ~slot
    return case.view(blocks=blocks, table=table, codec=codec)


def bits(case, view, **changes):
    state = ops.paged_attention(case.query, view, case.call(**changes))
    return state.out, state.lse


def check_same(case, **changes):
    expected = bits(case, case.view(), **changes)
    for every in (1, 2):
        found = bits(case, packed(case, every), **changes)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (4, 4), (8, 2), (7, 40), (3, 70)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 80), (256, 256), (192, 128), (33, 7)])
def test_bits_are_those_of_raw_blocks(cpu_kernel, make_case, rows, dims):
    group, queries = rows
    case = make_case(
        group=group,
        queries=queries,
        key_dim=dims[0],
        value_dim=dims[1],
        tokens=300,
        block_tokens=128,
        batch=2,
        dtype=torch.bfloat16,
    )
    check_same(case)


@pytest.mark.parametrize("queries", [2, 30])
def test_bits_are_the_same_whatever_is_attended(cpu_kernel, make_case, queries):
    case = make_case(queries=queries, tokens=230, block_tokens=64, batch=2, dtype=torch.bfloat16)
    mask = torch.rand(2, 1, queries, 230, generator=torch.Generator().manual_seed(0)) < 0.5
    starts = torch.tensor([70, 3], dtype=torch.int32)
    for changes in (
        {"starts": starts},
        {"mask": mask},
        {"causal": False, "softcap": 5.0},
        {"kv_tokens": 200, "starts": starts, "mask": mask},
        {"sinks": torch.randn(case.heads).bfloat16()},
        {"bias": torch.randn(1, 1, queries, 230)},  # only plain torch knows it
    ):
        check_same(case, **changes)


@pytest.mark.parametrize("queries", [1, 40])
def test_exceptions_are_attended_where_they_stand(cpu_kernel, make_case, queries):
    case = make_case(queries=queries, tokens=256, block_tokens=128, dtype=torch.bfloat16)
    case.keys[:, :, ::37, ::30] *= 2.0**-30  # some of them beyond what a code reaches
    case.values[:, :, 5::37, ::30] *= 2.0**30
    case.keys[:, :, :, 3], case.values[:, :, :, 4] = 0.0, -0.0  # of channels
    case.fill_blocks(len(case.blocks))
    check_same(case)


def test_pieces_and_threads_give_the_same_bits(cpu_kernel, make_case):
    case = make_case(tokens=500, block_tokens=64, group=3, queries=2, dtype=torch.bfloat16)
    expected, _ = bits(case, case.view())
    view, call = packed(case, 3), case.call()
    state = ops.RunningState.begin(case.query, case.value_dim)
    for first, last in ((0, 1), (1, 5), (5, 8)):
        piece = case.view(
            blocks=view.blocks,
            table=view.table[:, first:last],
            first_token=first * 64,
            codec=view.codec,
        )
        ops.attend_blocks(state, case.query, piece, call)
    assert torch.equal(ops.finish_attention(state, dtype=torch.bfloat16).out, expected)


def test_a_complemented_slot_without_a_codec_is_refused(make_case):
    case = make_case(dtype=torch.bfloat16)
    with ops.use_kernel(ops.available_kernels()[0]):
        if ops.backend() == "reference":
            pytest.skip("its slots are checked nowhere")
        with pytest.raises(UnsupportedInputError, match="got slot -"):
            case.attend(table=~case.table)
        outside = torch.full_like(case.table, ~len(case.blocks))
        with pytest.raises(UnsupportedInputError, match="got slot -"):
            case.attend(table=outside, codec=Bf16TwelveBit(case.layout))


def test_nothing_is_appended_to_a_packed_block(make_case):
    case = make_case(dtype=torch.bfloat16)
    view = packed(case)
    with ops.use_kernel(ops.available_kernels()[0]):
        if ops.backend() == "reference":
            pytest.skip("its slots are checked nowhere")
        with pytest.raises(UnsupportedInputError, match="got slot -"):
            ops.append_tokens(case.keys[:, :, :1], case.values[:, :, :1], view, 0)


@pytest.mark.parametrize("name", [name for name, kind in Codec.registry.items() if kind.exact])
def test_what_plain_torch_attends_is_decoded_by_any_codec(make_case, name):
    case = make_case(dtype=torch.bfloat16, tokens=40)
    codec = Codec.by_name(name)(case.layout)
    blocks, table = case.blocks.clone(), case.table.clone()
    slot = int(table[0, 0])
    codec.encode(case.blocks[slot], blocks[slot, : codec.encoded_bytes])
    table[0, 0] = ~slot
    with ops.use_kernel("reference"):
        expected = bits(case, case.view())
        found = bits(case, case.view(blocks=blocks, table=table, codec=codec))
    assert all(map(torch.equal, found, expected))
