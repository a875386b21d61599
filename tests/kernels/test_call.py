"""One value says what a kernel must know, and none passes over a fact that it does not know."""

import pytest
import torch
from paged_case import PagedCase

from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import cores, flash, ops, reference, worker
from hf_tiered_cache.kernels.call import AttentionCall


class WindowedCall(AttentionCall):
    """A call with a fact that nothing here knows: as if somebody added a field."""

    _fields = (*AttentionCall._fields, "window")
    window: int | None = 4


def windowed(case: PagedCase, **facts: object) -> WindowedCall:
    return WindowedCall(*case.call(**facts))


@pytest.mark.parametrize("queries", [1, 20])
def test_an_unknown_fact_is_refused_before_anything_is_written(make_case, kernel, queries):
    case = make_case(queries=queries, tokens=60)
    out = torch.full((1, case.heads, queries, 64), 7.0)
    with pytest.raises(UnsupportedInputError, match="got window, expected nothing beyond"):
        ops.paged_attention(case.query, case.view(), windowed(case), out=out)
    assert (out == 7.0).all()
    state = ops.RunningState.begin(case.query, case.value_dim)
    with pytest.raises(UnsupportedInputError, match="got window, expected nothing beyond"):
        ops.attend_blocks(state, case.query, case.view(), windowed(case))
    assert (state.sum == 0).all() and (state.acc == 0).all()


@pytest.mark.parametrize("attend", [reference.attend_blocks, flash.attend_blocks])
def test_a_kernel_without_a_core_refuses_it_too(make_case, attend):
    case = make_case(queries=20, tokens=60)
    state = ops.RunningState.begin(case.query, case.value_dim)
    with pytest.raises(UnsupportedInputError, match="window"):
        attend(state, case.query, case.view(), windowed(case))
    assert (state.sum == 0).all() and (state.acc == 0).all()


def test_a_thread_beside_a_device_is_not_given_it(make_case):
    case = make_case(tokens=60)
    assert InPlaceAttention.can_attend(case.query, case.kv_heads, case.call())
    assert not InPlaceAttention.can_attend(case.query, case.kv_heads, windowed(case))
    words = torch.zeros(2, dtype=torch.int32)  # nobody raises the first: nothing is attended
    flags = (words[:1].data_ptr(), words[1:].data_ptr())
    state = ops.RunningState.begin(case.query, case.value_dim)
    thread = worker.AttentionWorker()
    try:
        with pytest.raises(UnsupportedInputError, match="CPU's thread: got window, expected"):
            thread.submit(case.query, [case.view()], state, flags, 1, windowed(case))
    finally:
        thread.close()


def test_a_new_fact_that_is_not_given_changes_nothing(make_case, kernel):
    case = make_case(tokens=60)
    call = windowed(case)
    call.window = None
    expected = ops.paged_attention(case.query, case.view(), case.call())
    assert torch.equal(ops.paged_attention(case.query, case.view(), call).out, expected.out)


def test_a_name_that_is_no_fact_is_no_call(make_case):
    with pytest.raises(TypeError, match="window"):
        make_case().call(window=4)


def test_a_call_cannot_be_changed(make_case):
    with pytest.raises(AttributeError):
        make_case().call().scale = 1.0


def test_what_a_kernel_knows_is_part_of_a_call():
    for where in (cores, flash, reference, worker):
        assert set(AttentionCall._fields) >= where.KNOWN_FACTS, where.__name__
    assert set(AttentionCall._fields) == reference.KNOWN_FACTS, "somebody must do every call"


def test_sinks_of_other_heads_are_refused_before_a_block_is_folded(make_case, kernel):
    case = make_case(tokens=60)
    with pytest.raises(UnsupportedInputError, match=r"sinks: got \[3\] on cpu, expected"):
        case.attend_in_pieces([4], sinks=torch.zeros(3))
