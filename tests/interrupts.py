"""Interrupts at chosen lines: what Ctrl-C may do, at every place where it may do it.

CPython looks for signals between bytecodes of the main thread, so a `KeyboardInterrupt` may come at
any line of ours. Here it comes at the n-th one, or at one of the `places` that a call comes to.
"""

import contextlib
import dis
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import hf_tiered_cache

PACKAGE = Path(hf_tiered_cache.__file__).parent
PATIENCE_SECONDS = 60  # nothing here takes one, on a quiet machine


class Place(NamedTuple):
    """A line, as it is run for the `occurrence`-th time (from 1)."""

    file: str
    line: int
    occurrence: int


class Interruption:
    """Counts lines; raises at one of them."""

    def __init__(
        self, line: int | Place, files: Iterable[Path], error: type[BaseException]
    ) -> None:
        self.num_lines = 0
        self.where = ""  # the line that was interrupted
        self.seen: Counter[tuple[str, int]] = Counter()
        self._line = line
        self._files = {str(file) for file in files}
        self._error = error

    @property
    def has_come(self) -> bool:
        """Whether there were so many lines."""
        return bool(self.where)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None  # not a line of this call, but of those below
        if event == "line" and not self.where and not _leaves_with(frame):
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.num_lines += 1
            self.seen[place] += 1
            if self._line in (self.num_lines, (*place, self.seen[place])):
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self._error
        return self.trace


@contextlib.contextmanager
def interrupted_at(
    line: int | Place, files: Iterable[Path] = (), error: type[BaseException] = KeyboardInterrupt
) -> Iterator[Interruption]:
    """Raise `error` at the n-th line of `files` (all of the package where none are given) that this
    thread comes to inside, counted from 1, or at a place, and swallow it where it comes out.

    `has_come` and `where` of what is yielded say whether there were so many lines, and which it
    was. Once it came, lines are no longer counted. Only lines of calls that begin inside count.
    """
    interruption = Interruption(line, list(files) or PACKAGE.rglob("*.py"), error)
    before = sys.gettrace()
    try:
        sys.settrace(interruption.trace)
        yield interruption
    except error:
        if not interruption.has_come:
            raise
    finally:
        sys.settrace(before)


def places(act: Callable[[], Any]) -> list[Place]:
    """Every line of this package that `act` runs in this thread: the first time, one in the middle
    and the last time."""
    with interrupted_at(0) as lines:
        act()
    return [
        Place(*line, occurrence)
        for line, times in lines.seen.items()
        for occurrence in sorted({1, times // 2 + 1, times})
    ]


@contextlib.contextmanager
def bounded(what: object, seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Raise TimeoutError in the main thread where the `with` block takes longer."""

    def bark(*_: object) -> None:
        raise TimeoutError(f"hung: {what}")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again: handlers of errors may hang too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _leaves_with(frame: FrameType) -> bool:
    """Whether the line event is the one for leaving a `with` block: the line of the `with` again.
    No signal is looked for between it and the call of `__exit__`."""
    return frame.f_lasti in _exits_of_with(frame.f_code)


@cache
def _exits_of_with(code: CodeType) -> frozenset[int]:
    """Offsets where `__exit__(None, None, None)` is called, from where a result is put aside."""
    found = list(dis.get_instructions(code))
    offsets = set()
    for index in range(len(found) - 2):
        if all(i.opname == "LOAD_CONST" and i.argval is None for i in found[index : index + 3]):
            offsets.add(found[index].offset)
            while found[index - 1].opname == "SWAP":
                index -= 1
                offsets.add(found[index].offset)
    return frozenset(offsets)
