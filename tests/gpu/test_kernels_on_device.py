"""Kernels of each device against float64: what tests/kernels asks of the CPU's, in small."""

import pytest
import torch
from kernels.conftest import PagedCase

from hf_tiered_cache.kernels import flash, ops
from hf_tiered_cache.layout import BlockLayout

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
# Largest error of any element; products of 16-bit weights are allowed, in prefill 16-bit partials.
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
ERROR_BAR = 1.3  # relative, over that of sdpa in the same dtype

# batch, kv_heads, group, queries, tokens, key_dim, value_dim, block_tokens
SHAPES = [
    # one query, few, many, over tails of every kind
    *((1, 2, 4, 1, tokens, 128, 128, 16) for tokens in (1, 15, 16, 17, 257)),
    *((1, 2, 4, 3, tokens, 128, 128, 16) for tokens in (3, 48, 129)),
    *((1, 2, 4, 40, tokens, 128, 128, 16) for tokens in (40, 255, 339)),
    # head sizes
    *((2, 1, 2, 1, 75, dim, dim, 16) for dim in (16, 64, 72, 80, 96, 128, 192, 256)),
    *((2, 1, 2, 33, 75, dim, dim, 16) for dim in (16, 64, 72, 80, 96, 128, 192, 256)),
    (1, 2, 2, 1, 50, 96, 72, 16),
    (1, 2, 2, 20, 50, 192, 128, 16),
    (1, 1, 3, 20, 50, 17, 23, 16),
    # grouped heads
    *((1, 2, group, 1, 100, 64, 64, 16) for group in (1, 2, 3, 7, 8, 16)),
    *((1, 2, group, 20, 100, 64, 64, 16) for group in (1, 2, 3, 7, 8, 16)),
    # default blocks
    (1, 8, 4, 1, 700, 128, 128, 256),
    (1, 2, 4, 100, 2500, 128, 128, 256),
    (1, 2, 7, 1, 1100, 64, 64, 512),
]


def place(case: PagedCase, device: torch.device) -> PagedCase:
    """Keep the case's blocks and table on the device."""
    case.blocks, case.table = case.blocks.to(device), case.table.to(device)
    return case


def attend(
    case: PagedCase, device: torch.device, sizes: list[int] | None = None, **how: object
) -> ops.AttentionState:
    """The finished state, on the CPU, after views of `sizes` blocks each; None: the whole table."""
    query = case.query.to(device)
    how = {name: one.to(device) if torch.is_tensor(one) else one for name, one in how.items()}
    call = case.call(**how)
    if sizes is None:
        state = ops.paged_attention(query, case.view(), call)
        return ops.AttentionState(state.out.cpu(), state.lse.cpu())
    running = ops.RunningState.begin(query, case.value_dim)
    column = 0
    for size in sizes:
        table = case.table[:, column : column + size]
        view = case.view(table=table, first_token=column * case.block_tokens)
        ops.attend_blocks(running, query, view, call)
        column += size
    state = ops.finish_attention(running, dtype=case.dtype, sinks=call.sinks)
    return ops.AttentionState(state.out.cpu(), state.lse.cpu())


def check(case: PagedCase, device: torch.device, **how: object) -> None:
    out, lse = case.expected(**how)
    result = attend(place(case, device), device, **how)
    limit = LIMITS[case.dtype]
    seen = lse > -torch.inf
    torch.testing.assert_close(result.out.double(), out, atol=limit, rtol=limit / 4)
    torch.testing.assert_close(result.lse.double()[seen], lse[seen], atol=limit / 4, rtol=1e-6)
    assert (result.lse[~seen] == -torch.inf).all()
    assert (result.out[~seen] == 0).all()


