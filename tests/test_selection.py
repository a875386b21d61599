"""Selection: what is left out is not attended, and all else keeps its position."""

import pytest
import torch
from paged_case import PagedCase
from support import Shadowed, chunks, make_manager
from test_attention import Case, Module, causal, textbook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tiered_cache.blocks.selection import ALL, RESIDENT_ONLY, SelectionPolicy
from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.kernels import flash, ops

LEFT_OUT = (range(1, 3), range(4, 7))  # of the ten columns of a case


def only(case: PagedCase, columns: tuple[range, ...], **facts) -> ops.AttentionState:
    """Attention over these columns, a view for each range."""
    call = case.call(**facts, has_gaps=True)
    state = ops.RunningState.begin(case.query, case.value_dim)
    for part in columns:
        table = case.table[:, part.start : part.stop]
        view = case.view(table=table, first_token=part.start * case.block_tokens)
        ops.attend_blocks(state, case.query, view, call)
    return ops.finish_attention(state, sinks=call.sinks)


def shown(case: PagedCase, columns: tuple[range, ...]) -> torch.Tensor:
    """bool [1, 1, 1, tokens]: what stands in these columns."""
    tokens = torch.zeros(case.tokens, dtype=torch.bool)
    for part in columns:
        tokens[part.start * case.block_tokens : part.stop * case.block_tokens] = True
    return tokens.view(1, 1, 1, -1)


@pytest.mark.parametrize("kernel", ops.available_kernels())
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("facts", ["none", "starts", "mask", "softcap", "sinks", "bias"])
def test_every_kernel_takes_columns_at_their_own_positions(kernel, queries, facts):
    """Also the newest column is one of the kept ones, as it is in any forward."""
    case = PagedCase(batch=3, queries=queries, tokens=155, seed=queries)
    random = torch.Generator().manual_seed(1)
    given = {
        "none": {},
        "starts": {"starts": torch.tensor([0, 21, 49], dtype=torch.int32)},
        "mask": {"mask": torch.rand(3, 1, queries, 155, generator=random) < 0.7},
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": torch.randn(case.heads, generator=random)},
        "bias": {"bias": torch.randn(1, case.heads, queries, 155, generator=random)},
    }[facts]
    columns = (*LEFT_OUT, range(9, 10))
    with ops.use_kernel(kernel):
        out, lse = only(case, columns, **given)
    mask = given.get("mask", torch.ones(1, dtype=torch.bool)) & shown(case, columns)
    expected, expected_lse = case.expected(**{**given, "mask": mask})
    torch.testing.assert_close(out.double(), expected.nan_to_num(), rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


def test_who_attends_in_groups_refuses_gaps():
    case = PagedCase(queries=40)
    assert not flash.not_supported_reasons(case.query, case.layout, case.call())
    assert flash.not_supported_reasons(case.query, case.layout, case.call(has_gaps=True))


@pytest.mark.parametrize("name", SelectionPolicy.registry)
def test_every_policy_selects_columns_that_are_there_in_order_and_none_twice(tmp_path, name):
    policy = SelectionPolicy.by_name(name)()
    manager = make_manager(tmp_path, device_blocks=8)
    table = Shadowed.new(manager, batch=2)
    for _ in range(15):
        table.append(3)
        for num_blocks in range(1, table.table.num_blocks + 1):
            placement = manager.blocks.placement(table.table)
            selected = policy.select(placement, num_blocks)
            columns = [column for part in selected for column in part]
            assert all(len(part) and part.step == 1 for part in selected)
            assert columns == sorted(set(columns))
            assert not columns or 0 <= columns[0] <= columns[-1] < num_blocks
            assert not policy.is_exact or columns == list(range(num_blocks))
    assert manager.num_cold_blocks() > 0
    manager.close()


@pytest.mark.parametrize("group_columns", [1, 2])
def test_resident_only_loads_and_stores_nothing(tmp_path, group_columns):
    manager = make_manager(tmp_path, 10, staging=4, group_columns=group_columns)
    table = Shadowed.new(manager)
    for _ in range(15):
        table.append(3)
    table.check()
    before = (manager.counters.loads, manager.counters.stores)
    got = [
        chunk.first + column
        for chunk in chunks(manager, table.table, [table.table], selection=RESIDENT_ONLY)
        for column in range(chunk.slots.shape[1])
        if chunk.rung == 0
    ]
    assert got == [i for i, block in enumerate(table.table.blocks()) if block.is_resident]
    assert 0 < len(got) < table.table.num_blocks
    assert (manager.counters.loads, manager.counters.stores) == before
    table.check()  # and a reading of everything beside it still is one
    manager.close()


@pytest.mark.parametrize("name", ["sdpa", "tiered"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", ["no mask", "padding", "dense", "bias"])
def test_attention_of_a_cache_over_its_resident_part(make_cache, name, queries, masked):
    case = Case(make_cache, "cold", queries)
    (manager,) = case.cache._owned.pool.managers
    (table,) = manager.blocks.tables
    tokens = torch.zeros(case.keys.shape[2], dtype=torch.bool)
    for index, block in enumerate(table.rows[0]):
        tokens[4 * index : 4 * index + 4] = block.is_resident
    assert 0 < tokens.sum() < len(tokens)
    allowed = causal(queries) & tokens
    mask = bias = None
    if masked == "padding":
        mask = torch.ones(2, len(tokens), dtype=torch.long)
        mask[1, : int(tokens.nonzero()[0]) + 2] = 0  # ends within what is attended
        allowed = allowed & mask.bool()[:, None, None, :]
    elif masked == "dense":
        mask = (torch.rand(2, 1, queries, len(tokens)) < 0.8) | torch.eye(len(tokens))[-1].bool()
        allowed = tokens & mask
    elif masked == "bias":
        mask = bias = torch.randn(2, 1, queries, len(tokens)).masked_fill(~causal(queries), -1e30)
    before = case.cache.stats().counters
    with case.cache.attending("resident_only"):
        out = case.call(name, mask)
    expected = textbook(case.query, case.keys, case.values, allowed, bias=bias)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    after = case.cache.stats().counters
    assert (after.loads, after.cold_reads) == (before.loads, before.cold_reads)
    whole = ALL_ATTENTION_FUNCTIONS[name](
        Module(), case.query, *case.handles, None, scaling=case.query.shape[3] ** -0.5
    )[0]
    expected = textbook(case.query, case.keys, case.values, causal(queries))
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=2e-5)


def test_what_is_approximate_says_so(make_cache):
    cache = make_cache()
    assert cache.stats().is_exact and "approximate" not in str(cache)
    with cache.attending("resident_only"):
        assert not cache.stats().is_exact
        assert "approximate: attention leaves blocks out (attend='resident_only')" in str(cache)
        with (
            pytest.raises(ConfigError, match="unknown selection policy"),
            cache.attending("most"),
        ):
            pass
    assert cache.stats().attend == "all"
    assert "approximate" in str(make_cache(attend="resident_only"))
    assert ALL.is_exact
