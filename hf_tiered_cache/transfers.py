"""Transfers: reads and writes that were started, alone (`Transfer`), one behind the other (`Then`),
one in another's place (`OrElse`) or side by side (`AllOf`)."""

import contextlib
import os
import queue
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from time import perf_counter
from typing import NamedTuple

from hf_tiered_cache.errors import ClosedCacheError, TieredCacheError, TierIOError, io_error

# Who waits looks again so often: an interrupt may have come between the end and the waking.
WAKE_SECONDS = 0.1


class Transfer:
    """A read or write that was started. It consists of one or more parts.

        pending --last part ended, none failed--> done     wait() returns at once
        pending --last part ended, some failed--> failed   wait() raises TierIOError, every time

    `is_ready()` is False only while pending. Ready means that no thread touches the memory of the
    transfer any more, whether it is done or failed. Waiting on a ready transfer takes no lock.

    A device that is not the CPU works behind it: `hold_device()` makes the device wait, and the CPU
    goes on where it can.
    """

    __slots__ = (
        *("__weakref__", "_ended", "_error", "_is_ready", "_num_parts", "_pid", "_wake"),
        *("began_at", "ended_at"),
    )

    def __init__(self, num_parts: int = 1) -> None:
        self._num_parts = num_parts
        # What came of each part that ended. All else follows from it: an interrupt between two
        # lines of whoever ends a part leaves nothing that is not made good by the next look.
        self._ended: dict[object, _Ended] = {}
        self._is_ready = num_parts == 0
        self._error: TierIOError | None = None
        self.began_at: float | None = None
        """When its first bytes moved, seconds of `perf_counter`, once it is ready; None where
        nobody knows."""
        self.ended_at: float | None = None
        """When its last bytes moved, likewise."""
        self._pid = os.getpid()
        self._wake: SimpleQueue[None] = SimpleQueue()

    def is_ready(self) -> bool:
        """Whether it is done or failed, without waiting."""
        return self._is_ready or self._look()

    @property
    def has_failed(self) -> bool:
        """Whether it has failed, as far as is known by now."""
        return self._error is not None

    def wait(self) -> None:
        """Return when done. Raises TierIOError when it failed, each time it is called."""
        while not (self._is_ready or self._look()):
            self.check_process()
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=WAKE_SECONDS)
                self._wake.put(None)  # for the next one who waits
        if self._error is not None:
            # A fresh exception: one raised twice would grow its traceback and be shared by threads.
            message = self._error.strerror or str(self._error)
            raise io_error(self._error.errno, message) from self._error.__cause__

    def outlast(self) -> None:
        """Return when it has ended, done or failed."""
        with contextlib.suppress(TierIOError):
            self.wait()

    def hold_device(self) -> None:
        """Make the work that the device is given from now on wait for this transfer. Raises as
        `wait` does, if the transfer is known to have failed by then. Here, and wherever the device
        is the CPU, the same as `wait`."""
        self.wait()

    def check_process(self) -> None:
        """Raise ClosedCacheError in a forked child, where nobody would end this transfer."""
        if os.getpid() != self._pid:
            raise ClosedCacheError(
                f"this transfer belongs to process {self._pid}, and its threads stayed there;"
                " make a new cache after fork()"
            )

    def end_part(
        self,
        error: TierIOError | None = None,
        *,
        part: object = None,
        began: float | None = None,
        ended: float | None = None,
    ) -> None:
        """One part ended, failed if `error` is given. For tiers.

        part: which one, where there are several; one that has ended stays as it ended. Of several
        errors that of the first part to end wins. began, ended: when its bytes moved, if it is
        known (in seconds of `perf_counter`).
        """
        self._ended.setdefault(part, _Ended(error, began, ended or perf_counter()))
        if self._look():
            self._wake.put(None)

    def _look(self) -> bool:
        """Whether all parts have ended; if so, what came of them is noted."""
        if len(self._ended) < self._num_parts:
            return False
        parts = list(self._ended.values())
        self._error = next((part.error for part in parts if part.error), None)
        self.began_at = min((part.began for part in parts if part.began is not None), default=None)
        self.ended_at = max((part.ended for part in parts), default=None)
        self._is_ready = True
        return True

    def __repr__(self) -> str:
        state = "pending" if not self._is_ready else "failed" if self._error else "done"
        return f"Transfer({state})"


