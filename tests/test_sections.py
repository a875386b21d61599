"""eval/sections.py: whatever a section does, the others run and the table says what happened."""

import os
import time
from functools import partial

import pytest
import sections
from sections import Row, Skipped, at_least, at_most, attempted, run_sections


class Workshop:
    """Counts the sections it has seen; broken for good once told so."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates = rates
        self.seen = 0
        self.is_broken = False

    def facts(self) -> dict[str, str]:
        return {"device": "none"}

    def is_usable(self) -> bool:
        return not self.is_broken


def good(shop: Workshop):
    shop.seen += 1
    yield Row("good", str(shop.seen), data={"process": os.getpid()})


def raising(shop: Workshop):
    yield from good(shop)
    raise RuntimeError("planted\nwith details")


def breaking(shop: Workshop):
    shop.is_broken = True
    yield from raising(shop)


def dying(shop: Workshop):
    yield from good(shop)
    os._exit(7)


def hanging(shop: Workshop):
    yield from good(shop)
    time.sleep(1000)


def too_large(shop: Workshop):
    yield from good(shop)
    raise Skipped("needs a bigger boat")


def measuring(shop: Workshop):
    shop.rates["speed"] = 42.0
    yield from good(shop)


def using(shop: Workshop):
    yield Row("using", str(shop.rates["speed"]))


def no_workshop(rates: dict[str, float], fail_first: bool) -> Workshop:
    raise ValueError("no device")


@pytest.fixture
def run(monkeypatch):
    """Runs sections of 2 seconds each; returns (rows, all that was written)."""
    monkeypatch.setattr(sections, "START_SECONDS", 30)

    def run_these(*functions, time_limit=500.0, workshop=Workshop, seconds=2.0):
        written = []
        rows = run_sections(
            {f"{i} {one.__name__}": (seconds, one) for i, one in enumerate(functions)},
            workshop,
            time_limit=time_limit,
            write=lambda rows, facts: written.append(([*rows], {**facts})),
        )
        return rows, written

    return run_these


def verdicts(rows) -> list[str]:
    return [row.verdict for row in rows]


def test_all_run_in_one_process_and_each_is_written_at_once(run):
    rows, written = run(good, good)
    assert [row.measured for row in rows] == ["1", "2"]
    assert rows[0].data["process"] == rows[1].data["process"] != os.getpid()
    assert [len(rows) for rows, _ in written] == [1, 2]
    assert written[-1][1] == {"device": "none"}


def test_one_that_raises_is_told_with_the_rows_it_had_and_the_rest_go_on(run):
    rows, written = run(raising, good)
    assert verdicts(rows) == ["", "FAILED", ""]
    assert [len(rows) for rows, _ in written] == [1, 2, 3], "each row as it came"
    assert rows[1].note == "RuntimeError: planted"
    assert "in raising" in rows[1].data["traceback"]
    assert rows[2].measured == "2", "the process was still good"


def test_a_part_that_fails_costs_no_other_unless_the_device_is_broken():
    def part(error=None):
        yield Row("before")
        if error is not None:
            raise error

    shop = Workshop({})
    rows = [
        row
        for error in (RuntimeError("planted"), Skipped("too small"), None)
        for row in attempted(shop, "part", part(error))
    ]
    assert verdicts(rows) == ["", "FAILED", "", "skipped", ""]
    assert rows[1].note == "RuntimeError: planted"
    assert rows[3].note == "too small"
    shop.is_broken = True
    with pytest.raises(RuntimeError, match="planted"):
        list(attempted(shop, "part", part(RuntimeError("planted"))))


def test_one_that_breaks_the_device_costs_only_the_process(run):
    rows, _ = run(breaking, good)
    assert verdicts(rows) == ["", "FAILED", ""]
    assert rows[2].measured == "1"


def test_one_that_kills_its_process_is_told_and_the_rest_go_on(run):
    rows, _ = run(good, dying, good)
    assert verdicts(rows) == ["", "", "FAILED", ""]
    assert "exit status 7" in rows[2].note


def test_one_that_hangs_is_ended_and_the_rest_go_on(run, monkeypatch):
    monkeypatch.setattr(sections, "END_SECONDS", 1)
    start = time.monotonic()
    rows, _ = run(good, hanging, good)
    assert verdicts(rows) == ["", "", "FAILED", ""]
    assert "no end after 4 s" in rows[2].note
    assert time.monotonic() - start < 60


def test_one_that_does_not_fit_is_skipped_with_the_reason(run):
    rows, _ = run(too_large, good)
    assert verdicts(rows) == ["", "skipped", ""]
    assert rows[1].note == "needs a bigger boat"


def test_one_without_time_left_is_skipped(run):
    rows, _ = run(good, good, time_limit=20.0)
    assert verdicts(rows) == ["skipped", "skipped"]
    assert "needs up to 32 s, 20 s are left" in rows[0].note


def test_what_one_measured_outlives_its_process(run):
    rows, _ = run(measuring, dying, using)
    assert verdicts(rows) == ["", "", "FAILED", ""]
    assert rows[-1].measured == "42.0"


def test_without_a_workshop_every_section_fails(run):
    rows, _ = run(good, good, workshop=partial(no_workshop, fail_first=True))
    assert [row.note for row in rows] == ["ValueError: no device"] * 2


def test_the_table_counts_and_says_whether_something_failed(capsys):
    rows = [at_most("a", 1.0, 1.5, "1"), at_least("b", 1.0, 1.5, "1"), Row("c", verdict="skipped")]
    assert sections.print_table(rows)
    printed = capsys.readouterr().out
    assert "1 of 2 bars reached, 0 failed, 1 skipped" in printed
    assert "<= 1.5x" in printed and ">= 1.5x" in printed and "MISSED" in printed
    assert not sections.print_table([*rows, Row("d", verdict="FAILED")])


def test_a_figure_without_a_bar_is_not_judged():
    assert at_least("a", 1.0, None, "2").verdict == at_most("a", 1.0, None, "2").verdict == ""
