"""What may be handed in, and what is refused before anything is written."""

from types import SimpleNamespace

import pytest
import torch

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.cores import CudaCore
from hf_tiered_cache.layout import BlockLayout


@pytest.mark.parametrize("queries", [1, 40])
def test_query_of_any_strides(make_case, kernel, queries):
    case = make_case(batch=2, queries=queries, tokens=60)
    expected = case.attend()
    transposed = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.attend(query=transposed).out, expected.out)
    wide = torch.randn(2, case.heads, queries, 2 * case.key_dim)
    wide[..., : case.key_dim] = case.query
    assert torch.equal(case.attend(query=wide[..., : case.key_dim]).out, expected.out)


def test_query_with_a_strided_last_dimension_goes_the_slower_way(make_case, kernel):
    case = make_case(tokens=60)
    strided = case.query.mT.contiguous().mT.repeat(1, 1, 2, 1)[:, :, ::2]
    strided = torch.stack([strided, strided], -1)[..., 0]
    assert strided.stride(-1) == 2
    torch.testing.assert_close(case.attend(query=strided).out, case.attend().out)


def test_query_of_another_dtype_goes_the_slower_way(make_case, kernel):
    case = make_case(tokens=60, dtype=torch.bfloat16)
    result = case.attend(query=case.query.float())
    expected, _ = case.expected()
    assert result.out.dtype == torch.float32
    torch.testing.assert_close(result.out.double(), expected, atol=4e-6, rtol=0)
    assert "query" in " ".join(
        ops.not_supported_reasons(case.query.float(), case.layout, case.call())
    )


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_out_of_any_strides_is_written(make_case, kernel, queries, dtype):
    case = make_case(batch=2, queries=queries, tokens=60, dtype=dtype)
    expected = case.attend().out
    token_major = torch.empty(2, queries, case.heads, case.value_dim, dtype=dtype)
    result = case.attend(out=token_major.transpose(1, 2))
    assert result.out.data_ptr() == token_major.data_ptr()
    assert torch.equal(token_major.transpose(1, 2), expected)
    dim_first = torch.empty(case.value_dim, 2, queries, case.heads, dtype=dtype)
    case.attend(out=dim_first.permute(1, 3, 2, 0))
    assert torch.equal(dim_first.permute(1, 3, 2, 0), expected)


def test_table_with_strided_rows_and_slab_with_strided_slots(make_case, kernel):
    case = make_case(batch=2, tokens=60)
    expected = case.attend().out
    table = torch.full((2, 20), -1, dtype=torch.int32)
    table[:, : case.table.shape[1]] = case.table
    assert torch.equal(case.attend(table=table[:, : case.table.shape[1]]).out, expected)
    slab = torch.zeros(case.blocks.shape[0], 2 * case.layout.num_bytes, dtype=torch.uint8)
    slab[:, : case.layout.num_bytes] = case.blocks
    assert torch.equal(case.attend(blocks=slab[:, : case.layout.num_bytes]).out, expected)


def test_finish_leaves_the_state_and_writes_out_of_any_dtype(make_case, kernel):
    case = make_case(tokens=60)
    state = case.attend_in_pieces([4])
    before = state.acc.clone()
    half = ops.finish_attention(state, dtype=torch.float16)
    out = torch.empty(1, 1, case.heads, case.value_dim, dtype=torch.bfloat16).transpose(1, 2)
    ops.finish_attention(state, out=out)
    full = ops.finish_attention(state)
    assert torch.equal(state.acc, before)
    assert torch.equal(half.out, full.out.half())
    assert torch.equal(out, full.out.bfloat16())


