"""What holds for every kernel: bits, empty rows, poison, error, merging."""

import pytest
import torch

from hf_tiered_cache.kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(a: ops.AttentionState, b: ops.AttentionState) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 60])
@pytest.mark.parametrize("sizes", [[1] * 9, [3, 1, 5], [8, 1], [0, 9], [2, 2, 2, 2, 1, 4]])
def test_any_splitting_of_the_table_gives_the_same_bits(make_case, kernel, queries, sizes, dtype):
    case = make_case(batch=2, group=3, queries=queries, tokens=139, key_dim=80, dtype=dtype)
    starts = torch.tensor([3, 40], dtype=torch.int32)
    sinks = torch.linspace(-1, 1, case.heads)
    whole = case.attend(starts=starts, sinks=sinks)
    state = case.attend_in_pieces(sizes, starts=starts)
    assert same(whole, ops.finish_attention(state, dtype=dtype, sinks=sinks))


@pytest.mark.parametrize("queries", [1, 100])
def test_splitting_inside_large_blocks_gives_the_same_bits(make_case, kernel, queries):
    case = make_case(queries=queries, tokens=2000, block_tokens=512)
    whole = case.attend()
    assert same(whole, ops.finish_attention(case.attend_in_pieces([1, 1, 2])))


def test_many_small_blocks_are_folded_in_bounded_rounds_with_the_same_bits(make_case, kernel):
    # 700 blocks x 3 x 32 rows x 130 floats of partials: more than one round of the decode kernel.
    case = make_case(batch=3, kv_heads=2, group=16, tokens=700, key_dim=16, value_dim=128)
    case_small = make_case(
        batch=3, kv_heads=2, group=16, tokens=700, key_dim=16, value_dim=128, block_tokens=4
    )
    for each in (case, case_small):
        half = each.table.shape[1] // 2
        pieces = each.attend_in_pieces([half, each.table.shape[1] - half])
        assert same(each.attend(), ops.finish_attention(pieces))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 90])
def test_slots_do_not_matter(make_case, kernel, queries, dtype):
    case = make_case(batch=2, queries=queries, tokens=150, dtype=dtype)
    first = case.attend()
    slots = case.blocks.shape[0]
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(5))
    moved = torch.empty_like(case.blocks)
    moved[order] = case.blocks
    assert same(first, case.attend(blocks=moved, table=order[case.table.long()].int()))


@pytest.mark.parametrize("queries", [1, 90])
def test_batching_does_not_matter(make_case, kernel, queries):
    if kernel == "reference":
        pytest.skip("torch's matmul may depend on the batch")
    case = make_case(batch=3, queries=queries, tokens=150)
    together = case.attend()
    for row in range(3):
        alone = case.attend(query=case.query[row : row + 1], table=case.table[row : row + 1])
        assert torch.equal(alone.out[0], together.out[row])


# ---- empty rows and poison -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_rows_that_attend_nothing_are_zero_and_minus_infinity(make_case, kernel, queries, dtype):
    case = make_case(batch=2, queries=queries, tokens=70, dtype=dtype)
    starts = torch.tensor([70, 5], dtype=torch.int32)
    mask = torch.ones(1, case.heads, 1, 70, dtype=torch.bool)
    mask[:, 1] = False
    result = case.attend(starts=starts, mask=mask)
    assert (result.out[0] == 0).all()
    assert (result.lse[0] == -torch.inf).all()
    assert (result.out[1, 1] == 0).all()
    assert (result.lse[1, 1] == -torch.inf).all()
    assert result.lse[1, 0].isfinite().all()


@pytest.mark.parametrize("queries", [1, 40])
def test_an_empty_table_attends_nothing(make_case, kernel, queries):
    case = make_case(queries=queries)
    result = case.attend(table=case.table[:, :0], kv_tokens=0)
    assert (result.out == 0).all()
    assert (result.lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 40])
