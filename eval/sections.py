"""Sections of a long benchmark, each in the time it was given, none at the cost of another.

A section is a generator of rows. Sections run in a child process, one after the other; one that
raises, hangs or kills the process is reported as failed, with the rows it had given until then,
and the next one goes on, in a fresh process where the old one is of no more use. One that would
not fit in the time left is skipped.
"""

import gc
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, Protocol

START_SECONDS = 40  # for a fresh process to import torch and make a model
END_SECONDS = 10  # for a process that was told to end


@dataclass
class Row:
    """One figure beside its bar and what was predicted."""

    what: str
    measured: str = ""
    bar: str = ""
    predicted: str = ""
    verdict: str = ""  # "reached", "MISSED", "FAILED", "skipped", or nothing to judge
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        return (
            f"{self.what:<52} {self.measured:>12} {self.bar:>9} {self.predicted:>12} "
            f"{self.verdict:<8} {self.note}".rstrip()
        )


HEADER = Row("", "measured", "bar", "predicted").line()


def at_most(what: str, value: float, bar: float | None, predicted: str, **more: Any) -> Row:
    """A ratio that should not be larger than its bar."""
    verdict = "" if bar is None else ("reached" if value <= bar else "MISSED")
    data = {"value": value, "bar": bar, **more.pop("data", {})}
    shown = "" if bar is None else f"<= {bar:g}x"
    return Row(what, f"{value:.2f}x", shown, predicted, verdict, data=data, **more)


def at_least(what: str, value: float, bar: float | None, predicted: str, **more: Any) -> Row:
    """A ratio that should not be smaller than its bar."""
    row = at_most(what, value, bar, predicted, **more)
    if bar is not None:
        row.bar, row.verdict = f">= {bar:g}x", "reached" if value >= bar else "MISSED"
    return row


class Skipped(Exception):  # noqa: N818 - no error: the reason why a section does not apply here
    """Raised by a section that this machine is too small for; its message is the reason."""


def attempted(workshop: "Workshop", what: str, rows: Iterator[Row]) -> Iterator[Row]:
    """One part of a section: where it fails, or does not apply, that is a row of its own and the
    section goes on, as long as the device still works."""
    try:
        yield from rows
    except Skipped as reason:
        yield Row(what, verdict="skipped", note=str(reason))
    except Exception as cause:
        data = {"traceback": traceback.format_exc()}
        yield Row(what, verdict="FAILED", note=reason_of(cause), data=data)
        # What the failed part held is held by its traceback.
        traceback.clear_frames(cause.__traceback__)
        gc.collect()
        if not workshop.is_usable():
            raise


def reason_of(error: Exception) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class Workshop(Protocol):
    """What sections are given; made in the child."""

    # Measured by one section and used by others, in whatever process they run.
    rates: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """What a reader must know of the device to judge a figure."""

    def is_usable(self) -> bool:
        """Whether the device still works: some errors stay until the process ends."""


Section = Callable[[Any], Iterator[Row]]


def run_sections(
    sections: Mapping[str, tuple[float, Section]],
    make_workshop: Callable[[dict[str, float]], Workshop],
    *,
    time_limit: float,
    write: Callable[[Sequence[Row], dict[str, Any]], None],
) -> list[Row]:
    """The rows of all sections: name -> (seconds it may need, what it does).

    `make_workshop` and the sections are sent to child processes, so they must be importable.
    Each row is printed, and `write` called with all rows and facts, as it comes.
    """
    deadline = monotonic() + time_limit
    waiting = dict(sections)
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    rates: dict[str, float] = {}
    child: Child | None = None

    def add(section: str, row: Row) -> None:
        rows.append(row)
        print(f"[{section}] {row.line()}", flush=True)
        write(rows, facts if child is None else facts | child.facts)

    while waiting:
        name = next(iter(waiting))
        seconds, section = waiting.pop(name)
        needed = seconds + (START_SECONDS if child is None else 0)
        left = deadline - monotonic()
        if needed > left:
            note = f"needs up to {needed:.0f} s, {max(0.0, left):.0f} s are left"
            add(name, Row(name, verdict="skipped", note=note))
            continue
        if child is None:
            child = Child(make_workshop, rates)
        # A slow section may take what the estimates of all leave over, up to its own again.
        spare = left - sum(other for other, _ in waiting.values())
        is_alive = child.run(
            name, section, max(needed, min(spare, needed + seconds)), partial(add, name)
        )
        facts |= child.facts
        rates |= child.rates
        if not is_alive:
            child.close()
            child = None
    if child is not None:
        child.close()
    return rows


def print_table(rows: Sequence[Row]) -> bool:
    """Print all rows under one header and what became of the bars; return whether none failed."""
    print(f"\n{HEADER}\n{'-' * len(HEADER)}")
    for row in rows:
        print(row.line())
    verdicts = [row.verdict for row in rows]
    judged = verdicts.count("reached") + verdicts.count("MISSED")
    print(
        f"{verdicts.count('reached')} of {judged} bars reached, {verdicts.count('FAILED')} failed, "
        f"{verdicts.count('skipped')} skipped",
        flush=True,
    )
    return "FAILED" not in verdicts


class Child:
    """A process that runs sections when told to. Its parent never touches the device, so a section
    that breaks it costs no other."""

    def __init__(
        self, make_workshop: Callable[[dict[str, float]], Workshop], rates: dict[str, float]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.facts: dict[str, Any] = {}
        self.rates = dict(rates)
        self._process = context.Process(target=serve, args=(theirs, make_workshop, dict(rates)))
        self._process.start()
        theirs.close()

    def run(self, name: str, section: Section, seconds: float, add: Callable[[Row], None]) -> bool:
        """Run a section and add its rows as they come; whether the process can go on."""
        deadline = monotonic() + seconds
        why = f"no end after {seconds:.0f} s"
        try:
            self._pipe.send(section)
            while self._pipe.poll(max(0.0, deadline - monotonic())):
                kind, what = self._pipe.recv()
                if kind == "row":
                    add(what)
                elif kind == "facts":
                    self.facts |= what
                elif kind == "done":
                    self.rates |= what
                    return True
                elif kind == "skipped":
                    add(Row(name, verdict="skipped", note=what))
                    return True
                elif kind == "failed":
                    why, trace, is_alive = what
                    add(Row(name, verdict="FAILED", note=why, data={"traceback": trace}))
                    return is_alive
        except (EOFError, OSError):
            self._process.join(END_SECONDS)
            why = f"its process died, exit status {self._process.exitcode}"
        add(Row(name, verdict="FAILED", note=why))
        return False

    def close(self) -> None:
        """End the process, at once if it does not do so by itself."""
        self._pipe.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def serve(
    pipe: Connection,
    make_workshop: Callable[[dict[str, float]], Workshop],
    rates: dict[str, float],
) -> None:
    """The child: run each section it is sent, until the pipe closes."""
    workshop: Workshop | None = None
    while True:
        try:
            section = pipe.recv()
        except EOFError:
            return
        try:
            if workshop is None:
                workshop = make_workshop(rates)
                pipe.send(("facts", workshop.facts()))
            for row in section(workshop):
                pipe.send(("row", row))
            pipe.send(("done", workshop.rates))
        except Skipped as reason:
            pipe.send(("skipped", str(reason)))
        except Exception as cause:
            traceback.print_exc()
            is_usable = workshop is not None and workshop.is_usable()
            pipe.send(("failed", (reason_of(cause), traceback.format_exc(), is_usable)))
        gc.collect()  # caches that a failed section left
