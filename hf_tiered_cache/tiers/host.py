"""The tier in the memory of the host: below a GPU, or below faster memory of the CPU.

Getting memory costs about a tenth of a second for a GiB (pages are zeroed, and pinned for a GPU),
so it grows by slabs, in background threads, before their slots are handed out.
"""

import contextlib
import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from transformers.utils import logging

from hf_tiered_cache.devices.pinning import Pinning
from hf_tiered_cache.errors import io_error
from hf_tiered_cache.finalizers import do_all, in_finalizer
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.tiers.base import Budget, Surroundings
from hf_tiered_cache.tiers.io_threads import Job, shared_threads
from hf_tiered_cache.tiers.memory import MemoryTier, virtual_slab
from hf_tiered_cache.tiers.slots import SlotPool
from hf_tiered_cache.transfers import Transfer

logger = logging.get_logger(__name__)

SLAB_BYTES = 256 * 1024 * 1024  # memory is got this far ahead ...
SLABS_PER_BUDGET = 16  # ... but at most this part of the budget, which other tiers may share
PIECE_BYTES = 64 * 1024 * 1024  # one thread touches so much at a time; torch uses no more threads
MAX_THREADS = 4  # of them saturate the zeroing of pages


class HostTier(MemoryTier, name="host"):
    """Blocks in memory that is not the device's; see `MemoryTier`.

    When half of a slab is handed out the next one is being got: threads touch its pages, then
    `pinning` locks it (None: it stays pageable). Where that is refused, this and all later slabs
    stay pageable: copies are slower, not wrong; a log line and `where` say so. While a slab
    is locked the driver may let launches of other threads wait (some 25 ms for 256 MiB), so a
    prefill whose blocks fill new slabs stands still for moments that a decode step never sees.
    """

    def __init__(
        self,
        block_bytes: int,
        budget: Budget,
        *,
        pinning: Pinning | None = None,
        slab_bytes: int = SLAB_BYTES,
        near: Iterable[int] = (),
    ) -> None:
        """near: the processors whose memory it should be; any, where none are given.

        Raises ConfigError when the budget cannot be mapped, or `block_bytes` is no multiple of
        4096."""
        super().__init__(block_bytes, budget)
        max_slots = budget.limit_bytes // block_bytes
        self._mapping, slab = virtual_slab(max_slots, block_bytes, budget.knob)
        self._slab = slab
        self._growth = _Growth(slab, pinning, frozenset(near))
        self._pool = SlotPool(
            block_bytes,
            budget,
            self.name,
            step_slots=self.step_slots(block_bytes, budget.limit_bytes, slab_bytes),
            commit=self._growth.begin,
        )
        self._finalizer = weakref.finalize(self, in_finalizer, _shut_down, self._growth, self._pool)

    @classmethod
    def from_budget(cls, block_bytes: int, budget: Budget, around: Surroundings) -> Self | None:
        """See `Tier.from_budget`. One memory needs no second tier, unless it is asked for."""
        if around.pinning is None and budget.is_auto:
            return None
        return cls(block_bytes, budget, pinning=around.pinning, near=around.cpus_near)

    @classmethod
    def step_slots(cls, block_bytes: int, limit_bytes: int, slab_bytes: int = SLAB_BYTES) -> int:
        """How many blocks a slab holds, of such a budget."""
        return max(1, min(slab_bytes, limit_bytes // SLABS_PER_BUDGET) // block_bytes)

    @property
    def where(self) -> str:
        """How the memory is held: "pageable", "pinned", or "pageable: pinning failed"."""
        return self._growth.memory_kind

    def is_pinned(self, slot: int) -> bool:
        """Whether the memory of a slot that was handed out is pinned."""
        return slot < self._growth.num_pinned_slots

    def allocate(self) -> int | None:
        """A slot; see `Tier.allocate`. Waits where its memory is not there yet."""
        slot = super().allocate()
        if slot is not None:
            try:
                self._pool.grow_ahead()
                self._growth.wait(slot)
            except BaseException:
                self._pool.free(slot)
                raise
        return slot

    def close(self) -> None:
        """Let the threads go, return the memory at once, even while views of the slab are alive
        (they read zeros). Idempotent, and may be repeated after an interrupt. Also done when the
        tier is garbage collected."""
        self._slab = None
        _shut_down(self._growth, self._pool)
        self._give_back()
        self._finalizer.detach()


class _Growth:
    """Gets the memory of slots in background threads. Does not know the tier, which may go first.

    Called under the lock of the tier's slot pool, so nothing here but `wait` and `close` waits.
    """

    def __init__(self, slab: torch.Tensor, pinning: Pinning | None, near: frozenset[int]) -> None:
        self.memory_kind = "pageable" if pinning is None else "pinned"
        self.num_pinned_slots = 0  # the first ones: after a refusal none is pinned any more
        self._slab = slab
        self._pinning = pinning
        self._near = near
        self._pinned: list[int] = []  # addresses
        self._is_closed = False
        self._threads = shared_threads(
            min(MAX_THREADS, os.cpu_count() or 1), "hf_tiered_cache-host"
        )
        self._slabs: deque[_Slab] = deque()  # that nobody waited for yet

    def begin(self, start: int, stop: int) -> None:
        """Get the memory of the slots `[start, stop)`. Raises TierIOError, and changes nothing,
        when no thread can be started."""
        self._threads.enter(self)
        while self._slabs and self._slabs[-1].start >= start:  # who began them was interrupted
            self._slabs[-1].end()
            self._slabs.pop()
        self._slabs.append(self._new_slab(start, stop))
        for job in self._slabs[-1].jobs:
            self._threads.submit(job)

    def wait(self, slot: int) -> None:
        """Return when the memory of the slot is there. Slots are first handed out in order.

        Raises TierIOError when there is none; the next call tries again.
        """
        while self._slabs and self._slabs[0].start <= slot:
            slab = self._slabs[0]
            if slab.has_failed:
                slab = self._slabs[0] = self._new_slab(slab.start, slab.stop)
                for job in slab.jobs:
                    self._threads.submit(job)
            slab.is_there.wait()
            self._slabs.popleft()

    def close(self) -> None:
        """Let the threads go, unlock the memory. May be repeated."""
        self._is_closed = True
        for slab in self._slabs:
            slab.end()
        self._threads.leave(self)
        while self._pinned:
            assert self._pinning is not None
            self._pinning.unregister(self._pinned.pop())

    def _new_slab(self, start: int, stop: int) -> "_Slab":
        memory = self._slab[start:stop].view(-1)
        pieces = memory.split(PIECE_BYTES)
        touched, is_there = Transfer(len(pieces)), Transfer()
        jobs = [_Job(partial(self._get, piece), touched, i) for i, piece in enumerate(pieces)]
        # Behind the pieces in the queue: a job may wait for those before it.
        jobs.append(_Job(partial(self._pin, touched, memory, stop), is_there, None))
        return _Slab(start, stop, jobs, touched, is_there)

    def _get(self, memory: torch.Tensor) -> None:
        if self._near and hasattr(os, "sched_setaffinity"):
            # This thread has no other work, so it may be moved there. Where these processors are
            # not ours to use the memory lies elsewhere: slower, not wrong.
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._near)
        _touch(memory)

    def _pin(self, touched: Transfer, memory: torch.Tensor, stop: int) -> None:
        touched.wait()
        if self._pinning is None or self.memory_kind != "pinned" or self._is_closed:
            return
        if self._pinning.register(memory.data_ptr(), memory.numel()):
            self._pinned.append(memory.data_ptr())
            self.num_pinned_slots = stop
            return
        self.memory_kind = "pageable: pinning failed"
        logger.warning_once(
            f"{format_bytes(memory.numel())} of host memory cannot be pinned, so copies to and from"
            " the GPU are slower than they could be. The system limits locked memory: lower"
            " host_bytes, or raise the limit (ulimit -l)."
        )


@dataclass(frozen=True)
class _Slab:
    """The memory of the slots `[start, stop)`, on its way."""

    start: int
    stop: int
    jobs: list["_Job"]
    touched: Transfer
    is_there: Transfer

    @property
    def has_failed(self) -> bool:
        """Whether the memory could not be had."""
        return self.is_there.is_ready() and self.is_there.has_failed

    def end(self) -> None:
        """Cancel what no thread is at, wait for the rest. May be repeated."""
        for job in self.jobs:
            job.cancel()
        # Garbage collection may finalize the tier in one of the very threads.
        if threading.get_ident() not in {job.runner for job in self.jobs}:
            self.touched.outlast()
            self.is_there.outlast()


class _Job(Job):
    """One part of getting memory; ends its part of a transfer whatever happens."""

    __slots__ = ("_part", "_transfer", "_work")

    def __init__(self, work: Callable[[], None], transfer: Transfer, part: int | None) -> None:
        super().__init__()
        self._work = work
        self._transfer = transfer
        self._part = part

    def _run(self) -> None:
        error = None
        try:
            self._work()
        except Exception as cause:
            error = io_error(
                errno.ENOMEM,
                f"cannot get memory for the host tier: {cause!r}; lower host_bytes, or end what"
                " else takes memory",
            )
            error.__cause__ = cause
        finally:
            self._transfer.end_part(error, part=self._part)

    def _cancel(self) -> None:
        error = io_error(errno.ECANCELED, "the host tier was closed, or its caller interrupted")
        self._transfer.end_part(error, part=self._part)


def _touch(memory: torch.Tensor) -> None:
    """Make every page of `memory` physical. Nobody uses it yet."""
    memory[::ALIGNMENT_BYTES].zero_()


def _shut_down(growth: _Growth, pool: SlotPool) -> None:
    """Close everything of a tier. Must not refer to the tier: its finalizer holds this."""
    do_all(growth.close, pool.close)
