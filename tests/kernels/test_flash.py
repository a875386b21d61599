"""Prefill by torch's flash attention: what `reference` means, in bits that no splitting changes."""

from types import SimpleNamespace

import pytest
import torch

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import flash, ops, reference
from hf_tiered_cache.layout import BlockLayout

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-12}
GROUP = 64  # tokens, of blocks of 4: 16 blocks

# batch, kv_heads, group, queries, tokens, head_dim, block_tokens
SHAPES = [
    (1, 2, 1, 16, 16, 64, 4),
    (2, 1, 4, 17, 63, 64, 4),
    (1, 2, 4, 64, 64, 80, 4),
    (3, 1, 7, 30, 129, 96, 4),
    (1, 1, 8, 200, 339, 128, 16),
    (2, 2, 2, 100, 300, 256, 4),
    (1, 2, 7, 90, 4500, 128, 256),  # default blocks: three groups, the last one ragged
    (1, 1, 4, 700, 700, 64, 16),
]


def attend(case, sizes=None, how=flash.attend_blocks, **changes) -> ops.RunningState:
    """The state after consecutive views of `sizes` groups each, or one of the whole table."""
    columns = flash.group_columns(case.layout)
    sizes = [case.table.shape[1]] if sizes is None else [columns * size for size in sizes]
    state = ops.RunningState.begin(case.query, case.value_dim)
    column = 0
    for size in sizes:
        view = case.view(
            table=case.table[:, column : column + size],
            first_token=column * case.block_tokens,
        )
        how(state, case.query, view, case.call(**changes))
        column += size
    assert column >= case.table.shape[1]
    return state


def same(a: ops.RunningState, b: ops.RunningState) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("acc", "max", "sum"))


def make(make_case, shape, dtype=torch.float32, **more):
    *head, dim, block_tokens = shape
    return make_case(*head, dim, dim, block_tokens, dtype=dtype, **more)


def test_starts_are_read_once_for_all_chunks_and_layers(make_case, monkeypatch):
    """Each time is a wait for the device."""
    case = make(make_case, (2, 1, 1, 16, 130, 64, 4))
    starts = torch.tensor([3, 40], dtype=torch.int32)
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor,
        "tolist",
        lambda self: (reads.append(self.data_ptr() == starts.data_ptr()), tolist(self))[1],
    )
    for _layer in range(3):
        state = attend(case, sizes=[1, 1, 1], starts=starts)
    assert sum(reads) == 1
    starts.fill_(0)  # a change is seen
    changed = attend(case, sizes=[1, 1, 1], starts=starts)
    assert sum(reads) == 2
    assert not same(state, changed)
    assert same(changed, attend(case, sizes=[1, 1, 1], starts=starts.clone()))


def check(case, **changes) -> None:
    """Against float64 by the textbook."""
    result = ops.finish_attention(attend(case, **changes))
    names = ("causal", "starts", "query_start")
    out, lse = case.expected(**{name: changes[name] for name in names if name in changes})
    limit = LIMITS[case.dtype]
    attended = lse > -torch.inf
    torch.testing.assert_close(result.out.double(), out, atol=limit, rtol=0)
    torch.testing.assert_close(
        result.lse.double()[attended], lse[attended], atol=limit / 4, rtol=1e-6
    )
    assert (result.lse[~attended] == -torch.inf).all()
    assert (result.out[~attended] == 0).all()


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_causal_prefill_over_every_shape(make_case, shape, dtype):
    check(make(make_case, shape, dtype))


