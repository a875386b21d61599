"""Values of every kernel against float64, over shapes, dtypes and restrictions."""

import random

import pytest
import torch

from hf_tiered_cache.kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# batch, kv_heads, group, queries, tokens, key_dim, value_dim, block_tokens
SHAPES = [
    (1, 2, 1, 1, 1, 64, 64, 16),
    (2, 2, 2, 1, 15, 64, 64, 16),
    (1, 1, 4, 1, 16, 128, 128, 16),
    (2, 2, 7, 1, 17, 64, 64, 16),
    (1, 2, 8, 1, 339, 128, 128, 64),
    (1, 8, 4, 1, 700, 128, 128, 256),
    (1, 1, 3, 1, 1100, 64, 64, 512),
    (3, 2, 4, 1, 339, 80, 80, 16),
    (1, 2, 5, 1, 100, 96, 72, 4),
    (1, 1, 6, 1, 70, 72, 96, 8),
    (1, 2, 1, 1, 130, 256, 256, 32),
    (2, 1, 2, 1, 61, 16, 16, 16),
    (1, 1, 2, 1, 40, 192, 128, 16),
    (1, 1, 2, 1, 33, 17, 23, 16),
    (1, 2, 4, 2, 50, 128, 128, 16),
    (2, 1, 1, 5, 339, 80, 96, 16),
    (1, 2, 2, 8, 100, 64, 64, 16),
    (1, 2, 7, 8, 100, 64, 64, 16),
    (2, 2, 2, 17, 140, 72, 80, 32),
    (1, 2, 4, 64, 339, 128, 128, 64),
    (1, 1, 1, 64, 64, 256, 256, 16),
    (1, 1, 4, 65, 339, 96, 64, 256),
    (1, 2, 2, 513, 700, 64, 64, 256),
    (1, 1, 4, 513, 513, 128, 128, 512),
    (1, 1, 3, 30, 77, 17, 23, 4),
]


def check(case, kernel, tolerance, **restrictions) -> None:
    out, lse = case.expected(**restrictions)
    state = case.attend_in_pieces([case.table.shape[1]], **restrictions)
    finished = ops.finish_attention(state)
    out_limit, lse_limit = tolerance(kernel, case.dtype)
    attended = lse > -torch.inf
    torch.testing.assert_close(finished.out.double(), out, atol=out_limit, rtol=0)
    torch.testing.assert_close(
        finished.lse.double()[attended], lse[attended], atol=lse_limit, rtol=1e-6
    )
    assert (finished.lse[~attended] == -torch.inf).all()
    assert (finished.out[~attended] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_causal_attention_over_every_shape(make_case, kernel, tolerance, shape, dtype):
    check(make_case(*shape, dtype=dtype), kernel, tolerance)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_without_causality_every_query_sees_every_token(make_case, kernel, tolerance, queries):
    check(make_case(queries=queries, tokens=70), kernel, tolerance, causal=False)


@pytest.mark.parametrize("queries", [1, 8, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_is_not_attended(make_case, kernel, tolerance, queries, dtype):
    case = make_case(batch=3, queries=queries, tokens=90, dtype=dtype)
    starts = torch.tensor([0, 17, 89], dtype=torch.int32)
    check(case, kernel, tolerance, starts=starts)


@pytest.mark.parametrize("queries", [1, 5, 33])
@pytest.mark.parametrize("wide", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boolean_mask_of_any_broadcast_shape(make_case, kernel, tolerance, queries, wide, dtype):
    case = make_case(batch=2, queries=queries, tokens=77, dtype=dtype)
    shape = (*wide[:2], queries if wide[2] > 1 else 1, 80)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    check(case, kernel, tolerance, mask=mask)


@pytest.mark.parametrize("queries", [1, 30])
def test_boolean_mask_of_any_strides(make_case, kernel, tolerance, queries):
    case = make_case(batch=2, queries=queries, tokens=77)
    mask = torch.rand(77, queries, 4, 2, generator=torch.Generator().manual_seed(1)) < 0.4
    check(case, kernel, tolerance, mask=mask.permute(3, 2, 1, 0))


@pytest.mark.parametrize("query_start", [0, 5, 20, 100, -3])
def test_queries_may_stand_anywhere(make_case, kernel, tolerance, query_start):
    for queries in (4, 30):
        case = make_case(queries=queries, tokens=40)
        check(case, kernel, tolerance, query_start=query_start)


@pytest.mark.parametrize("queries", [1, 33])
def test_bias_softcap_and_sinks(make_case, kernel, tolerance, queries):
    case = make_case(batch=2, queries=queries, tokens=50)
    bias = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(1))
    bias[..., 7] = -torch.inf
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    of_the_model = {"sinks": sinks.bfloat16()}  # as half-precision weights have them
    for extra in ({"bias": bias}, {"softcap": 3.0}, {"sinks": sinks}, of_the_model):
        out, lse = case.expected(**extra)
        result = case.attend(**extra)
        torch.testing.assert_close(result.out.double(), out, atol=4e-6, rtol=0)
        torch.testing.assert_close(result.lse.double(), lse, atol=4e-6, rtol=1e-6)


def test_float64_is_computed_in_float64(make_case, kernel):
    for queries in (1, 20):
        case = make_case(queries=queries, dtype=torch.float64)
        out, _ = case.expected()
        result = case.attend()
        assert result.out.dtype == torch.float64
        torch.testing.assert_close(result.out, out, atol=1e-13, rtol=0)


def test_large_scores_neither_overflow_nor_lose_the_maximum(make_case, kernel, tolerance):
    for queries in (1, 20):
        case = make_case(queries=queries, tokens=80)
        case.query *= 300
        out, lse = case.expected()
        result = case.attend()
        torch.testing.assert_close(result.out.double(), out, atol=2e-3, rtol=0)
        torch.testing.assert_close(result.lse.double(), lse, atol=0, rtol=1e-5)


def test_random_calls(make_case, kernel, tolerance):
    draw = random.Random(0)
    for seed in range(40):
        queries = draw.choice([1, 1, 2, 3, 9, 20, 50])
        case = make_case(
            batch=draw.choice([1, 2, 3]),
            kv_heads=draw.choice([1, 2, 3]),
            group=draw.choice([1, 2, 3, 4, 5, 9]),
            queries=queries,
            tokens=queries + draw.randrange(120),
            key_dim=draw.randrange(16, 257),
            value_dim=draw.randrange(16, 257),
            block_tokens=draw.choice([4, 8, 16, 64, 512]),
            dtype=draw.choice(DTYPES),
            seed=seed,
        )
        restrictions = {"causal": draw.random() < 0.7}
        if draw.random() < 0.4:
            starts = [draw.randrange(case.tokens + 1) for _ in range(case.batch)]
            restrictions["starts"] = torch.tensor(starts, dtype=torch.int32)
        if draw.random() < 0.4:
            rows = (draw.choice([1, case.batch]), draw.choice([1, case.heads]))
            shape = (*rows, draw.choice([1, queries]), case.tokens + draw.randrange(3))
            generator = torch.Generator().manual_seed(seed)
            restrictions["mask"] = torch.rand(shape, generator=generator) < 0.5
        check(case, kernel, tolerance, **restrictions)
