"""The read-only rung: blocks that lie in the files of a store, read and verified as they are
streamed. Nothing is demoted to it, and nothing in it is changed.

A slot stands for an extent of a block file that is held open, so whoever evicts the file takes its
name and not its bytes. The files of a prefix are let go with the last of its slots.
"""

import errno
import os
import threading
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from hf_tiered_cache.errors import BlockStateError, ClosedCacheError, TierIOError, io_error
from hf_tiered_cache.finalizers import do_all, in_finalizer
from hf_tiered_cache.store.files import PASSING, Extent, OpenBlock
from hf_tiered_cache.tiers.base import Budget, Tier, check_blocks
from hf_tiered_cache.tiers.disk.block_file import Entrance
from hf_tiered_cache.tiers.disk.movers import Mover, end_jobs, make_mover, submit_jobs
from hf_tiered_cache.tiers.disk.record_jobs import Outcome, ReadRecords
from hf_tiered_cache.tiers.disk.records import Record
from hf_tiered_cache.transfers import DONE, Transfer

NUM_THREADS = 4  # those of the disk tier


class Source(NamedTuple):
    """Where a slot's bytes are; to its job, the file it reads."""

    block: OpenBlock
    extent: Extent

    @property
    def directory(self) -> str:
        """For messages: the path."""
        return self.block.path

    def entrance(self, *, direct: bool) -> Entrance:
        """What is held, and has the descriptor, as long as the file is read."""
        return self.block  # type: ignore[return-value]

    def pread_into(self, buffers: list[memoryview], offset: int, *, direct: bool) -> int:
        """Fill `buffers` from `offset`; the bytes read, maybe fewer."""
        return os.preadv(self.block.fd, buffers, offset)


class _Span:
    """Slots that were handed out together: from `first` on, one for each of `blocks`, which stay
    open as long as any of them is held."""

    __slots__ = ("blocks", "first", "num_held", "number")

    def __init__(self, first: int, blocks: Sequence[OpenBlock], number: int) -> None:
        self.first = first
        self.blocks = blocks
        self.number = number  # of the extent in each file
        self.num_held = len(blocks)


class _Reads:
    """The reads that are under way; to a job, the table of its records. What they must find is
    known from the files, so there is nothing to be noted."""

    def __init__(self, put_away: Callable[[OpenBlock, str], None]) -> None:
        self.lock = threading.RLock()
        self.put_away = put_away
        self._users: dict[ReadExtent, None] = {}

    def wait_written(self, record: Record) -> tuple[bytes, str]:
        """Nobody writes."""
        raise NotImplementedError

    written = wait_written

    @property
    def users(self) -> list["ReadExtent"]:
        """Those under way."""
        return list(self._users)

    def begin(self, jobs: Sequence["ReadExtent"]) -> None:
        self._users.update(dict.fromkeys(jobs))  # one step

    def forget(self, job: "ReadExtent") -> None:
        self._users.pop(job, None)


class ReadExtent(ReadRecords):
    """Load one extent and verify it."""

    __slots__ = ()
    _file: Any  # a Source
    _table: Any  # _Reads

    @property
    def offset(self) -> int:
        """Where it begins in the file."""
        return self._file.extent.offset

    def _attempt(self, work: Callable[[], Sequence[bytes]]) -> Outcome:
        outcome = super()._attempt(work)
        error = outcome.error
        if error is None or error.errno in PASSING or error.errno == errno.EBADMSG:
            return outcome
        cause = error.__cause__ or error
        why = f"layer {self._file.extent.layer} in {self._file.directory} cannot be read: {cause}"
        self._table.put_away(self._file.block, why)
        return outcome._replace(error=_put_away_error(error.errno, why))

    def _checksums(self, written: Callable[[Record], tuple[bytes, str]]) -> list[bytes]:
        return [self._file.extent.checksum]

    def _corruption(self, index: int, expected: bytes, got: bytes) -> TierIOError:
        why = (
            f"layer {self._file.extent.layer} in {self._file.directory} is not what was stored:"
            f" expected xxh3_128 {expected.hex()}, got {got.hex()}"
        )
        self._table.put_away(self._file.block, why)
        return _put_away_error(errno.EBADMSG, why)


def _put_away_error(code: int | None, why: str) -> TierIOError:
    return io_error(
        code,
        f"{why}. The block was put away and will be computed anew: try again; if this comes often,"
        " check the disk",
    )


