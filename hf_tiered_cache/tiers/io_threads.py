"""A few threads that do what is queued, in order. They know nothing of tiers."""

import queue
import threading
from collections.abc import Callable
from typing import Protocol


class Job(Protocol):
    """Something to do in an I/O thread. Exactly one of the two is called, and may not raise."""

    def run(self) -> None:
        """Do it."""

    def cancel(self) -> None:
        """The threads stop before its turn came."""


class IOThreads:
    """Starts jobs in the order they were queued, `num_threads` at a time.

    A job may wait for jobs queued before it: those are under way already. The threads hold no
    reference to this object or its owner, and are daemons: the owner's finalizer (which also runs
    at interpreter exit) stops them.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads, unless they run. Raises RuntimeError when not even one starts."""
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(
                target=_work,
                args=(self._jobs, self._stop.is_set),
                name=f"{self._name}-{len(self._threads)}",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError:  # the process may have no more threads: fewer do as well
                if not self._threads:
                    raise
                self._num_threads = len(self._threads)
            else:
                self._threads.append(thread)

    def submit(self, job: Job) -> None:
        """Queue `job`; legal between `start()` and `close()`."""
        assert self._threads and not self._stop.is_set(), "a job without threads to do it"
        self._jobs.put(job)

    def close(self) -> None:
        """Let the jobs under way end, cancel those queued, join the threads. Idempotent."""
        self._stop.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            # Garbage collection may finalize the owner in one of these very threads.
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []


def _work(jobs: "queue.SimpleQueue[Job | None]", is_stopping: Callable[[], bool]) -> None:
    while (job := jobs.get()) is not None:
        if is_stopping():
            job.cancel()
        else:
            job.run()
        del job  # an idle thread keeps no tensors alive