def test_nan_where_nothing_may_be_attended_stays_there(make_case, kernel, queries, dtype):
    case = make_case(batch=2, queries=queries, tokens=90, key_dim=72, value_dim=80, dtype=dtype)
    starts = torch.tensor([0, 37], dtype=torch.int32)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[0, ..., 20:23] = False
    mask[0, ..., 64:80] = False
    clean = case.attend(starts=starts, mask=mask)
    keys, values = case.layout.keys(case.blocks), case.layout.values(case.blocks)
    for sequence, positions in ((0, [20, 21, 22, *range(64, 80)]), (1, range(37))):
        for position in positions:
            slot = case.table[sequence, position // 16].long()
            keys[slot, :, position % 16] = torch.nan
            values[slot, :, position % 16] = torch.nan
    poisoned = case.attend(starts=starts, mask=mask)
    assert poisoned.out.isfinite().all()
    assert same(clean, poisoned)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("plane", ["keys", "values"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_what_is_attended_is_not_hidden(make_case, kernel, queries, plane, dtype):
    case = make_case(queries=queries, tokens=60, dtype=dtype)
    slot = case.table[0, 0].long()
    getattr(case.layout, plane)(case.blocks)[slot, 1, 3] = torch.nan  # kv_head 1, token 3
    out = case.attend().out
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()


# ---- error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "tokens", "dim"), [(1, 4096, 128), (1, 700, 64), (64, 1500, 128), (300, 300, 80)]
)
def test_error_is_at_most_twice_that_of_sdpa(make_case, kernel, queries, tokens, dim, dtype):
    case = make_case(
        kv_heads=2,
        group=4,
        queries=queries,
        tokens=tokens,
        key_dim=dim,
        value_dim=dim,
        block_tokens=256,
        dtype=dtype,
    )
    expected, _ = case.expected()
    ours = (case.attend().out.double() - expected).abs().max().item()
    torchs = (case.sdpa().double() - expected).abs().max().item()
    assert ours <= 2 * torchs


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 40])
def test_states_of_two_parts_merge_to_the_whole(make_case, kernel, queries):
    case = make_case(batch=2, queries=queries, tokens=100)
    starts = torch.tensor([0, 50], dtype=torch.int32)  # the first part of sequence 1 is empty
    common = {"starts": starts, "query_start": 100 - queries}
    left = case.attend(table=case.table[:, :3], **common)
    right = case.attend(table=case.table[:, 3:], first_token=48, **common)
    whole, lse = case.expected(starts=starts)
    for a, b in ((left, right), (right, left)):
        merged = ops.merge_attention_states(a, b)
        torch.testing.assert_close(merged.out.double(), whole, atol=4e-6, rtol=0)
        torch.testing.assert_close(merged.lse.double(), lse, atol=4e-6, rtol=1e-6)


def test_merging_two_empty_states_is_empty():
    empty = ops.AttentionState(torch.zeros(1, 2, 3, 8), torch.full((1, 2, 3), -torch.inf))
    merged = ops.merge_attention_states(empty, empty)
    assert (merged.out == 0).all()
    assert (merged.lse == -torch.inf).all()


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_states_of_two_parts_join_to_the_whole(
    make_case, kernel, tolerance, queries, dtype
):
    case = make_case(batch=2, queries=queries, tokens=100, value_dim=80, dtype=dtype)
    starts = torch.tensor([0, 50], dtype=torch.int32)  # the first part of sequence 1 is empty
    common = {"starts": starts, "query_start": 100 - queries}
    whole, lse = case.expected(starts=starts)
    out_limit, lse_limit = tolerance(kernel, dtype)
    for columns in ((slice(0, 3), slice(3, None)), (slice(3, None), slice(0, 3))):
        states = [part_of(case, part, **common) for part in columns]
        before = states[1].acc.clone()
        ops.join_states(*states)
        assert torch.equal(states[1].acc, before)
        joined = ops.finish_attention(states[0])
        torch.testing.assert_close(joined.out.double(), whole, atol=out_limit, rtol=0)
        torch.testing.assert_close(joined.lse.double(), lse, atol=lse_limit, rtol=1e-6)


def part_of(case, columns: slice, **common) -> ops.RunningState:
    """The running state over some columns of the case's table."""
    state = ops.RunningState.begin(case.query, case.value_dim)
    first = (columns.start or 0) * case.block_tokens
    view = case.view(table=case.table[:, columns], first_token=first)
    ops.attend_blocks(state, case.query, view, case.call(**common))
    return state


@pytest.mark.parametrize("queries", [1, 5])
def test_joining_nothing_changes_nothing(make_case, kernel, queries):
    case = make_case(queries=queries, tokens=60)
    state = case.attend_in_pieces([4])
    other = ops.RunningState.begin(case.query, case.value_dim)
    expected = ops.finish_attention(state)
    ops.join_states(state, other)
    assert same(ops.finish_attention(state), expected)
    ops.join_states(other, state)
    assert same(ops.finish_attention(other), expected)
    nothing = ops.RunningState.begin(case.query, case.value_dim)
    ops.join_states(nothing, ops.RunningState.begin(case.query, case.value_dim))
    assert (ops.finish_attention(nothing).lse == -torch.inf).all()
