"""`ForwardGuard`: two threads in one cache are told so, instead of mixing their tokens."""

import threading
import weakref
from collections.abc import Callable

from hf_tiered_cache.errors import CacheInUseError


class ForwardGuard:
    """Admits one thread at a time, and one at most from a forward's first layer to its last.

    Threads may take turns: between two forwards any of them may come next. A thread that has ended
    holds nothing. `has_seen_all`: a forward went through, so every layer there is has been seen.
    """

    __slots__ = ("has_seen_all", "_lock", "_thread_id", "_thread", "_last_seen")

    def __init__(self) -> None:
        self.has_seen_all = False
        self._lock = threading.Lock()
        self._thread_id = 0
        self._thread: weakref.ref[threading.Thread] | None = None
        self._last_seen: int | None = None  # layer of the forward under way

    def admit(self, last_layer: Callable[[], int], layer: int | None) -> "Admitted":
        """Let this thread in for the `with` block: to one layer of a forward, or to the whole cache
        (None). Raises CacheInUseError while another thread is in, or has not come to the
        `last_layer` of its forward."""
        if not self._lock.acquire(blocking=False):
            raise self._in_use()
        if self._thread_id != threading.get_ident():
            seen, other = self._last_seen, self._owner()
            if seen is not None and seen < last_layer() and other and other.is_alive():
                self._lock.release()
                raise self._in_use()
            self._thread_id = threading.get_ident()
            self._thread = weakref.ref(threading.current_thread())
        return Admitted(self, layer)

    def leave(self, layer: int | None) -> None:
        """The thread is out, after this layer of a forward; None: no forward is under way."""
        if layer is not None and self._last_seen is not None and layer < self._last_seen:
            self.has_seen_all = True
        self._last_seen = layer
        self._lock.release()

    def give_up(self) -> None:
        """Forget a forward that nobody will finish."""
        self._last_seen = None

    def _owner(self) -> threading.Thread | None:
        return None if self._thread is None else self._thread()

    def _in_use(self) -> CacheInUseError:
        owner = self._owner()
        return CacheInUseError(
            f"thread {threading.current_thread().name!r} came to a cache in the middle of a "
            f"forward of thread {owner.name if owner else 'unknown'!r}: give each thread its own "
            "TieredCache (copy.deepcopy shares a prompt's blocks), or let them take turns; if that "
            "forward was given up, reset() the cache"
        )


class Admitted:
    """A thread's stay. A layer that failed ends its forward."""

    __slots__ = ("_guard", "_layer")

    def __init__(self, guard: ForwardGuard, layer: int | None) -> None:
        self._guard = guard
        self._layer = layer

    def __enter__(self) -> None:
        return None

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._guard.leave(self._layer if error is None else None)
