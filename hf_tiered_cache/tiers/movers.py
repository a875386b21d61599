"""Who moves records between memory and the file: the compiled core's threads, or Python's own.

The compiled threads never need the interpreter lock, so they keep the disk busy while the main
thread computes; they move bytes and make checksums. What came of it is settled in Python: a job is
settled by whoever waits for its transfer, or by the next verb of the tier. Python's threads run
whole jobs; they serve machines without the compiled core, and tests put faults under them.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.tiers.base import Transfer
from hf_tiered_cache.tiers.io_threads import IOThreads
from hf_tiered_cache.tiers.record_jobs import RecordsJob

MOVERS = ("auto", "compiled", "python")
WAIT_SECONDS = 0.1  # at most this long is not interruptible


class Mover(Protocol):
    """Does jobs in the order they were submitted, several at a time."""

    @property
    def wait_settled(self) -> Callable[[], None] | None:
        """Waits until a job may have been settled; None where that needs no help."""

    def start(self) -> None:
        """Start the threads, unless they run. Raises RuntimeError when not even one starts."""

    def transfer(self, num_parts: int) -> Transfer:
        """A transfer for the jobs to be submitted next."""

    def submit(self, job: RecordsJob) -> None:
        """Queue `job`; legal between `start()` and `close()`."""

    def cancel(self, jobs: Iterable[RecordsJob]) -> None:
        """End those jobs that are not under way, submitted or not."""

    def settle(self) -> None:
        """Settle the jobs that are done."""

    def close(self) -> None:
        """Let the jobs under way end, cancel those queued, join the threads. Idempotent."""


@lru_cache(maxsize=1)
def compiled_core() -> ModuleType | None:
    """The compiled core, if it is there and moves records."""
    try:
        core = import_module("hf_tiered_cache._C")
    except ImportError:
        return None
    return core if hasattr(core, "BlockIO") else None


def make_mover(name: str, num_threads: int) -> Mover:
    """The mover of that name; "auto" is the compiled one where it is there. Raises ConfigError."""
    if name not in MOVERS:
        raise ConfigError(f"unknown mover {name!r}; expected one of {', '.join(MOVERS)}")
    core = compiled_core()
    if name == "compiled" and core is None:
        raise ConfigError("mover 'compiled' needs the compiled core, which was not built")
    if core is None or name == "python":
        return PythonMover(num_threads, "hf_tiered_cache-disk")
    return CompiledMover(core, num_threads)


class PythonMover(IOThreads):
    """Python's threads: each job runs, and settles itself, in one of them."""

    wait_settled = None

    def transfer(self, num_parts: int) -> Transfer:
        """A transfer for the jobs to be submitted next."""
        return Transfer(num_parts)

    def cancel(self, jobs: Iterable[RecordsJob]) -> None:
        """End those jobs that are not under way, submitted or not."""
        for job in jobs:
            job.cancel()

    def settle(self) -> None:
        """Nothing to do: the threads do it."""


class CompiledMover:
    """The threads of the compiled core. They hold addresses; `_open` keeps the memory alive."""

    def __init__(self, core: ModuleType, num_threads: int) -> None:
        self._core = core
        self._io = core.BlockIO(num_threads)
        self._open: dict[RecordsJob, None] = {}  # submitted and not settled, in order

    def start(self) -> None:
        """Start the threads, unless they run. Raises RuntimeError when not even one starts."""
        self._io.start()

    def transfer(self, num_parts: int) -> Transfer:
        """A transfer for the jobs to be submitted next."""
        return CompiledTransfer(self, num_parts)

    def submit(self, job: RecordsJob) -> None:
        """Queue `job` behind the writes of the slots it reads."""
        slots = set(job.slots)
        job.after = [
            other for other in self._open if other.is_write and not slots.isdisjoint(other.slots)
        ]
        job.move = self._core.Move(
            is_write=job.is_write,
            fd=job.descriptor,
            offset=job.offset,
            record_bytes=job.record_bytes,
            addresses=job.addresses,
            is_direct=job.is_direct,
            after=[other.move for other in job.after],
        )
        assert isinstance(job.transfer, CompiledTransfer)
        job.transfer.jobs.append(job)
        self._open[job] = None
        self._io.submit(job.move)

    def cancel(self, jobs: Iterable[RecordsJob]) -> None:
        """End those jobs that are not under way, submitted or not."""
        for job in jobs:
            if job.move is None:
                job.cancel()
                continue
            self._io.cancel(job.move)
            self._open[job] = None
        self.settle()

    def is_done(self, job: RecordsJob) -> bool:
        """Whether the core is through with `job`; it is settled then."""
        if not job.move.is_done:
            return False
        job.settle()
        self._open.pop(job, None)
        return True

    def wait(self, job: RecordsJob) -> None:
        """Wait until `job` is done and settled, by us or by another thread soon."""
        while not self._io.wait(job.move, WAIT_SECONDS):
            pass  # here Ctrl-C comes through
        self.is_done(job)

    def settle(self) -> None:
        """Settle the jobs that are done."""
        for job in list(self._open):
            self.is_done(job)

    def wait_settled(self) -> None:
        """Wait for the oldest job that is not settled, or for a while."""
        for job in list(self._open)[:1]:
            self._io.wait(job.move, WAIT_SECONDS)
        self.settle()

    def close(self) -> None:
        """Let the moves under way end, cancel those queued, join the threads. Idempotent.

        Transfers are settled by whoever asks for them, also later.
        """
        self._io.close()
        self._open.clear()


class CompiledTransfer(Transfer):
    """A transfer whose parts are settled when it is asked for."""

    __slots__ = ("_mover", "jobs")

    def __init__(self, mover: CompiledMover, num_parts: int) -> None:
        super().__init__(num_parts)
        self._mover = mover
        self.jobs: list[RecordsJob] = []  # until it is ready

    def is_ready(self) -> bool:
        """Whether it is done or failed, without waiting."""
        if not self._is_ready:
            for job in list(self.jobs):
                if not self._mover.is_done(job):
                    return False
        return self._is_ready

    def wait(self) -> None:
        """Return when done. Raises TierIOError when it failed, each time it is called."""
        if not self._is_ready:
            self.check_process()
            for job in list(self.jobs):
                self._mover.wait(job)
        super().wait()

    def end_part(self, error: TierIOError | None = None, **when: Any) -> None:
        """One part ended; see `Transfer.end_part`."""
        super().end_part(error, **when)
        if self._is_ready:
            self.jobs.clear()
