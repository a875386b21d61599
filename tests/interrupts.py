"""Interrupts at chosen lines: what Ctrl-C may do, at every place where it may do it.

CPython looks for signals between bytecodes of the main thread, so a `KeyboardInterrupt` may come at
any line of ours. Here it comes at the n-th one.
"""

import contextlib
import dis
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hf_tiered_cache

PACKAGE = Path(hf_tiered_cache.__file__).parent


class Interruption:
    """Counts lines; raises at one of them."""

    def __init__(self, line: int, files: Iterable[Path], error: type[BaseException]) -> None:
        self.num_lines = 0
        self.where = ""  # the line that was interrupted
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
            self.num_lines += 1
            if self.num_lines == self._line:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self._error
        return self.trace


@contextlib.contextmanager
def interrupted_at(
    line: int, files: Iterable[Path] = (), error: type[BaseException] = KeyboardInterrupt
) -> Iterator[Interruption]:
    """Raise `error` at the n-th line of `files` (all of the package where none are given) that this
    thread comes to inside, counted from 1, and swallow it where it comes out.

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
