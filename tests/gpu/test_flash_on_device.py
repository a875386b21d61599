"""torch's flash attention on each device: what tests/kernels/test_flash.py knows of the CPU's."""

import pytest
import torch
from kernels.conftest import PagedCase

from hf_tiered_cache.kernels import flash, ops

LIMITS = {torch.bfloat16: 4e-2, torch.float16: 5e-3}
DIMS = [64, 72, 80, 96, 128, 192, 256]


def attend(
    case: PagedCase, device: torch.device, sizes: list[int] | None = None, **changes: object
) -> ops.AttentionState:
    """The finished state, on the CPU, after views of `sizes` groups each; None: the whole table."""
    query, blocks, table = (one.to(device) for one in (case.query, case.blocks, case.table))
    columns = flash.group_columns(case.layout)
    call = case.call(**changes)
    if call.starts is not None:
        call = call._replace(starts=call.starts.to(device))
    state = ops.RunningState.begin(query, case.value_dim)
    column = 0
    for size in [table.shape[1]] if sizes is None else [columns * size for size in sizes]:
        view = case.view(
            blocks=blocks,
            table=table[:, column : column + size],
            first_token=column * case.block_tokens,
        )
        flash.attend_blocks(state, query, view, call)
        column += size
    result = ops.finish_attention(state)
    return ops.AttentionState(result.out.cpu(), result.lse.cpu())


def check(case: PagedCase, device: torch.device, **changes: object) -> None:
    out, lse = case.expected(
        **{name: changes[name] for name in ("causal", "starts", "query_start") if name in changes}
    )
    result = attend(case, device, **changes)
    limit, seen = LIMITS[case.dtype], lse > -torch.inf
    torch.testing.assert_close(result.out.double(), out, atol=limit, rtol=0)
    torch.testing.assert_close(result.lse.double()[seen], lse[seen], atol=limit / 4, rtol=1e-6)
    assert (result.lse[~seen] == -torch.inf).all()
    assert (result.out[~seen] == 0).all()


@pytest.fixture(autouse=True)
def once_on_the_cpu(request: pytest.FixtureRequest) -> None:
    """On the CPU float16 is left to tests/kernels/test_flash.py."""
    chosen = request.node.callspec.params
    if chosen["device"] == "cpu" and chosen.get("dtype") == torch.float16:
        pytest.skip("tests/kernels/test_flash.py has it")


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_size(device, dim, dtype):
    check(PagedCase(2, 1, 2, 70, 300, dim, dim, 4, dtype), device)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_grouped_heads(device, group):
    check(PagedCase(1, 2, group, 70, 300, 128, 128, 4, torch.bfloat16), device)


@pytest.mark.parametrize("start", [-100, -3, 0, 1, 63, 64, 65, 127, 149, 150, 999])
def test_queries_may_stand_anywhere(device, start):
    """Squares of one query and of one token among them."""
    case = PagedCase(2, 1, 4, 64, 150, 64, 64, 4, torch.bfloat16)
    check(case, device, query_start=start)


@pytest.mark.parametrize("causal", [True, False])
def test_left_padding(device, causal):
    case = PagedCase(3, 2, 2, 60, 150, 64, 64, 4, torch.bfloat16)
    starts = torch.tensor([0, 63, 149], dtype=torch.int32)
    check(case, device, starts=starts, causal=causal)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("query_start", [250, 256, 5])
def test_any_splitting_at_groups_gives_the_same_bits(device, query_start, dtype):
    case = PagedCase(2, 2, 3, 99, 379, 80, 80, 4, dtype)
    whole = attend(case, device, query_start=query_start)
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        parts = attend(case, device, sizes, query_start=query_start)
        assert torch.equal(whole.out, parts.out) and torch.equal(whole.lse, parts.lse)


def test_nan_is_neither_invented_nor_hidden(device):
    case = PagedCase(1, 2, 2, 40, 150, 64, 64, 4, torch.bfloat16)
    assert attend(case, device, kv_tokens=141).out.isfinite().all(), "unused positions are NaN"
    case.layout.keys(case.blocks)[case.table[0, 0].long(), 1, 3] = torch.nan
    out = attend(case, device).out
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()