BAD_CALLS = {
    "query has 3 dimensions": lambda c: {"query": c.query[0]},
    "query of another key_dim": lambda c: {"query": c.query[..., :-1]},
    "heads no multiple of kv_heads": lambda c: {"query": c.query[:, :3]},
    "integer query": lambda c: {"query": c.query.int()},
    "table of int64": lambda c: {"table": c.table.long()},
    "table of another batch": lambda c: {"table": c.table[:1]},
    "table with one dimension": lambda c: {"table": c.table[0]},
    "slot outside the slab": lambda c: {"table": c.table + 100},
    "negative slot": lambda c: {"table": c.table - 100},
    "blocks of floats": lambda c: {"blocks": c.blocks.float()},
    "blocks too short": lambda c: {"blocks": c.blocks[:, : c.layout.data_bytes - 4]},
    "first_token inside a block": lambda _: {"first_token": 3},
    "negative kv_tokens": lambda _: {"kv_tokens": -1},
    "starts of int64": lambda _: {"starts": torch.zeros(2, dtype=torch.int64)},
    "starts of another batch": lambda _: {"starts": torch.zeros(3, dtype=torch.int32)},
    "float mask": lambda _: {"mask": torch.zeros(1, 1, 1, 60)},
    "mask too short": lambda _: {"mask": torch.ones(1, 1, 1, 59, dtype=torch.bool)},
    "mask of other heads": lambda _: {"mask": torch.ones(1, 3, 1, 60, dtype=torch.bool)},
    "bool bias": lambda _: {"bias": torch.ones(1, 1, 1, 60, dtype=torch.bool)},
    "sinks of other heads": lambda _: {"sinks": torch.zeros(3)},
    "out of another dtype": lambda _: {"out": torch.zeros(2, 4, 1, 64).half()},
    "out of another shape": lambda _: {"out": torch.zeros(2, 4, 1, 63)},
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_attention_input_is_refused(make_case, kernel, name):
    if kernel == "reference" and "slot" in name:
        pytest.skip("torch's own index error")
    case = make_case(batch=2, tokens=60)
    changes = {"out": torch.full((2, 4, 1, 64), 7.0), **BAD_CALLS[name](case)}
    with pytest.raises(UnsupportedInputError, match=r"got .*expected"):
        case.attend(**changes)
    if changes["out"].dtype == torch.float32 and changes["out"].shape[-1] == 64:
        assert (changes["out"] == 7.0).all()


def test_bad_state_is_refused(make_case, kernel):
    case = make_case(tokens=60)
    for other in (make_case(batch=2), make_case(value_dim=32), make_case(queries=2)):
        state = ops.RunningState.begin(other.query, other.value_dim)
        with pytest.raises(UnsupportedInputError, match=r"state: got .*expected"):
            ops.attend_blocks(state, case.query, case.view(), case.call())


def test_states_of_other_queries_do_not_join(make_case, kernel):
    state = make_case(tokens=60).attend_in_pieces([4])
    for other in (make_case(batch=2), make_case(value_dim=32), make_case(dtype=torch.float64)):
        with pytest.raises(UnsupportedInputError, match=r"other state: got .*expected"):
            ops.join_states(state, ops.RunningState.begin(other.query, other.value_dim))


BAD_APPENDS = {
    "keys of another dtype": lambda a: {**a, "keys": a["keys"].half()},
    "keys of other heads": lambda a: {**a, "keys": a["keys"][:, :1]},
    "values of another dim": lambda a: {**a, "values": a["values"][..., :-1]},
    "values of other tokens": lambda a: {**a, "values": a["values"][:, :, :-1]},
    "table too short": lambda a: {**a, "table": a["table"][:, :2]},
    "table of another batch": lambda a: {**a, "table": a["table"][:1]},
    "negative start": lambda a: {**a, "start_token": -1},
    "last slot outside the slab": lambda a: {**a, "table": a["table"] + 1},
}


@pytest.mark.parametrize("name", BAD_APPENDS)
def test_bad_append_writes_nothing(kernel, name):
    if kernel == "reference" and "slot" in name:
        pytest.skip("torch's own index error")
    layout = BlockLayout(2, 16, 24, 8, torch.float32)
    blocks = torch.zeros(6, layout.num_bytes, dtype=torch.uint8)
    arguments = {
        "keys": torch.randn(2, 2, 20, 16),
        "values": torch.randn(2, 2, 20, 24),
        "table": torch.arange(6, dtype=torch.int32).view(2, 3),
        "start_token": 3,
    }
    arguments = BAD_APPENDS[name](arguments)
    table = arguments.pop("table")
    with pytest.raises(UnsupportedInputError, match=r"got .*expected"):
        ops.append_tokens(view=ops.BlockView(blocks, table, layout), **arguments)
    assert (blocks == 0).all()


# ---- blocks on a device (meta: a device without memory) ------------------------------------------


def test_a_table_on_the_cpu_is_sent_to_the_device_of_the_blocks(make_case):
    case = make_case(batch=2, tokens=60)
    view = case.view(blocks=case.blocks.to("meta"))
    assert view.table.is_cpu
    assert view.device_table.device.type == "meta"
    assert view.device_table.shape == view.table.shape
    assert case.view().device_table is case.table


@pytest.mark.parametrize("shift", [-100, 100])
def test_slots_for_a_device_are_checked_on_the_cpu(make_case, shift):
    case = make_case(batch=2, tokens=60)
    with pytest.raises(UnsupportedInputError, match=r"table slots: got .*expected 0 \.\."):
        case.view(blocks=case.blocks.to("meta"), table=case.table + shift)


def test_a_table_on_another_device_is_refused(make_case):
    case = make_case(tokens=60)
    with pytest.raises(UnsupportedInputError, match=r"table device: got meta, expected cpu"):
        case.view(table=case.table.to("meta"))


def test_a_device_without_a_core_is_a_reason(make_case):
    case = make_case(tokens=60)
    reasons = ops.not_supported_reasons(case.query.to("meta"), case.layout, case.call())
    assert reasons == ["query on device meta: compiled kernels are for cpu and cuda"]


def test_a_table_that_another_stream_reads_is_not_reused_under_it(make_case, monkeypatch):
    """A cache that goes from one CUDA stream to another, whose order is the caller's, keeps the
    table that it made on the first."""
    case = make_case()
    view = case.view()
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "the second")
    module = SimpleNamespace(
        scratch_bytes=lambda *_: 0, attend=lambda *_: None, append=lambda *_: None
    )
    core = CudaCore(module, place=lambda _: (0, 22))
    query, new = case.query, torch.zeros(case.batch, case.kv_heads, 1, case.key_dim)
    for made_on, expected in ((None, 0), (22, 0), (11, 2)):
        object.__setattr__(view, "table_stream", made_on)
        core.attend(query, view, case.call(), None, None)
        core.append(new, new, view, 0)
        assert recorded == ["the second"] * expected
