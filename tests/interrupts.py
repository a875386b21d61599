"""Ctrl-C at a line of our own choice: `interrupted_at`."""

import contextlib
import dis
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hf_tiered_cache

PACKAGE = str(Path(hf_tiered_cache.__file__).parent)
PATIENCE_SECONDS = 60  # of `bounded`; nothing here takes one


class HungError(Exception):
    """Something waited for what never comes."""


class LineCounter:
    """Counts the lines of this package that a thread runs, and interrupts it at one of them."""

    def __init__(self, number: int) -> None:
        self.number = number  # of the line to interrupt, from 1
        self.seen = 0
        self.where = ""  # it was interrupted

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not _leaves_with(frame.f_code, frame.f_lasti):
            self.seen += 1
            if self.seen == self.number:
                name = Path(frame.f_code.co_filename).name
                self.where = f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
                raise KeyboardInterrupt
        return self.trace


@contextlib.contextmanager
def interrupted_at(number: int) -> Iterator[LineCounter]:
    """Raise KeyboardInterrupt before the `number`-th line of this package that this thread runs in
    the `with` block, and swallow it there. `where` stays empty if it ran fewer."""
    counter = LineCounter(number)
    with contextlib.suppress(KeyboardInterrupt):
        sys.settrace(counter.trace)
        try:
            yield counter
        finally:
            sys.settrace(None)


@contextlib.contextmanager
def bounded(what: object, seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Raise HungError in the main thread where the `with` block takes longer."""

    def give_up(*_: Any) -> None:
        raise HungError(f"hung: {what}")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
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
    return frozenset(
        instructions[i].offset for i in range(len(nones) - 2) if all(nones[i : i + 3])
    )