class _Ended(NamedTuple):
    """What came of a part of a transfer."""

    error: TierIOError | None
    began: float | None
    ended: float


DONE = Transfer(num_parts=0)
"""A finished transfer, shared by everything that has nothing to wait for."""


class Then(Transfer):
    """Two transfers, one behind the other.

    Nobody is woken when the first ends: the second begins when this one is next asked whether it is
    ready, or waited for.
    """

    __slots__ = ("_begin_second", "_first", "_second")

    def __init__(self, first: Transfer, begin_second: Callable[[], Transfer]) -> None:
        super().__init__()
        self._first = first
        self._begin_second = begin_second
        self._second: Transfer | None = None

    def is_ready(self) -> bool:
        """Whether both are done, or one failed; begins the second if it is time."""
        if not self._is_ready and (self._second or self._first).is_ready():
            self._advance()
        return self._is_ready

    def wait(self) -> None:
        """Return when both are done. Raises TierIOError when one failed, each time."""
        while not self._is_ready:
            with contextlib.suppress(TierIOError):  # `_advance` keeps it
                (self._second or self._first).wait()
            self._advance()
        super().wait()

    def hold_device(self) -> None:
        """Let the device's next work come after both; the first is waited for."""
        while not self._is_ready and self._second is None:
            with contextlib.suppress(TierIOError):
                self._first.wait()
            self._advance()
        if self._is_ready or self._second is None:
            super().wait()
        else:
            self._second.hold_device()

    def _advance(self) -> None:
        """What is under way has ended: begin the second, or end."""
        error: TierIOError | None = None
        try:
            if self._second is None:
                self._second = self._after_first()
                if not self._second.is_ready():
                    return
            self._second.wait()
        except TierIOError as failure:
            error = failure
        except TieredCacheError as failure:  # it was begun already, and who did was interrupted
            error = io_error(None, f"cannot go on with a transfer that was interrupted: {failure}")
            error.__cause__ = failure
        self.end_part(error)
        self._begin_second = _already_begun  # memory that the other one knew is held no more


    def _after_first(self) -> Transfer:
        """The second transfer, begun now that the first has ended."""
        self._first.wait()
        return self._begin_second()


class OrElse(Then):
    """A transfer, and another one in its place where it fails with `code`."""

    __slots__ = ("_code",)

    def __init__(self, first: Transfer, code: int, begin_second: Callable[[], Transfer]) -> None:
        super().__init__(first, begin_second)
        self._code = code

    def _after_first(self) -> Transfer:
        try:
            self._first.wait()
        except TierIOError as failure:
            if failure.errno != self._code:
                raise
            return self._begin_second()
        return DONE


def _already_begun() -> Transfer:
    raise AssertionError("what has ended begins nothing")


class AllOf(Transfer):
    """Several transfers, ready when all are."""

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[Transfer]) -> None:
        super().__init__()
        self._members = members

    def is_ready(self) -> bool:
        """Whether all are."""
        if not self._is_ready:
            looks = [member.is_ready() for member in self._members]  # at every one: `Then` goes on
            if all(looks):
                self._end()
        return self._is_ready

    def wait(self) -> None:
        """Return when all are done. Raises TierIOError when one failed, each time."""
        if not self._is_ready:
            self._end()
        super().wait()

    def hold_device(self) -> None:
        """Let the device's next work come after all."""
        for member in self._members:
            member.hold_device()

    def _end(self) -> None:
        error: TierIOError | None = None
        for member in self._members:
            try:
                member.wait()
            except TierIOError as failure:
                error = error or failure
        self.end_part(error)
