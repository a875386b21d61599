"""One background thread that writes what is published, behind a queue bounded in bytes."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

QUEUE_BYTES = 1 << 30  # of blocks that wait to be written
EXIT_SECONDS = 10.0  # what is queued when the interpreter ends may take so long
WAKE_SECONDS = 0.1


def _nothing() -> None:
    pass


class Work(NamedTuple):
    """Something to be written. `drop`: before or while it runs, lets `run` return soon."""

    num_bytes: int
    run: Callable[[], None]
    keys: frozenset[bytes] = frozenset()  # of the blocks it writes
    drop: Callable[[], None] = _nothing
    owner: object = None  # whose memory it keeps


class _Queue:
    """What the thread and its owner share; the thread does not keep the owner alive."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.waiting: deque[Work] = deque()
        self.num_bytes = 0
        self.running: Work | None = None
        self.is_closing = False


class Publisher:
    """Runs what is submitted, in order, in a thread that starts with the first. `failed` is called
    with what a piece of work raised; the thread goes on."""

    def __init__(self, failed: Callable[[Exception], None], queue_bytes: int = QUEUE_BYTES) -> None:
        self._failed = failed
        self._queue_bytes = queue_bytes
        self._begin()
        self._finalizer = weakref.finalize(self, _end, self._queue, EXIT_SECONDS)

    def _begin(self) -> None:
        self._queue = _Queue()
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    def submit(self, work: Work) -> bool:
        """Queue work; False, and nothing queued, where the queue is full. What is
        larger than the whole queue is taken by an empty one."""
        if self._pid != os.getpid():  # a forked child: the thread stayed with the parent
            self._begin()
            self._finalizer = weakref.finalize(self, _end, self._queue, EXIT_SECONDS)
        queue = self._queue
        with queue.changed:
            is_full = queue.num_bytes + work.num_bytes > self._queue_bytes
            if queue.is_closing or (is_full and (queue.waiting or queue.running)):
                return False
            if self._thread is None:
                thread = threading.Thread(
                    target=_work,
                    args=(queue, self._failed),
                    name="hf_tiered_cache-publisher",
                    daemon=True,
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads are to be had
                    return False
                self._thread = thread
            queue.waiting.append(work)
            queue.num_bytes += work.num_bytes
            queue.changed.notify_all()
        return True

    def has(self, key: bytes) -> bool:
        """Whether the block of that key is on its way."""
        queue = self._queue
        with queue.changed:
            works = [*queue.waiting, *([queue.running] if queue.running else [])]
            return self._pid == os.getpid() and any(key in work.keys for work in works)

    def drop(self, owner: object) -> int:
        """Give up what is queued and keeps memory of `owner`, and wait for what runs to end early;
        how many pieces of work. For whoever has no other memory left."""
        if self._pid != os.getpid():
            return 0
        queue = self._queue
        with queue.changed:
            running = queue.running
            is_ours = running is not None and running.owner is owner
            dropped = [work for work in queue.waiting if work.owner is owner]
            queue.waiting = deque(work for work in queue.waiting if work.owner is not owner)
            queue.num_bytes -= sum(work.num_bytes for work in dropped)
            if running is not None and is_ours:
                running.drop()
            for work in dropped:
                work.drop()
                work.run()  # which only lets go of what it keeps
            while is_ours and queue.running is running:
                queue.changed.wait(WAKE_SECONDS)
        return len(dropped) + is_ours

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything that was queued is written; False where that took too long."""
        return self._pid != os.getpid() or _wait(self._queue, timeout_seconds)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Write what is queued, then let the thread end; what is left after `timeout_seconds` is
        given up. Idempotent."""
        if self._pid == os.getpid():
            _end(self._queue, timeout_seconds)
        self._finalizer.detach()


def _wait(queue: _Queue, timeout_seconds: float | None) -> bool:
    deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
    with queue.changed:
        while queue.waiting or queue.running:
            if deadline is not None and monotonic() >= deadline:
                return False
            queue.changed.wait(WAKE_SECONDS)
    return True


def _end(queue: _Queue, timeout_seconds: float | None) -> None:
    _wait(queue, timeout_seconds)
    with queue.changed:
        queue.is_closing = True
        queue.waiting.clear()
        queue.num_bytes = 0
        queue.changed.notify_all()


def _work(queue: _Queue, failed: Callable[[Exception], None]) -> None:
    while True:
        with queue.changed:
            while not queue.waiting:
                if queue.is_closing:
                    return
                queue.changed.wait()
            work = queue.running = queue.waiting.popleft()
        try:
            work.run()
        except Exception as error:
            failed(error)
        finally:
            with queue.changed:
                queue.running = None
                queue.num_bytes = max(0, queue.num_bytes - work.num_bytes)
                del work  # an idle thread keeps no tensors alive
                queue.changed.notify_all()
