"""`ForwardGuard`: a cache takes part in one forward at a time, and in all of it or in nothing.

Two threads in one cache are told so, instead of mixing their tokens. Before a forward changes
anything a savepoint is taken; should the forward fail, in whatever layer and for whatever reason,
it is restored as soon as the call of the model ends, at the latest when the cache is used next.
"""

import threading
from collections.abc import Callable
from typing import Protocol

from hf_tiered_cache.errors import (
    CacheInUseError,
    OutOfBlocksError,
    TierIOError,
    TornBooksError,
    TornCacheError,
)
from hf_tiered_cache.integration import forwards
from hf_tiered_cache.integration.forwards import Forward

RESET = "reset"  # the change that makes good any other

# What may have changed something when it was raised in a layer, besides interrupts: whatever else
# is raised refuses what was given, and the forward may go on.
FAILURES = (OutOfBlocksError, TierIOError, TornBooksError, MemoryError)


class Restorable(Protocol):
    """A cache's state before a forward."""

    def restore(self, forward: Forward) -> None:
        """Undo what `forward` did since. Repeatable, should it be interrupted."""


class ForwardGuard:
    """Admits one thread at a time, and one at most from a forward's begin to its end.

    Threads may take turns: between two forwards any of them may come next. A thread that has ended
    holds nothing. `has_seen_all`: a forward that is not watched went through, so every layer there
    is has been seen. `unfinished`: the change of the whole cache that was begun and did not end.
    """

    __slots__ = ("has_seen_all", "unfinished", "_inside", "_lock", "_open", "__weakref__")

    def __init__(self) -> None:
        self.has_seen_all = False
        self.unfinished: str | None = None
        # The number of the thread that is in, alone in this dict: `setdefault` is atomic, and a
        # thread that an interrupt kept from leaving finds itself inside.
        self._inside: dict[str, int] = {}
        self._lock = threading.RLock()  # settling; a thread may come upon another's ended forward
        self._open: tuple[Forward, Restorable] | None = None

    def join(self, take_savepoint: Callable[[], Restorable]) -> None:
        """Let this cache take part in the watched forward of this thread, if there is one, unless
        it does. For what only looks: a forward of another thread is not disturbed. Raises
        TornCacheError."""
        forward = forwards.current()
        if self._open is not None:
            if self._open[0] is forward:
                return
            self.settle()
        self._check_finished()
        if forward is not None and self._open is None:
            self._begin(forward, take_savepoint)

    def admit(
        self,
        layer: int,
        last_layer: Callable[[], int],
        take_savepoint: Callable[[], Restorable],
        brings_tokens: bool = False,
    ) -> "ForwardGuard":
        """Let this thread in, for the `with` block, to one layer of a forward.

        last_layer: where a forward that is not watched ends. brings_tokens: each layer does so once
        in a forward. Raises CacheInUseError while another thread is in, or in a forward, and
        TornCacheError.
        """
        self._enter()
        try:
            forward = forwards.current()
            if self._open is None or self._open[0] is not forward:
                self._check_finished()
                self._take_turn(last_layer)
                if self._open is not None and self._ends_here(layer, forward, brings_tokens):
                    self._open[0].end(is_good=True)
                    self.settle()
                if self._open is None:
                    self._begin(forward or Forward(), take_savepoint)
            if forward is None:
                assert self._open is not None
                self._open[0].last_layer = layer
                if brings_tokens:
                    self._open[0].last_tokens = layer
        except BaseException:
            self._inside.clear()
            raise
        return self

    def admit_alone(
        self, last_layer: Callable[[], int], change: str | None = None
    ) -> "ForwardGuard":
        """Let this thread in, for the `with` block, to the whole cache; `last_layer` as above.

        change: what is done to all layers, one after the other. Should it not come to its end, the
        cache refuses everything but `reset()`. What was done before within a forward that is under
        way here stays.
        """
        self._enter()
        try:
            if change != RESET:
                self._check_finished()
            if self._open is not None and self._open[0] is not forwards.current():
                self._take_turn(last_layer)
                if self._open is not None and not self._open[0].is_watched:
                    self._open[0].end(is_good=True)
                self.settle()
            elif change:
                self._open = None
            self.unfinished = change
        except BaseException:
            self._inside.clear()
            raise
        return self

    def settle(self) -> None:
        """If the forward this cache took part in has ended: keep what it did, or undo it."""
        if self._open is None:
            return
        with self._lock:
            if self._open is None or self._open[0].is_running:
                return
            forward, savepoint = self._open
            if not forward.is_good:
                savepoint.restore(forward)
            self._open = None

    def __enter__(self) -> None:
        """The stay of a thread that was admitted."""

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            if error is None or not _is_failure(error):
                self.unfinished = None
            else:
                self.note_failure(error)
        finally:
            self._inside.clear()

    def note_failure(self, error: type[BaseException]) -> None:
        """Something was raised in the cache, or in attention to it. Where the forward is not
        watched, a failure ends it."""
        if _is_failure(error) and self._open is not None and not self._open[0].is_watched:
            self._open[0].end(is_good=False)
            self.settle()

    @property
    def savepoint(self) -> Restorable | None:
        """The way back of the forward that is under way."""
        return None if self._open is None else self._open[1]

    def give_up(self) -> None:
        """Forget a forward that is not watched and that nobody will finish."""
        if self._open is not None and not self._open[0].is_watched:
            self._open = None
            self._inside.clear()

    def _check_finished(self) -> None:
        if self.unfinished is not None:
            raise TornCacheError(
                f"{self.unfinished}() of this cache was interrupted, so its layers may hold "
                "different tokens: reset() it and begin again, or make a new one"
            )

    def _begin(self, forward: Forward, take_savepoint: Callable[[], Restorable]) -> None:
        if forward.is_watched:  # one that is not tells nobody, and would keep the cache in a cycle
            forward.members.append(self)
        self._open = (forward, take_savepoint())

    def _enter(self) -> None:
        me = threading.get_ident()
        number = self._inside.setdefault("thread", me)
        if number != me:
            for owner in threading.enumerate():
                if owner.ident == number:
                    raise self._in_use(owner)
            self._inside["thread"] = me

    def _take_turn(self, last_layer: Callable[[], int]) -> None:
        """Settle what another thread left. Raises CacheInUseError if it is in a forward."""
        if self._open is None:
            return
        forward = self._open[0]
        owner = forward.thread
        if forward.is_running and owner is not threading.current_thread():
            is_under_way = forward.is_watched or forward.last_layer < last_layer()
            if is_under_way and owner is not None and owner.is_alive():
                raise self._in_use(owner)
            forward.end(is_good=not forward.is_watched)
        self.settle()

    def _ends_here(self, layer: int, forward: Forward | None, brings_tokens: bool) -> bool:
        """Whether the open forward, which is not watched, has ended when this layer comes."""
        assert self._open is not None
        known = self._open[0]
        if layer < known.last_layer:
            self.has_seen_all = True
            return True
        return forward is not None or (brings_tokens and layer <= known.last_tokens)

    def _in_use(self, owner: threading.Thread | None) -> CacheInUseError:
        return CacheInUseError(
            f"thread {threading.current_thread().name!r} came to a cache in the middle of a "
            f"forward of thread {owner.name if owner else 'unknown'!r}: give each thread its own "
            "TieredCache (copy.deepcopy shares a prompt's blocks), or let them take turns; if that "
            "forward was given up, reset() the cache"
        )


def _is_failure(error: type[BaseException]) -> bool:
    return issubclass(error, FAILURES) or not issubclass(error, Exception)