def same(a: ops.AttentionState, b: ops.AttentionState) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_a_whole_table_is_attended_as_in_float64(device, shape, dtype):
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("tests/kernels has these")
    check(PagedCase(*shape, dtype=dtype), device)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restrictions_mean_the_same_on_every_device(device, queries, dtype):
    def case(seed: int) -> PagedCase:
        return PagedCase(batch=3, queries=queries, tokens=90, dtype=dtype, seed=seed)

    random = torch.Generator().manual_seed(1)
    starts = torch.tensor([0, 17, 90], dtype=torch.int32)  # the last one attends nothing
    mask = torch.rand((3, 1, queries, 90), generator=random) < 0.5
    check(case(1), device, starts=starts)
    check(case(2), device, mask=mask)
    check(case(3), device, starts=starts, mask=mask)
    check(case(4), device, causal=False)
    check(case(5), device, softcap=3.0)
    check(case(6), device, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0]))
    for query_start in (-3, 0, 20, 100):
        check(case(7), device, query_start=query_start)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_nobody_attends_never_reaches_a_result(device, queries, dtype):
    case = PagedCase(batch=2, queries=queries, tokens=90, dtype=dtype)
    starts = torch.tensor([0, 37], dtype=torch.int32)
    clean = attend(place(case, device), device, starts=starts)
    slots = case.table[1].long()
    for position in range(37):
        for plane in (case.layout.keys, case.layout.values):
            plane(case.blocks)[slots[position // 16], :, position % 16] = torch.nan
    poisoned = attend(case, device, starts=starts)
    assert poisoned.out.isfinite().all()
    assert same(clean, poisoned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 60])
def test_splits_and_slots_change_no_bit(device, queries, dtype):
    """Few queries may be split anywhere; many at groups."""
    case = place(PagedCase(batch=2, queries=queries, tokens=700, dtype=dtype), device)
    group = flash.group_columns(case.layout)
    columns = case.table.shape[1]
    whole = attend(case, device, [columns])
    assert same(whole, attend(case, device)), "one call and a running state"
    for sizes in ([group] * 3, [2 * group, group], [0, 3 * group]):
        assert same(whole, attend(case, device, sizes))
    if queries < flash.MIN_QUERIES:
        assert same(whole, attend(case, device, [1] * columns))
        assert same(whole, attend(case, device, [5, 1, columns]))
    order = torch.randperm(case.blocks.shape[0], generator=torch.Generator().manual_seed(5))
    order = order.to(device)
    moved = torch.empty_like(case.blocks)
    moved[order] = case.blocks
    case.blocks, case.table = moved, order[case.table.long()].int()
    assert same(whole, attend(case, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("queries", [1, 300])
def test_relative_error_is_at_most_1_3_times_that_of_sdpa(device, queries, dtype):
    case = PagedCase(1, 2, 4, queries, 5000, 128, 128, 256, dtype=dtype)
    expected, _ = case.expected()
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        case.query.to(device),
        case.keys.repeat_interleave(4, 1).to(device),
        case.values.repeat_interleave(4, 1).to(device),
        attn_mask=case.allowed().to(device),
        scale=case.scale,
    )
    ours = attend(place(case, device), device).out

    def error(out: torch.Tensor) -> float:
        return float((out.cpu().double() - expected).norm() / expected.norm())

    assert error(ours) <= ERROR_BAR * error(sdpa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (5, 3), (15, 2), (16, 16), (7, 100)])
def test_tokens_land_where_the_layout_says(device, start, tokens, dtype):
    layout = BlockLayout(3, 24, 40, 16, dtype)
    columns = layout.num_blocks(start + tokens)
    table = torch.randperm(2 * columns, generator=torch.Generator().manual_seed(3)).view(2, -1)
    keys, values = (torch.randn(2, tokens, 3, dim).to(dtype).transpose(1, 2) for dim in (24, 40))
    written = []
    for where in ("cpu", device):
        blocks = torch.zeros(2 * columns, layout.num_bytes, dtype=torch.uint8, device=where)
        view = ops.BlockView(blocks, table.int().to(where), layout)
        ops.append_tokens(keys.to(where), values.to(where), view, start)
        written.append(blocks.cpu())
    assert torch.equal(*written)


def test_states_of_two_parts_merge_to_the_whole(device):
    case = place(PagedCase(batch=2, tokens=100), device)
    query = case.query.to(device)
    parts = []
    for first, last in ((0, 3), (3, 7)):
        view = case.view(table=case.table[:, first:last], first_token=16 * first)
        parts.append(ops.paged_attention(query, view, case.call()))
    merged = ops.merge_attention_states(*parts)
    out, lse = case.expected()
    torch.testing.assert_close(merged.out.cpu().double(), out, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.lse.cpu().double(), lse, atol=1e-5, rtol=1e-6)
