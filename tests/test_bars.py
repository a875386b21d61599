"""The bars and the verdict, on passes made up so that each figure is known."""

import math

import numpy as np
import pytest

from hf_tiered_cache.evaluation import parity
from hf_tiered_cache.evaluation.bars import Bar, bars, verdict
from hf_tiered_cache.evaluation.scoring import NOISE, REFERENCE, TIERED, Flip, Pass

CONTEXT, NEW = 400, 8


def made_up(cache: str, share: float | None = None, off: float = 0.0, **facts) -> Pass:
    """A pass whose log-likelihoods are off by `off`, in turn up and down."""
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(CONTEXT - 1) % 2, off, -off)
    known = {
        "context": CONTEXT,
        "num_bytes": 1000,
        "log_likelihoods": -rng.uniform(0, 4, CONTEXT - 1) + signs,
        "continuation": [1] * NEW,
        "digest": "bits",
        **dict.fromkeys(("prefill_tokens", "decode_tokens"), 100),
        **dict.fromkeys(("prefill_seconds", "decode_seconds"), 1.0),
    }
    return Pass(cache, share, "sdpa", **known | facts)


def judged(dtype: str, *ours: Pass, noise: Pass | None = None) -> list[Bar]:
    noises = [noise] if noise else []
    return bars(parity.rows(dtype, [made_up(REFERENCE), *noises, *ours]))


def noisy(**facts) -> Pass:
    """eager against sdpa: a few flips, the widest of 3 roundings, and other new tokens."""
    known = {
        "off": 0.02,
        "max_delta_logit": 0.5,
        "flips": [Flip(7, 0.3, 0.1), Flip(9, 0.1, 0.1), Flip(CONTEXT, 0.1, 0.1)],
        "continuation": [1, 1, *[2] * (NEW - 2)],
    }
    return made_up(NOISE, **known | facts)


def missed(kept: list[Bar]) -> set[str]:
    return {bar.name for bar in kept if not bar.is_reached}


def test_float32_bars_do_not_follow_the_noise():
    kept = judged("float32", made_up(TIERED, 0.0, off=0.02), noise=noisy())
    assert missed(kept) == {"|delta NLL|"}
    other = made_up(TIERED, 0.0, continuation=[2] * NEW, flips=[Flip(CONTEXT - 1, 1e-7, 1e-6)])
    kept = judged("float32", other, noise=noisy())
    assert missed(kept) == {"new tokens"}, "though it parted within a rounding"
    assert "NO PARITY: MISSED new tokens; new tokens DIFFERENT" in verdict(kept)


def test_half_precision_may_be_as_far_off_as_the_noise():
    ours = made_up(
        TIERED,
        0.0,
        off=0.025,
        max_delta_logit=0.9,
        flips=[Flip(3, 0.5, 0.1), Flip(CONTEXT + 2, 0.2, 0.1)],
        continuation=[1] * 4 + [3] * 4,
    )
    kept = judged("bfloat16", ours, noise=noisy())
    assert missed(kept) == set()
    shown = {bar.name: bar for bar in kept}
    assert shown["new tokens"].measured == "DIFFERENT (parted at 2 roundings)"
    assert shown["new tokens"].noise == "DIFFERENT (parted at 1 roundings)"
    assert shown["widest of them"].measured == "5 roundings"
    assert shown["widest of them"].bar == "6 roundings", "twice the noise's"
    assert verdict(kept) == (
        "parity within the noise: every bar met; new tokens DIFFERENT, within the bar"
    )


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"off": 0.031}, "mean |delta NLL|"),
        ({"max_delta_logit": 1.1}, "max |delta logit|"),
        ({"max_delta_logit": math.inf}, "max |delta logit|"),
        ({"flips": [Flip(one, 0.01, 0.1) for one in range(10)]}, "other likeliest"),
        ({"flips": [Flip(1, 0.61, 0.1)]}, "widest of them"),
        ({"flips": [Flip(1, math.nan, 0.1)]}, "widest of them"),
        ({"log_likelihoods": np.full(CONTEXT - 1, -2.5)}, "|delta NLL|"),
        ({"log_likelihoods": np.full(CONTEXT - 1, np.nan)}, "|delta NLL|"),
        (
            {"continuation": [2] * NEW, "flips": [Flip(CONTEXT - 1, 0.7, 0.1)]},
            "new tokens",
        ),
    ],
)
def test_half_precision_may_not_be_farther_off(facts, name):
    kept = judged("bfloat16", made_up(TIERED, 0.0, **facts), noise=noisy())
    assert name in missed(kept)
    assert "NO PARITY" in verdict(kept) and name in verdict(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_are_no_matter_of_noise(dtype):
    ours = [made_up(TIERED, 0.0), made_up(TIERED, 0.5, digest="others")]
    kept = judged(dtype, *ours, noise=noisy())
    assert missed(kept) == {"bits"}
    assert "MISSED bits" in verdict(kept)


def test_without_noise_half_precision_has_fixed_bars():
    assert missed(judged("bfloat16", made_up(TIERED, 0.0))) == set()
    wide = made_up(TIERED, 0.0, flips=[Flip(1, 0.21, 0.1)])
    assert missed(judged("bfloat16", wide)) == {"widest of them"}


def test_a_verdict_says_what_its_rows_say():
    """Every combination of rows met and missed, identical and DIFFERENT."""

    def bar(measured: str, is_reached: bool) -> Bar:
        return Bar("new tokens", "somewhere", "50%", measured, "", "", is_reached)

    for measured in ("identical", "DIFFERENT (parted at 1 roundings)"):
        for is_reached in (True, False):
            for others in (True, False):
                said = verdict([bar(measured, is_reached), bar("identical", others)])
                assert ("MISSED" in said and "NO PARITY" in said) is not (is_reached and others)
                assert ("DIFFERENT" in said) is ("DIFFERENT" in measured)
