"""Ctrl-C at a line of our own choice: `interrupted_at`."""

import contextlib
import dis
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import hf_tiered_cache

PACKAGE = str(Path(hf_tiered_cache.__file__).parent)
PATIENCE_SECONDS = 60  # of `bounded`; nothing here takes one


class HungError(Exception):
    """Something waited for what never comes."""


class Place(NamedTuple):
    """A line of this package, as it is run for the `occurrence`-th time (from 1)."""

    file: str
    line: int
    occurrence: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} ({self.occurrence}.)"


class LineTracer:
    """Counts how often each line of this package is run by a thread; at `place` it interrupts."""

    def __init__(self, place: Place | None = None) -> None:
        self.place = place
        self.seen: Counter[tuple[str, int]] = Counter()
        self.has_interrupted = False

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not _leaves_with(frame.f_code, frame.f_lasti):
            line = (frame.f_code.co_filename, frame.f_lineno)
            self.seen[line] += 1
            if (*line, self.seen[line]) == self.place:
                self.has_interrupted = True
                raise KeyboardInterrupt
        return self.trace


def places(act: Callable[[], Any]) -> list[Place]:
    """Every line of this package that `act` runs in this thread: the first time, one in the middle
    and the last time."""
    tracer = LineTracer()
    sys.settrace(tracer.trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return [
        Place(*line, occurrence)
        for line, times in tracer.seen.items()
        for occurrence in sorted({1, times // 2 + 1, times})
    ]


@contextlib.contextmanager
def interrupted_at(place: Place) -> Iterator[LineTracer]:
    """Raise KeyboardInterrupt before a line that this thread runs in the `with` block, and swallow
    it there. `has_interrupted` says whether it came to that line."""
    tracer = LineTracer(place)
    with contextlib.suppress(KeyboardInterrupt):
        sys.settrace(tracer.trace)
        try:
            yield tracer
        finally:
            sys.settrace(None)


@contextlib.contextmanager
def bounded(what: object, seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Raise HungError in the main thread where the `with` block takes longer."""

    def give_up(*_: Any) -> None:
        raise HungError(f"hung: {what}")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again: handlers wait too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _leaves_with(code: CodeType, offset: int) -> bool:
    """Whether the line event at an instruction is that of a `with` block's regular end: CPython
    reports it once more before it calls `__exit__`, but delivers no signal there."""
    return offset in _ends_of_with(code)


@cache
def _ends_of_with(code: CodeType) -> frozenset[int]:
    """Where `__exit__(None, None, None)` begins."""
    instructions = list(dis.get_instructions(code))
    nones = [one.opname == "LOAD_CONST" and one.argval is None for one in instructions]
    return frozenset(instructions[i].offset for i in range(len(nones) - 2) if all(nones[i : i + 3]))
