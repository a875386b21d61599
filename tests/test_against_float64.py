"""`eval/against_float64.py` on the tiny model: its figures are distances, and it can say no."""

import pytest
import torch
from support import without_cold_blocks

import against_float64
import attention_error
from against_float64 import Side

SHORT = ("--context", "160", "--decode-tokens", "4", "--chunk", "64", "--off-device", "0.8")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(tmp_path))


def test_ours_is_not_the_farther_one(capsys):
    assert against_float64.main(SHORT) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 bars reached" in printed
    assert "of 160" in printed, "every position counts"


def test_a_cache_that_is_farther_is_noticed(capsys):
    with without_cold_blocks():
        assert against_float64.main(SHORT) == 1
    assert printed_verdicts(capsys.readouterr().out) == ["MISSED", "MISSED"]


def printed_verdicts(printed: str) -> list[str]:
    return [word for word in printed.split() if word in ("MISSED", "reached")][:2]


def test_a_positions_error_is_a_root_mean_square_over_the_vocabulary():
    side = Side("sdpa", None)
    truth = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    side.compare(torch.tensor([[2.0, 1.0], [1.0, 0.0]]), truth)
    assert torch.cat(side.errors).tolist() == [0.5**0.5, 2.0**0.5]
    assert (side.largest, side.flips) == (2.0, 1)


def test_given_the_same_keys_and_values_our_attention_is_not_the_farther_one(capsys):
    assert attention_error.main(["--context", "160", "--decode-tokens", "4", "--chunk", "64"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 bars reached" in printed


def test_attention_that_is_farther_is_noticed(monkeypatch, capsys):
    right = attention_error.tiered_attention_forward

    def rounded(*arguments, **kwargs):
        out, weights = right(*arguments, **kwargs)
        return (out * 64).round() / 64, weights

    monkeypatch.setattr(attention_error, "tiered_attention_forward", rounded)
    assert attention_error.main(["--context", "160", "--decode-tokens", "4", "--chunk", "64"]) == 1
    assert "MISSED" in capsys.readouterr().out
