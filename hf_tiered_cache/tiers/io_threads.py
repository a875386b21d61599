"""A few threads that do what is queued, in order, for all tiers of a process. They know no tier.

An interrupt may come between any two lines of the main thread, so nothing here is counted: who uses
the threads is a set, and a thread ends when it finds that set empty.
"""

import contextlib
import errno
import os
import signal
import threading
from abc import ABC, abstractmethod
from queue import SimpleQueue
from threading import get_ident
from time import monotonic
from weakref import WeakSet

from hf_tiered_cache.errors import TierIOError, io_error

JOIN_SECONDS = 5.0  # whoever leaves last waits so long for the threads to end; they end anyway
_CANCELLED = 0  # no thread has this number


class Job(ABC):
    """Something to do in an I/O thread, unless it was cancelled before its turn came."""

    __slots__ = ("_turn",)

    def __init__(self) -> None:
        self._turn: dict[None, int] = {}  # whose it is; the first to say so, in one step, has it

    @property
    def runner(self) -> int | None:
        """The number of the thread that runs it, or ran it."""
        return self._turn.get(None)

    def run(self) -> None:
        """Do it, in this thread, unless it was cancelled."""
        if self._turn.setdefault(None, get_ident()) == _CANCELLED:
            self._cancel()  # whoever cancelled it may have been interrupted
        else:
            self._run()

    def cancel(self) -> None:
        """End it, unless its turn has come. After an interrupt it may be called again."""
        if self._turn.setdefault(None, _CANCELLED) == _CANCELLED:
            self._cancel()

    @abstractmethod
    def _run(self) -> None:
        """Do it; may not raise."""

    @abstractmethod
    def _cancel(self) -> None:
        """It is never run. May be called again."""


class IOThreads:
    """Starts jobs in the order they were queued, `num_threads` at a time, while somebody uses it.

    A job may wait for jobs queued before it: those are under way already.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._users: WeakSet[object] = WeakSet()
        self._threads: list[threading.Thread] = []
        self._is_manned = False  # no thread is missing, and none ends while there are users
        # Held where threads are started and where one ends; never where a job is done.
        self._lock = threading.Lock()

    def enter(self, user: object) -> None:
        """Let the threads run until `user` leaves. Raises TierIOError when not even one starts."""
        if self._is_manned and user in self._users:
            return
        with self._lock:
            self._users.add(user)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            while len(self._threads) < self._num_threads and self._start_one():
                pass
            self._is_manned = True

    def submit(self, job: Job) -> None:
        """Queue `job`; legal for who uses the threads."""
        self._jobs.put(job)

    def leave(self, user: object) -> None:
        """Let the threads end if nobody else uses them. All jobs of `user` have ended. May be
        repeated."""
        self._users.discard(user)
        if self._users:
            return
        self._jobs.put(None)
        deadline = monotonic() + JOIN_SECONDS
        for thread in list(self._threads):
            # Garbage collection may finalize a user in one of these very threads.
            if thread is not threading.current_thread():
                with contextlib.suppress(RuntimeError):  # its start was interrupted
                    thread.join(max(0.0, deadline - monotonic()))

    def _start_one(self) -> bool:
        """Start a thread; False where the process may have no more: fewer do as well."""
        number = len(self._threads)
        thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
        self._threads.append(thread)  # an interrupt may come when it runs, and `start` not ended
        try:
            thread.start()
        except RuntimeError as error:
            self._threads.remove(thread)
            if self._threads:
                return False
            raise no_thread(error) from error
        return True

    def _work(self) -> None:
        # A program around Python may let it kill: a write that is too long then fails with EFBIG.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXFSZ})
        while True:
            job = self._jobs.get()
            if job is not None:
                job.run()
                del job  # an idle thread keeps no tensors alive
            elif self._may_end():
                self._jobs.put(None)  # for the next thread
                return

    def _may_end(self) -> bool:
        with self._lock:
            if self._users:
                return False
            self._is_manned = False
            return True


_shared: dict[tuple[int, str, int], IOThreads] = {}


def shared_threads(num_threads: int, name: str) -> IOThreads:
    """The threads of that name in this process: a forked child has its own."""
    key = (os.getpid(), name, num_threads)
    return _shared.setdefault(key, IOThreads(num_threads, name))  # one step: it needs no lock


def no_thread(cause: Exception) -> TierIOError:
    """What to say when the system gives no thread."""
    return io_error(
        errno.EAGAIN,
        f"cannot start an I/O thread: {cause}; raise the limit of processes and threads (`ulimit"
        " -u`, or the container's) or of memory (`ulimit -v`), or end others; nothing was changed",
    )
