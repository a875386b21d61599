"""What only a GPU's threads can get wrong: their order, memory that was never written, rounds."""

import pytest
import torch
from paged_case import PagedCase

from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.cores import CudaCore, out_pointers, state_pointers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 96), (256, 256), (17, 23)])
def test_any_order_of_threads_gives_the_same_bits(core, dims, dtype):
    case = PagedCase(2, 2, 6, 2, 300, *dims, 512, dtype)
    results = []
    for seed in range(4):
        core.set_seed(seed)
        results.append(case.attend())
    assert all(torch.equal(result.out, results[0].out) for result in results)
    assert all(torch.equal(result.lse, results[0].lse) for result in results)


# An odd number of rows: nothing behind the partials begins at 16 bytes.
@pytest.mark.parametrize(("group", "queries", "tokens"), [(16, 1, 500), (4, 30, 100), (3, 1, 2000)])
def test_many_rounds_give_the_bits_of_calls_that_need_one_each(core, group, queries, tokens):
    case = PagedCase(1, 1, group, queries, tokens, 64, 64, 4)
    blocks = case.table.shape[1]
    begin = tokens - queries
    needed = core.module.scratch_bytes(
        case.query.shape, case.view().core_arguments, tokens, begin, True, False
    )
    assert needed < 300 << 10  # all partials at once: 387 KiB and more
    whole = case.attend()
    pieces = ops.finish_attention(case.attend_in_pieces([1] * blocks, query_start=begin))
    assert torch.equal(whole.out, pieces.out)
    assert torch.equal(whole.lse, pieces.lse)


def test_scratch_memory_that_is_too_small_is_an_error_and_nothing_is_written(core):
    case = PagedCase()
    out, scratch = torch.full((1, case.heads, 1, 64), 7.0), torch.empty(16)
    with pytest.raises(RuntimeError, match="attend: the scratch memory is smaller"):
        core.module.attend(
            *(0, 1, 0, case.query.data_ptr(), case.query.shape, case.query.stride()),
            *(case.view().core_arguments, 40, 39, True, 1.0, 0.0, 0, None, None),
            out_pointers(out, torch.empty(0), None),
            *(scratch.data_ptr(), 64),
        )
    assert (out == 7.0).all()


@pytest.mark.parametrize("slot", [-1, 9, 2**30])
@pytest.mark.parametrize("dims", [(64, 64), (17, 23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slot_outside_the_slab_is_nan_and_no_other_row_is(core, slot, dims, dtype):
    case = PagedCase(2, 2, 2, 1, 40, *dims, 16, dtype)
    expected = case.attend()
    table = case.table.clone()
    table[1, 1] = slot
    out = torch.empty_like(expected.out)
    CudaCore.attend(  # past the check of the CPU's table
        core,
        *(case.query, case.view(table=table), case.call(), None),
        out_pointers(out, torch.empty(0), None),
    )
    assert torch.equal(out[0], expected.out[0])
    assert out[1].isnan().all()


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (80, 96)])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(core, dims):
    case = PagedCase(1, 2, 7, 3, 300, *dims, 256, torch.bfloat16)
    whole = case.attend()
    for query in range(3):
        rows = case.query[:, :, query : query + 1]
        alone = case.attend(query=rows, query_start=297 + query)
        assert torch.equal(alone.out[:, :, 0], whole.out[:, :, query])
        assert torch.equal(alone.lse[:, :, 0], whole.lse[:, :, query])


def test_a_query_that_does_not_begin_at_16_bytes_has_the_same_bits(core):
    case = PagedCase(1, 2, 3, 2, 300, 128, 128, 256, torch.bfloat16)
    wide = torch.zeros(1, case.heads, 2, 131, dtype=torch.bfloat16)
    wide[..., 3:] = case.query
    assert torch.equal(case.attend(query=wide[..., 3:]).out, case.attend().out)


def test_tokens_for_a_slot_outside_the_slab_are_not_written(core):
    case = PagedCase(2, tokens=30)
    blocks = torch.zeros_like(case.blocks)
    table = case.table.clone()
    table[0, 0] = blocks.shape[0]
    view = case.view(blocks=blocks, table=table)
    CudaCore.append(core, case.keys, case.values, view, 0)
    written = {int(slot) for slot in blocks.any(1).nonzero()}
    assert written == {int(slot) for slot in table.flatten()[1:]}


def test_an_unknown_device_is_an_error_in_words(core):
    case = PagedCase()
    state = ops.RunningState.begin(case.query, 64)
    pointers = state_pointers(state)
    with pytest.raises(RuntimeError, match=r"join: .*error 101"):
        core.module.join(7, 1, state.sum.numel(), 64, pointers, pointers)


def test_devices_say_who_they_are(core):
    assert core.module.device_count() == (2, "")
    assert core.module.device_properties(1) == {
        "name": "an emulated device",
        "capability": (9, 0),
        "pci_bus_id": "0000:01:00.0",
        "num_multiprocessors": 1,
        "memory_bytes": 1 << 30,
    }
