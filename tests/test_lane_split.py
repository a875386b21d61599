"""The lanes' shares: what the rates say, corrected by waits that are more than noise."""

import pytest

from hf_tiered_cache import lane_split
from hf_tiered_cache.lane_split import KEPT, STEP, LaneSplit


@pytest.fixture
def split(monkeypatch) -> LaneSplit:
    """A third for the CPU, begun at 100 s."""
    monkeypatch.setattr(lane_split, "perf_counter", lambda: 100.0)
    return LaneSplit.measured(2e9, 1e9)


def test_a_lane_that_does_not_work_gets_nothing():
    assert (LaneSplit.measured(0, 1e9).cpu_share, LaneSplit.measured(1e9, 0).cpu_share) == (1, 0)
    assert LaneSplit.measured(0, 1e9).is_fixed


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


@pytest.mark.parametrize("waits", [(0.0, 0.5), (0.5, 0.0)])
def test_no_lane_wins_everything_where_the_other_is_always_waited_for(split, waits):
    for second in range(100):
        split.correct(*waits, now=101.0 + second)
    copy_share = 1 - split.cpu_share
    assert min(split.cpu_share / (1 / 3), copy_share / (2 / 3)) == pytest.approx(KEPT)


def test_a_share_that_was_asked_for_stays():
    split = LaneSplit(0.3)
    split.correct(0.0, 5.0, now=1e9)
    assert split.cpu_share == 0.3
