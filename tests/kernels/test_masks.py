"""Dense masks that say no more than positions do are told from those that say more."""

import pytest
import torch

from hf_tiered_cache.kernels import masks, ops


def causal(batch: int, queries: int, tokens: int, query_start: int, starts=(0,)) -> torch.Tensor:
    positions = torch.arange(tokens)
    seen = positions <= (torch.arange(queries) + query_start)[:, None]
    first = torch.tensor(starts).expand(batch)[:, None, None, None]
    return seen & (positions >= first)


@pytest.mark.parametrize(("queries", "tokens", "start"), [(5, 5, 0), (5, 40, 35), (1, 9, 8)])
def test_causal_masks_are_recognized(queries, tokens, start):
    for batch in (1, 3):
        starts = masks.causal_starts(causal(batch, queries, tokens, start), start, tokens)
        assert starts is not None and starts.tolist() == [0] * batch
        assert starts.dtype == torch.int32


def test_left_padding_is_recognized():
    mask = causal(3, 9, 40, 31, (0, 17, 33))  # the last row's first queries attend nothing
    starts = masks.causal_starts(mask, 31, 40)
    assert starts is not None and starts.tolist() == [0, 17, 33]


def test_a_mask_may_be_wider_than_the_tokens():
    mask = torch.cat([causal(1, 4, 20, 16), torch.ones(1, 1, 4, 12, dtype=torch.bool)], -1)
    assert masks.causal_starts(mask, 16, 20) is not None
    assert masks.causal_starts(mask, 16, 32) is None


OTHERS = {
    "another position": lambda _: causal(2, 9, 40, 30),
    "a hole": lambda mask: mask.index_fill(3, torch.tensor([20]), False),
    "right padding": lambda mask: mask & (torch.arange(40) < 38),
    "a window": lambda mask: mask & (torch.arange(40) > torch.arange(31, 40)[:, None] - 16),
    "everything": torch.ones_like,
    "nothing": torch.zeros_like,
    "one mask per head": lambda mask: mask.expand(2, 4, 9, 40),
    "one bit more": lambda mask: mask.index_put(
        tuple(torch.tensor([i]) for i in (1, 0, 0, 39)), torch.tensor(True)
    ),
    "one bit less": lambda mask: mask.index_put(
        tuple(torch.tensor([i]) for i in (1, 0, 4, 0)), torch.tensor(False)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_not(name):
    assert masks.causal_starts(OTHERS[name](causal(2, 9, 40, 31)), 31, 40) is None


def test_many_queries_are_compared_in_slices(monkeypatch):
    mask = causal(2, 50, 60, 10, (0, 4))
    monkeypatch.setattr(masks, "SLICE_ELEMENTS", 2 * 60 * 7)
    assert masks.causal_starts(mask, 10, 60) is not None
    for query in range(0, 50, 9):
        wrong = mask.clone()
        wrong[1, 0, query, 5] ^= True
        assert masks.causal_starts(wrong, 10, 60) is None


def test_positions_attend_what_the_mask_does(make_case):
    case = make_case(batch=2, queries=30, tokens=90)
    mask = causal(2, 30, 90, 60, (0, 17))
    starts = masks.causal_starts(mask, 60, 90)
    by_mask = case.attend(mask=mask, causal=False)
    by_position = case.attend(starts=starts)
    # What is not attended is left out here and weighs nothing there: other lanes hold the sums.
    ulp = torch.finfo(torch.float32).eps * by_mask.lse.abs().max()
    assert (by_mask.lse - by_position.lse).abs().max() <= 4 * ulp
    with ops.use_kernel("reference"):
        assert torch.equal(case.attend(mask=mask, causal=False).out, case.attend(starts=starts).out)