def test_float64_is_computed_in_float64(make_case):
    check(make(make_case, (2, 2, 2, 40, 150, 64, 4), torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_causality_every_query_sees_every_token(make_case, dtype):
    check(make(make_case, (2, 2, 2, 40, 150, 64, 4), dtype), causal=False)


@pytest.mark.parametrize("queries", [16, 64, 150])
@pytest.mark.parametrize("start", [-100, -3, 0, 1, 50, 63, 64, 65, 127, 128, 149, 150, 151, 999])
def test_queries_may_stand_anywhere(make_case, queries, start):
    """Also before the first token, behind the last one, and with tokens behind the last query."""
    check(make(make_case, (2, 1, 2, queries, 150, 64, 4)), query_start=start)


@pytest.mark.parametrize("starts", [(0, 17, 149), (64, 63, 65), (-5, 150, 400), (70, 70, 0)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_is_not_attended(make_case, starts, causal, dtype):
    case = make(make_case, (3, 2, 2, 60, 150, 64, 4), dtype)
    check(case, starts=torch.tensor(starts, dtype=torch.int32), causal=causal)


def test_a_view_that_begins_behind_all_queries_leaves_the_state_alone(make_case):
    case = make(make_case, (1, 2, 2, 40, 150, 64, 4))
    state = attend(case)
    before = ops.RunningState(state.acc.clone(), state.max.clone(), state.sum.clone())
    later = case.view(table=case.table[:, 32:], first_token=128)
    flash.attend_blocks(state, case.query, later, case.call(query_start=80))
    assert same(state, before)


def test_random_calls_mean_what_the_reference_means(make_case):
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    for seed in range(60):
        shape = (draw(1, 4), draw(1, 3), draw(1, 9), draw(16, 150), draw(1, 400), 8 * draw(2, 20))
        case = make(make_case, (*shape, (4, 8, 16)[draw(0, 3)]), seed=seed)
        starts = torch.randint(-5, case.tokens + 5, (case.batch,), generator=random).int()
        changes = {
            "causal": draw(0, 4) > 0,
            "query_start": draw(-20, case.tokens + 20),
            "starts": starts if draw(0, 2) else None,
            "kv_tokens": draw(0, case.tokens + 1),
        }
        ours = ops.finish_attention(attend(case, **changes))
        theirs = ops.finish_attention(attend(case, how=reference.attend_blocks, **changes))
        torch.testing.assert_close(ours.out, theirs.out, atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.lse, theirs.lse, atol=2e-5, rtol=1e-6)


def test_the_scale_is_the_callers(make_case):
    case = make(make_case, (1, 2, 2, 40, 150, 64, 4))
    ours = ops.finish_attention(attend(case, scale=0.3))
    theirs = ops.finish_attention(attend(case, how=reference.attend_blocks, scale=0.3))
    torch.testing.assert_close(ours.out, theirs.out, atol=2e-5, rtol=0)


def test_a_state_goes_on_with_another_kernel(make_case):
    """Prefill's state is any other running state: more blocks, sinks and merging follow."""
    case = make(make_case, (2, 2, 2, 40, 150, 64, 4))
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    for first, second in (
        (flash.attend_blocks, reference.attend_blocks),
        (reference.attend_blocks, flash.attend_blocks),
    ):
        state = ops.RunningState.begin(case.query, case.value_dim)
        first(state, case.query, case.view(table=case.table[:, :16]), case.call())
        rest = case.view(table=case.table[:, 16:], first_token=GROUP)
        second(state, case.query, rest, case.call())
        result = ops.finish_attention(state, sinks=sinks)
        out, lse = case.expected(sinks=sinks)
        torch.testing.assert_close(result.out.double(), out, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.lse.double(), lse, atol=1e-5, rtol=1e-6)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1], [3, 2, 1], [0, 6]])
@pytest.mark.parametrize("query_start", [250, 256, 300, 5])
@pytest.mark.parametrize("is_padded", [False, True])
def test_any_splitting_at_groups_gives_the_same_bits(
    make_case, dtype, sizes, query_start, is_padded
):
    case = make(make_case, (2, 2, 3, 99, 6 * GROUP - 5, 80, 4), dtype)
    starts = torch.tensor([3, 140], dtype=torch.int32) if is_padded else None
    how = {"query_start": query_start, "starts": starts}
    assert same(attend(case, **how), attend(case, sizes, **how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_do_not_matter(make_case, dtype):
    case = make(make_case, (2, 2, 2, 90, 300, 64, 16), dtype)
    first = attend(case)
    order = torch.randperm(case.blocks.shape[0], generator=torch.Generator().manual_seed(5))
    moved = torch.empty_like(case.blocks)
    moved[order] = case.blocks
    case.blocks, case.table = moved, order[case.table.long()].int()
    assert same(first, attend(case))


def test_tokens_behind_the_last_query_do_not_matter(make_case):
    """What a longer table holds beyond the queries changes no bit."""
    long = make(make_case, (1, 2, 2, 60, 300, 64, 4))
    whole = attend(long, query_start=90)
    assert same(whole, attend(long, query_start=90, kv_tokens=150))
    assert same(whole, attend(long, query_start=90, kv_tokens=151))


@pytest.mark.parametrize("columns", [(1, 16), (8, 24), (0, 15), (16, 31)])
def test_a_view_that_cuts_a_group_is_refused_before_anything_is_written(make_case, columns):
    case = make(make_case, (1, 2, 2, 40, 150, 64, 4))
    state = ops.RunningState.begin(case.query, case.value_dim)
    first, last = columns
    view = case.view(table=case.table[:, first:last], first_token=4 * first)
    with pytest.raises(UnsupportedInputError, match=r"multiples of 64 .*16 blocks of 4 tokens"):
        flash.attend_blocks(state, case.query, view, case.call())
    assert (state.sum == 0).all() and (state.acc == 0).all()


def test_a_view_may_end_with_the_tokens(make_case):
    """Inside a group, with its last block ragged, full, or followed by empty ones."""
    for tokens in (61, 64, 66, 68):
        case = make(make_case, (1, 2, 2, 40, tokens, 64, 4))
        check(case)
        spare = torch.cat([case.table, case.table[:, :2]], 1)
        ours = ops.RunningState.begin(case.query, case.value_dim)
        flash.attend_blocks(ours, case.query, case.view(table=spare), case.call())
        assert same(ours, attend(case))


def test_a_group_is_about_two_thousand_tokens_and_few_blocks():
    def columns(head_dim: int, block_tokens: int) -> int:
        return flash.group_columns(BlockLayout(8, head_dim, head_dim, block_tokens, torch.bfloat16))

    assert columns(128, 256) == 8
    assert columns(64, 512) == 4
    assert columns(256, 128) == 16
    assert columns(16, 2048) == columns(16, 4096) == 1
    assert columns(128, 64) == columns(128, 4) == 16


# ---- poison --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_nobody_attends_never_reaches_a_result(make_case, dtype, poison):
    """Before a sequence's start, behind the last query, behind kv_tokens, in unused slots."""
    case = make(make_case, (2, 2, 2, 40, 200, 64, 4), dtype)
    how = {
        "starts": torch.tensor([0, 37], dtype=torch.int32),
        "query_start": 100,
        "kv_tokens": 190,
    }
    clean = attend(case, **how)
    keys, values = case.layout.keys(case.blocks), case.layout.values(case.blocks)
    for sequence, positions in ((0, range(140, 200)), (1, [*range(37), *range(140, 200)])):
        for position in positions:
            slot = case.table[sequence, position // 4].long()
            keys[slot, :, position % 4] = poison
            values[slot, :, position % 4] = poison
    poisoned = attend(case, **how)
    assert poisoned.acc.isfinite().all()
    assert same(clean, poisoned)


@pytest.mark.parametrize("plane", ["keys", "values"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_what_is_attended_is_not_hidden(make_case, plane, dtype):
    case = make(make_case, (1, 2, 2, 40, 150, 64, 4), dtype)
    slot = case.table[0, 0].long()
    getattr(case.layout, plane)(case.blocks)[slot, 1, 3] = torch.nan  # kv_head 1, token 3
    out = ops.finish_attention(attend(case)).out
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()


@pytest.mark.parametrize("order", [1, -1])
def test_an_empty_row_of_flash_attention_2_adds_nothing_but_its_nan(order):
    """Its log-sum-exp there is +inf: with out 0 where nothing was attended, with NaN otherwise."""
    partials = [
        (torch.tensor([[[[1.0, 2.0]] * 3]]), torch.zeros(1, 1, 3)),
        (
            torch.tensor([[[[0.0, 0.0], [torch.nan, torch.nan], [3.0, 4.0]]]]),
            torch.tensor([[[torch.inf, torch.inf, 0.0]]]),
        ),
    ]
    state = ops.RunningState.begin(torch.zeros(1, 1, 3, 2), 2)
    for out, lse in partials[::order]:
        flash._fold(state, slice(0, 3), out, lse)
    result = ops.finish_attention(state)
    assert result.out[0, 0, 0].tolist() == [1.0, 2.0]
    assert result.out[0, 0, 1].isnan().all()
    assert result.out[0, 0, 2].tolist() == [2.0, 3.0]


# ---- the calls -----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys, is_causal) of every call of flash attention, which still happens."""
    seen: list[tuple[int, int, bool]] = []
    whole = flash._flash_attention

    def record(query, keys, values, scale, is_causal):
        assert keys.shape == values.shape
        seen.append((query.shape[2], keys.shape[2], is_causal))
        return whole(query, keys, values, scale, is_causal)

    monkeypatch.setattr(flash, "_flash_attention", record)
    return seen


def test_the_causal_flag_is_used_for_squares_only_and_the_rest_not_computed(make_case, calls):
    case = make(make_case, (1, 1, 2, 100, 300, 64, 4))
    attend(case, query_start=150)
    assert calls == [
        (100, 64, False),  # [0, 64)
        (100, 64, False),  # [64, 128)
        (100, 22, False),  # [128, 150): cut where the queries begin
        (42, 42, True),  # [150, 192) by the queries there
        (58, 42, False),  # and by those behind
        (58, 58, True),  # [192, 250); nobody attends the rest
    ]


def test_pieces_cover_each_pair_of_query_and_token_once():
    for first, last, start, queries in [(0, 64, 10, 100), (64, 100, 64, 36), (0, 9, -4, 20)]:
        seen = torch.zeros(queries, last - first, dtype=torch.int)
        for piece in flash._pieces(first, last, start, queries):
            tokens = slice(piece.tokens.start - first, piece.tokens.stop - first)
            part = seen[piece.queries, tokens]
            part += torch.ones_like(part).tril() if piece.is_causal else 1
        stands_at = torch.arange(queries)[:, None] + start
        assert torch.equal(seen, (torch.arange(first, last) <= stands_at).int())


def test_many_queries_are_sliced_and_one_group_is_gathered_at_a_time(make_case, calls, monkeypatch):
    case = make(make_case, (1, 1, 2, 100, 300, 64, 4))
    gathered = []
    whole = flash._gather
    monkeypatch.setattr(
        flash, "_gather", lambda *args: gathered.append(whole(*args).shape) or whole(*args)
    )
    expected = attend(case)
    assert max(shape[2] for shape in gathered) == GROUP
    calls.clear()
    monkeypatch.setattr(flash, "PARTIAL_ELEMENTS", 2 * 64 * 30)  # 30 queries of 2 heads of 64
    sliced = attend(case)
    assert max(queries for queries, _, is_causal in calls if not is_causal) == 30
    torch.testing.assert_close(sliced.acc, expected.acc)


# ---- error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "tokens", "dim"), [(1500, 1500, 128), (512, 6000, 64), (300, 5000, 128)]
)
def test_relative_error_is_at_most_1_3_times_that_of_sdpa(make_case, queries, tokens, dim, dtype):
    """Partials are rounded to 16 bits once more than sdpa's result: measured 1.25 to 1.29 where
    there are several, 1.00 where one group holds everything."""
    block_tokens = 256 if dim == 128 else 512
    case = make(make_case, (1, 2, 4, queries, tokens, dim, block_tokens), dtype)
    expected, _ = case.expected()
    result = ops.finish_attention(attend(case), dtype=dtype)

    def error(out: torch.Tensor) -> float:
        return float((out.double() - expected).norm() / expected.norm())

    assert error(result.out) <= 1.3 * error(case.sdpa())


# ---- what it does not do -------------------------------------------------------------------------


def reasons(query=None, layout=None, **changes) -> str:
    layout = layout or BlockLayout(2, 64, 64, 16, torch.bfloat16)
    query = torch.zeros(1, 4, 32, 64, dtype=layout.dtype) if query is None else query
    call = ops.AttentionCall(kv_tokens=99, query_start=67, scale=1.0, **changes)
    return "; ".join(flash.not_supported_reasons(query, layout, call))


def test_what_is_not_supported_is_said_with_every_reason():
    assert reasons() == ""
    everything = torch.zeros(1, 1, 1, 99)
    said = reasons(mask=everything > 0, bias=everything, softcap=1.0)
    assert said == "mask; bias; softcap"
    short = torch.zeros(1, 4, 15, 64)
    assert reasons(short) == (
        "15 queries, expected at least 16; "
        "query of torch.float32, expected the blocks' torch.bfloat16"
    )
    assert "value_dim 32 differ" in reasons(layout=BlockLayout(2, 64, 32, 16, torch.bfloat16))
    wide = BlockLayout(2, 264, 264, 16, torch.bfloat16)
    assert "expected <= 256" in reasons(layout=wide)
    strided = torch.zeros(1, 4, 32, 128, dtype=torch.bfloat16)[..., ::2]
    assert "strided" in reasons(strided)
    eighth = BlockLayout(2, 64, 64, 16, torch.float8_e4m3fn)
    assert "float8" in reasons(torch.zeros(1, 4, 32, 64).to(eighth.dtype), eighth)


@pytest.fixture
def gpu(monkeypatch):
    """Lets torch say that there is a GPU, of the capability and build the test sets."""
    facts = {"capability": (9, 0), "built": True}
    backend = torch.backends.cuda
    monkeypatch.setattr(backend, "is_flash_attention_available", lambda: facts["built"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: facts["capability"])
    return facts


def on_cuda(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> str:
    layout = BlockLayout(2, dim, dim, 16, dtype)
    return "; ".join(flash._device_reasons(torch.device("cuda", 0), layout))


def test_on_cuda_it_is_16_bit_multiples_of_eight_and_recent_hardware(gpu):
    assert on_cuda() == on_cuda(80) == on_cuda(dtype=torch.float16) == ""
    assert "torch.float32, expected" in on_cuda(dtype=torch.float32)
    assert "multiple of 8" in on_cuda(dim=20)
    gpu["capability"] = (7, 5)
    assert "capability (7, 5)" in on_cuda()
    gpu["built"] = False
    assert "built without flash" in on_cuda()


def test_other_devices_are_refused():
    layout = BlockLayout(2, 64, 64, 16, torch.bfloat16)
    assert flash._device_reasons(torch.device("meta"), layout) == [
        "query on device meta, expected cuda or cpu"
    ]


def test_a_call_it_cannot_do_raises_before_anything_is_written(make_case):
    case = make(make_case, (1, 2, 2, 40, 150, 64, 4))
    state = ops.RunningState.begin(case.query, case.value_dim)
    with pytest.raises(UnsupportedInputError, match="cannot do this: softcap"):
        flash.attend_blocks(state, case.query, case.view(), case.call(softcap=2.0))
    assert (state.sum == 0).all()


def test_a_decode_step_asks_nothing_of_flash_attention(monkeypatch):
    """What it needs is asked of the device: a good part of what a layer costs the host."""
    monkeypatch.setattr(flash, "not_supported_reasons", None)
    decode = SimpleNamespace(is_cuda=True, shape=(1, 4, flash.MIN_QUERIES - 1, 8))
    assert not ops._is_for_flash(decode, None, None)
    prefill = SimpleNamespace(is_cuda=True, shape=(1, 4, flash.MIN_QUERIES, 8))
    with pytest.raises(TypeError):
        ops._is_for_flash(prefill, None, None)