class StoreTier(Tier):
    """Extents of block files, in slots that `adopt` hands out. Nothing can be written to it."""

    name = "store"
    is_read_only = True

    def __init__(
        self,
        block_bytes: int,
        budget: Budget,
        put_away: Callable[[OpenBlock, str], None],
        *,
        mover: str = "auto",
    ) -> None:
        """budget: caps nothing here. put_away: called, in any thread, with a file whose bytes are
        not what was stored, and why. mover: see `DiskTier`."""
        super().__init__(block_bytes, budget)
        self._spans: list[_Span] = []  # by their first slot
        self._num_slots = 0
        self._held: set[int] = set()
        self._reads = _Reads(put_away)
        self._mover = make_mover(mover, NUM_THREADS)
        self._pid = os.getpid()
        self._is_closed = False
        self._finalizer = weakref.finalize(
            self, in_finalizer, _shut_down, self._pid, self._mover, self._reads
        )

    def adopt(self, blocks: Sequence[OpenBlock], number: int) -> range:
        """Slots for the extent of that number of each block, whose bytes are those of a block here.
        In one step, however many they are: what they stand for is looked up when they are read."""
        self._check_open()
        first = self._num_slots
        slots = range(first, first + len(blocks))
        self._num_slots = slots.stop
        self._spans.append(_Span(first, tuple(blocks), number))
        self._held.update(slots)
        return slots

    def _span(self, slot: int) -> int:
        """Where in `_spans` a slot that is held is."""
        return bisect_right(self._spans, slot, key=_first) - 1

    def _source(self, slot: int) -> Source:
        span = self._spans[self._span(slot)]
        block = span.blocks[slot - span.first]
        return Source(block, block.header.extent(span.number))

    def allocate(self) -> int | None:
        """None: nothing can be written here."""
        self._check_open()
        return None

    def free(self, slot: int) -> None:
        """Give a slot back; its file is let go with the last slot of its span."""
        self._check_open()
        self.check_allocated([slot])
        self._held.remove(slot)
        at = self._span(slot)
        self._spans[at].num_held -= 1
        if not self._spans[at].num_held:
            del self._spans[at]

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Load extents; the transfer fails (TierIOError) unless every byte is what was stored."""
        self._check_open()
        check_blocks(slots, out, self.block_bytes)
        self.check_allocated(slots)
        if not slots:
            return DONE
        self._mover.start()
        self._mover.settle(self._reads.users)
        transfer, reads = self._mover.transfer(len(slots)), cast(Any, self._reads)
        jobs = []
        for part, (slot, to) in enumerate(zip(slots, out, strict=True)):
            source = cast(Any, self._source(slot))
            jobs.append(
                ReadExtent(source, reads, transfer, part, [slot], [to], codec=None, direct=False)
            )
        self._reads.begin(jobs)
        submit_jobs(self._mover, jobs, ())
        return transfer

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Never: raises BlockStateError."""
        raise BlockStateError("a block was to be written to the store's rung; a bug, please report")

    def drain(self) -> None:
        """Wait until no read is under way; see `Tier.drain`."""
        self._check_open()
        for job in self._reads.users:
            if not job.is_queued:  # whoever began it was interrupted
                self._mover.cancel(job)
        for job in self._reads.users:
            job.transfer.outlast()
            job.conclude_again()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        self._check_open()
        self._held = set(slots)
        held = Counter(self._span(slot) for slot in self._held)
        for at, span in enumerate(self._spans):
            span.num_held = held[at]
        self._spans = [span for span in self._spans if span.num_held]

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is handed out."""
        for slot in slots:
            if slot not in self._held:
                raise BlockStateError(f"tier 'store': slot {slot} was never handed out, or freed")

    @property
    def where(self) -> str:
        """What its blocks lie in."""
        return "files of the store"

    @property
    def used_slots(self) -> int:
        """Slots handed out and not freed."""
        return len(self._held)

    @property
    def committed_bytes(self) -> int:
        """Nothing: the bytes are the store's."""
        return 0

    def num_free(self) -> int:
        """Nothing can be allocated."""
        return 0

    def close(self) -> None:
        """Let go of the files once no read is under way. Idempotent."""
        self._is_closed = True
        _shut_down(self._pid, self._mover, self._reads)
        self._held, self._spans = set(), []
        self._finalizer.detach()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedCacheError("the cache is closed; make a new one")
        if os.getpid() != self._pid:
            raise ClosedCacheError(
                f"this cache belongs to process {self._pid}, and its threads stayed there; make a"
                " new one after fork()"
            )


def _first(span: _Span) -> int:
    return span.first


def _shut_down(pid: int, mover: Mover, reads: _Reads) -> None:
    """End all reads. Must not refer to the tier: its finalizer holds this."""
    if os.getpid() == pid:
        do_all(partial(end_jobs, mover, reads), mover.close)
