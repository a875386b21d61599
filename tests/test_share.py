"""The lanes' shares: what the rates say, corrected by waits that are more than noise."""

import pytest

from hf_tiered_cache.devices import share
from hf_tiered_cache.devices.share import KEPT, SMALLEST, STEP, InPlaceShare


@pytest.fixture
def split(monkeypatch) -> InPlaceShare:
    """A third for the CPU, begun at 100 s."""
    monkeypatch.setattr(share, "perf_counter", lambda: 100.0)
    split = InPlaceShare.measured(2e9, 1e9)
    split.cpu_share = 1 / 3
    return split


def test_a_lane_that_does_not_work_gets_nothing():
    assert (InPlaceShare.measured(0, 1e9).cpu_share, InPlaceShare.measured(1e9, 0).cpu_share) == (
        1,
        0,
    )
    assert InPlaceShare.measured(0, 1e9).is_fixed


@pytest.mark.parametrize(
    ("copy_wait", "cpu_wait", "step"),
    [
        (0.0, 0.019, 0),  # of a second: noise
        (0.019, 0.0, 0),
        (0.019, 0.019, 0),
        (0.0, 0.05, -0.05),
        (0.05, 0.01, 0.05),
        (0.3, 0.25, 0.05),
        (0.9, 0.0, STEP),
        (0.0, 0.9, -STEP),
    ],
)
def test_a_correction_is_as_large_as_the_part_of_the_time_that_was_waited(
    split, copy_wait, cpu_wait, step
):
    before = split.cpu_share
    split.correct(copy_wait, cpu_wait, now=101.0)
    assert split.cpu_share == pytest.approx(before + step)
    split.correct(copy_wait, cpu_wait, now=201.0)  # the same in a hundred seconds is noise
    assert split.cpu_share == pytest.approx(before + step)


def test_the_cpu_gets_nothing_until_copies_are_waited_for_and_never_all(split):
    """Where the host is what everything waits for, a second lane costs it more."""
    fresh = InPlaceShare.measured(2e9, 1e9)
    assert (fresh.cpu_share, fresh.is_fixed) == (0, False)
    for second in range(100):
        fresh.correct(0.01, 0.0, now=1e9 + second)
    assert fresh.cpu_share == 0
    for second in range(100):
        split.correct(0.5, 0.0, now=101.0 + second)
    assert 1 - split.cpu_share == pytest.approx(KEPT * 2 / 3)


def test_a_part_that_is_not_worth_a_hand_over_is_none(split):
    for second in range(100):
        split.correct(0.0, 0.05, now=101.0 + second)
    assert split.cpu_share == 0
    split.correct(SMALLEST - 0.01, 0.0, now=201.0)
    assert split.cpu_share == 0
    split.correct(SMALLEST, 0.0, now=202.0)
    assert split.cpu_share == pytest.approx(SMALLEST)


def test_a_share_that_was_asked_for_stays():
    split = InPlaceShare(0.3)
    split.correct(0.0, 5.0, now=1e9)
    assert split.cpu_share == 0.3
