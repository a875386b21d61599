"""Who moves records between memory and the file: the compiled core's threads, or Python's own.

The compiled threads never need the interpreter lock, so they keep the disk busy while the main
thread computes; they move bytes and make checksums. What came of it is settled in Python: a job is
settled by whoever waits for its transfer, or by the next verb of the tier. Python's threads run
whole jobs; they serve machines without the compiled core, and tests put faults under them. Either
threads are shared by all tiers of the process.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from itertools import count
from types import ModuleType
from typing import Any, Protocol

from hf_tiered_cache.compiled import compiled_core
from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.tiers.disk.record_jobs import RecordsJob
from hf_tiered_cache.tiers.io_threads import no_thread, shared_threads
from hf_tiered_cache.transfers import Transfer

MOVERS = ("auto", "compiled", "python")
WAIT_SECONDS = 0.1  # at most this long is not interruptible


class Mover(Protocol):
    """Does jobs of one tier in the order they were submitted, several at a time."""

    def start(self) -> None:
        """Start the threads, unless they run. Raises TierIOError when not even one starts."""

    def transfer(self, num_parts: int) -> Transfer:
        """A transfer for the jobs to be submitted next."""

    def submit(self, job: RecordsJob, before: Sequence[RecordsJob]) -> None:
        """Queue `job`, behind those that the tier began `before`; after `start()`."""

    def cancel(self, job: RecordsJob) -> None:
        """End `job` unless it is under way, submitted or not. May be repeated."""

    def settle(self, jobs: Iterable[RecordsJob]) -> None:
        """Settle those jobs that are done."""

    def close(self) -> None:
        """Let the threads go; every job has ended. May be repeated."""


class Jobs(Protocol):
    """What holds the jobs of a tier that were begun and not forgotten."""

    @property
    def users(self) -> Sequence[RecordsJob]: ...


def submit_jobs(mover: Mover, jobs: Sequence[RecordsJob], before: Sequence[RecordsJob]) -> None:
    """Queue jobs behind those that the tier began `before`. An interrupt cancels them all: nobody
    may wait for a part that was never queued."""
    try:
        for job in jobs:
            mover.submit(job, before)
            job.is_queued = True
    except BaseException:
        for job in jobs:
            mover.cancel(job)
        raise


def end_jobs(mover: Mover, jobs: Jobs) -> None:
    """Cancel what no thread is at, wait for the rest."""
    users = jobs.users
    for job in users:
        mover.cancel(job)
    # Garbage collection may finalize the tier in one of the very threads.
    own = {job.transfer for job in users if job.runner == threading.get_ident()}
    for job in users:
        if job.transfer not in own:
            job.transfer.outlast()
            job.conclude_again()


def moving_core() -> ModuleType | None:
    """The compiled core, if it is there and moves records."""
    core, _ = compiled_core()
    return core if hasattr(getattr(core, "BlockIO", None), "enter") else None  # else an old build


def make_mover(name: str, num_threads: int) -> Mover:
    """The mover of that name; "auto" is the compiled one where it is there. Raises ConfigError."""
    if name not in MOVERS:
        raise ConfigError(f"unknown mover {name!r}; expected one of {', '.join(MOVERS)}")
    has_core = moving_core() is not None
    if name == "compiled" and not has_core:
        raise ConfigError("mover 'compiled' needs the compiled core, which was not built")
    if not has_core or name == "python":
        return PythonMover(num_threads)
    return CompiledMover(num_threads)


class PythonMover:
    """Python's threads: each job runs, and concludes itself, in one of them."""

    def __init__(self, num_threads: int) -> None:
        self._threads = shared_threads(num_threads, "hf_tiered_cache-disk")

    def start(self) -> None:
        """Start the threads, unless they run. Raises TierIOError when not even one starts."""
        self._threads.enter(self)

    def transfer(self, num_parts: int) -> Transfer:
        """A transfer for the jobs to be submitted next."""
        return Transfer(num_parts)

    def submit(self, job: RecordsJob, before: Sequence[RecordsJob]) -> None:
        """Queue `job`; a read waits in its thread for the writes before it."""
        self._threads.submit(job)

    def cancel(self, job: RecordsJob) -> None:
        """End `job` unless it is under way."""
        job.cancel()

    def settle(self, jobs: Iterable[RecordsJob]) -> None:
        """Nothing to do: the threads do it."""

    def close(self) -> None:
        """Let the threads go. May be repeated."""
        self._threads.leave(self)


