"""Transfers made of others: one behind the other, or side by side."""

import contextlib
from collections.abc import Callable, Sequence

from hf_tiered_cache.errors import TieredCacheError, TierIOError
from hf_tiered_cache.tiers.base import Transfer, io_error


class Relay(Transfer):
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
                self._first.wait()
                self._second = self._begin_second()
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


def _already_begun() -> Transfer:
    raise AssertionError("a relay that has ended begins nothing")


class Joint(Transfer):
    """Several transfers, ready when all are."""

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[Transfer]) -> None:
        super().__init__()
        self._members = members

    def is_ready(self) -> bool:
        """Whether all are."""
        if not self._is_ready:
            looks = [member.is_ready() for member in self._members]  # at every one: a relay goes on
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
