"""One request, from its arrival to its end, and all of them that are there at once.

A `Request` is made before the body is read. The event loop and the thread that runs the model both
look at it: the loop ends it (deadline, client gone), the thread sees that between two forwards.
"""

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter

BYTES_PER_TOKEN = 4  # of a body that was not tokenised yet: English text and JSON around it


@dataclass(frozen=True)
class Failure:
    """Why a request ended without its answer: an HTTP status, and what the client is told."""

    status: int
    message: str
    kind: str
    retry_after_seconds: int | None = None


class Request:
    """A request that was admitted.

    tenant: whose it is; caches are shared within one tenant only. prompt_tokens: an estimate until
    the prompt is tokenised. seed: of its sampling. Times are `perf_counter()` seconds, None until
    it happened.
    """

    def __init__(self, tenant: str = "", prompt_tokens: int = 0) -> None:
        self.tenant = tenant
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.seed: int | None = None
        self.arrived = perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.failure: Failure | None = None
        self.is_over = False
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def start(self) -> None:
        """The model begins with it. In the model's thread."""
        self.started = perf_counter()
        self._tell()

    def note_token(self) -> float:
        """A token came out; returns the seconds since the one before, or since the arrival."""
        now = perf_counter()
        since = now - (self.last_token or self.arrived)
        self.last_token = now
        if self.first_token is None:
            self.first_token = now
            self._tell()
        return since

    def end(self, failure: Failure | None = None) -> None:
        """Nobody waits for it any more: the model leaves it at its next forward. The first failure
        counts."""
        with self._lock:
            self.failure = self.failure or failure
            self.is_over = True
        self._tell()

    def fail(self, failure: Failure) -> None:
        """The model gave it up. In the model's thread."""
        with self._lock:
            self.failure = self.failure or failure
        self._tell()

    async def until(self, is_so: Callable[["Request"], bool]) -> None:
        """Return when `is_so(self)`, which is asked whenever something happened to the request."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.append(wake)
        try:
            while not is_so(self):
                await changed.wait()
                changed.clear()
        finally:
            with self._lock:
                self._listeners.remove(wake)

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for wake in listeners:
            wake()


current_request: ContextVar[Request] = ContextVar("current_request")
"""The request that the running task works for."""


class Requests:
    """All requests that are there. Counted from their arrival, so that a burst finds the doors
    closed before anything was read or tokenised.

    max_running: that the model interleaves. max_queued_reqs, max_queued_tokens: that may wait
    beside them; one request is always let in, however long it is. For the event loop alone.
    """

    def __init__(self, max_running: int, max_queued_reqs: int, max_queued_tokens: int) -> None:
        self.max_running = max_running
        self.max_queued_reqs = max_queued_reqs
        self.max_queued_tokens = max_queued_tokens
        self._all: dict[int, Request] = {}
        self._mean_seconds = 1.0  # of a request that got its answer

    def admit(self, tenant: str, body_bytes: int) -> Request | Failure:
        """A new request, or why it cannot come in now."""
        if len(self._all) >= self.max_running + self.max_queued_reqs:
            return self._full(
                f"{self.max_queued_reqs} requests are waiting (--max-num-queued-reqs)"
            )
        request = Request(tenant)
        failure = self.measure(request, body_bytes)
        if failure is not None:
            return failure
        self._all[id(request)] = request
        return request

    def measure(self, request: Request, body_bytes: int) -> Failure | None:
        """Count what its body has, which a chunked one does not say before; why it cannot stay."""
        tokens = -(-body_bytes // BYTES_PER_TOKEN)
        more, queued = tokens - request.prompt_tokens, self.num_queued_tokens
        others = self._all.keys() - {id(request)}
        if others and more > 0 and queued + more > self.max_queued_tokens:
            return self._full(
                f"{queued} prompt tokens are waiting and this request brings about {more} more, of "
                f"at most {self.max_queued_tokens} (--max-num-queued-tokens)"
            )
        request.prompt_tokens = tokens
        return None

    def _full(self, reason: str) -> Failure:
        return Failure(503, f"the server is full: {reason}", "overloaded", self.retry_after)

    def leave(self, request: Request) -> None:
        """It is answered, or given up."""
        if self._all.pop(id(request), None) and request.failure is None:
            seconds = perf_counter() - request.arrived
            self._mean_seconds += 0.2 * (seconds - self._mean_seconds)

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a place is likely to be free."""
        return min(60, max(1, round(self._mean_seconds)))

    @property
    def num_running(self) -> int:
        return sum(it.started is not None for it in self._all.values())

    @property
    def num_queued(self) -> int:
        return len(self._all) - self.num_running

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of those that the model has not begun with."""
        return sum(it.prompt_tokens for it in self._all.values() if it.started is None)

    @property
    def is_full(self) -> bool:
        """Whether a small request would be refused."""
        return (
            len(self._all) >= self.max_running + self.max_queued_reqs
            or self.num_queued_tokens >= self.max_queued_tokens
        )