_shared_io: dict[tuple[int, int], Any] = {}  # of the compiled core, by process and threads
# Transfers that the compiled core is at and nobody settled: it knows addresses only, and what lies
# there must stay also when the tier is dropped.
_kept: set["CompiledTransfer"] = set()
_numbers = count()


class CompiledMover:
    """The threads of the compiled core."""

    def __init__(self, num_threads: int) -> None:
        from hf_tiered_cache import _C  # where it was not built, nobody comes here

        self._core = _C
        key = (os.getpid(), num_threads)
        # One step: it needs no lock.
        self._io: _C.BlockIO = _shared_io.setdefault(key, _C.BlockIO(num_threads))
        self._number = next(_numbers)

    def start(self) -> None:
        """Start the threads, unless they run. Raises TierIOError when not even one starts."""
        try:
            self._io.enter(self._number)
        except (RuntimeError, MemoryError) as error:
            raise no_thread(error) from error

    def transfer(self, num_parts: int) -> Transfer:
        """A transfer for the jobs to be submitted next."""
        return CompiledTransfer(self, num_parts)

    def submit(self, job: RecordsJob, before: Sequence[RecordsJob]) -> None:
        """Queue `job` behind the writes of the slots it reads."""
        slots = set(job.slots)
        job.after = [
            other
            for other in before
            if other.is_write and other.move is not None and not slots.isdisjoint(other.slots)
        ]
        assert job.entrance is not None and isinstance(job.transfer, CompiledTransfer)
        job.move = self._core.Move(
            is_write=job.is_write,
            fd=job.entrance.fd,
            offset=job.offset,
            record_bytes=job.block_bytes,
            addresses=job.addresses,
            is_direct=job.is_direct,
            after=[other.move for other in job.after],
            packing=None if job.codec is None else job.codec.core_arguments,
        )
        job.transfer.jobs.append(job)
        _kept.add(job.transfer)
        self._io.submit(job.move)

    def cancel(self, job: RecordsJob) -> None:
        """End `job` unless it is under way."""
        if job.move is None:
            job.cancel()
        else:
            self._io.cancel(job.move)
            self.is_done(job)

    def is_done(self, job: RecordsJob) -> bool:
        """Whether the core is through with `job`; it is settled then."""
        if not job.move.is_done:
            return False
        job.settle()
        return True

    def wait(self, job: RecordsJob) -> None:
        """Wait until `job` is done, and settle it."""
        while not self._io.wait(job.move, WAIT_SECONDS):
            pass  # here Ctrl-C comes through
        self.is_done(job)

    def settle(self, jobs: Iterable[RecordsJob]) -> None:
        """Settle those jobs that are done."""
        for job in jobs:
            if job.move is not None:
                self.is_done(job)

    def close(self) -> None:
        """Let the threads go. May be repeated."""
        self._io.leave(self._number)
        for transfer in list(_kept):  # of tiers that were dropped in the middle of an interrupt
            if all(job.move.is_done for job in transfer.jobs):
                _kept.discard(transfer)


class CompiledTransfer(Transfer):
    """A transfer whose parts are settled when it is asked for."""

    __slots__ = ("_mover", "jobs")

    def __init__(self, mover: CompiledMover, num_parts: int) -> None:
        super().__init__(num_parts)
        self._mover = mover
        self.jobs: list[RecordsJob] = []  # submitted; until it is ready

    def is_ready(self) -> bool:
        """Whether it is done or failed, without waiting."""
        if not self._is_ready:
            for job in list(self.jobs):
                if not self._mover.is_done(job):
                    return False
        return super().is_ready()

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
            _kept.discard(self)
            self.jobs.clear()
