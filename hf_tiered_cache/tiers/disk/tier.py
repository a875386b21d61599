"""The tier on disk: one unnamed file, one record per slot, a checksum verified on every load.

The checksums live in memory: the file outlives nothing, so nothing needs to be found in it again.
"""

import math
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from hf_tiered_cache.config import DISK_IO_MODES, free_disk_bytes
from hf_tiered_cache.errors import ClosedCacheError, ConfigError, UnsupportedInputError
from hf_tiered_cache.finalizers import do_all, in_finalizer
from hf_tiered_cache.tiers.base import Budget, Surroundings, Tier, check_blocks
from hf_tiered_cache.tiers.codecs import Codec
from hf_tiered_cache.tiers.disk.block_file import BlockFile
from hf_tiered_cache.tiers.disk.encoded import EncodedTier
from hf_tiered_cache.tiers.disk.movers import Mover, end_jobs, make_mover, submit_jobs
from hf_tiered_cache.tiers.disk.record_jobs import (
    ReadRecords,
    RecordsJob,
    WriteRecords,
    reserve_records,
)
from hf_tiered_cache.tiers.disk.records import RecordTable
from hf_tiered_cache.tiers.slots import SlotPool
from hf_tiered_cache.transfers import DONE, Transfer

PIECE_BYTES = 1024 * 1024  # neighbouring records are read in one call up to this size
STEP_BYTES = 64 * 1024 * 1024  # disk space is reserved this far ahead ...
STEPS_PER_BUDGET = 32  # ... but at most this part of the budget, which other files may share


class DiskTier(Tier, name="disk"):
    """Blocks as records of an unnamed file, moved by a few threads.

    Space is reserved (posix_fallocate) when a slot is first handed out, in steps ahead of use, so a
    full disk is known at `allocate`, which then raises TierIOError and changes nothing, and not at
    a later write. It is an error and not None because the remedy differs: there is budget left.

    Read after write: a read of a slot whose write is under way waits for it, in the I/O thread. A
    slot freed with transfers under way is handed out again only when they have ended; `allocate`
    waits for that when no other slot is left. After a failed write the slot cannot be read (the
    error says why); it may be written again, or freed.

    io: how the bytes go. "direct" past the page cache (O_DIRECT), "buffered" through it, "auto" the
    first `page_cache_bytes` of the file buffered and the rest direct. A record always goes the same
    way. Where the file system takes no direct I/O, all is buffered, and a log line says so once.
    Direct I/O from memory that is not 4 KiB aligned goes through a copy.
    """

    def __init__(
        self,
        block_bytes: int,
        budget: Budget,
        directory: str | os.PathLike[str],
        *,
        io: str = "auto",
        num_threads: int = 4,
        page_cache_bytes: int = 0,
        mover: str = "auto",
        codec: Codec | None = None,
        open_file: type[BlockFile] = BlockFile,
    ) -> None:
        """mover: whose threads move the bytes, "compiled" or "python"; "auto": the first, if built.
        codec: what blocks are encoded with in the file; see `EncodedTier`. open_file: where tests
        put faults, under Python's threads.

        Raises ConfigError when the folder is missing, not writable, or has less free space than the
        budget has left.
        """
        super().__init__(block_bytes, budget)
        if io not in DISK_IO_MODES:
            raise ConfigError(f"unknown io mode {io!r}; expected one of {', '.join(DISK_IO_MODES)}")
        if num_threads < 1:
            raise ConfigError(f"num_threads is {num_threads}; expected 1 or more")
        self.codec = codec
        self.directory = os.fspath(directory)
        _check_directory(self.directory, budget)
        self._file = file = open_file(self.directory, want_direct=io != "buffered")
        if io == "buffered" or not file.has_direct:
            self._first_direct_slot: float = math.inf
        elif io == "direct":
            self._first_direct_slot = 0
        else:
            self._first_direct_slot = page_cache_bytes // self.record_bytes
        pool = SlotPool(
            record_bytes := self.record_bytes,
            budget,
            self.name,
            step_slots=self.step_slots(record_bytes, budget.limit_bytes),
            commit=lambda start, stop: reserve_records(file, start, stop, record_bytes),
        )
        self._table: RecordTable[RecordsJob] = RecordTable(pool)
        if mover == "auto" and open_file is not BlockFile:
            mover = "python"
        if codec is not None and codec.core_arguments is None:
            mover = "python"  # the compiled core does not know it
        self._mover = make_mover(mover, num_threads)
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(
            self, in_finalizer, _shut_down, self._pid, self._mover, self._table, file
        )

    @classmethod
    def from_budget(cls, block_bytes: int, budget: Budget, around: Surroundings) -> Tier:
        """See `Tier.from_budget`."""

        def make(codec: Codec | None) -> DiskTier:
            return cls(
                block_bytes,
                budget,
                around.directory,
                io=around.disk_io,
                page_cache_bytes=around.page_cache_bytes,
                codec=codec,
            )

        if around.codec is None:
            return make(None)
        return EncodedTier(make(around.codec), lambda: make(None))

    @classmethod
    def step_slots(cls, record_bytes: int, limit_bytes: int) -> int:
        """For how many records disk space is reserved at a time, of such a budget."""
        return max(1, min(STEP_BYTES, limit_bytes // STEPS_PER_BUDGET) // record_bytes)

    def allocate(self) -> int | None:
        """A slot; see `Tier.allocate`. Raises TierIOError when the disk is full."""
        self._check_usable()
        self._mover.settle(self._table.users)
        return self._table.allocate()

    def free(self, slot: int) -> None:
        """Give a slot back; its disk space stays for the next one."""
        self._check_usable()
        self._mover.settle(self._table.users)
        self._table.free(slot)

    def drain(self) -> None:
        """Wait until no transfer is under way; see `Tier.drain`."""
        self._check_usable()
        jobs = self._table.users
        for job in jobs:
            if not job.is_queued:  # whoever began it was interrupted
                self._mover.cancel(job)
        for job in jobs:
            job.transfer.outlast()
            job.conclude_again()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot but these; see `Tier.keep_only`."""
        self._check_usable()
        self._table.keep_only(slots)

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Load records; the transfer fails (TierIOError) unless every byte is what was stored."""
        self._check_usable()
        self._check_memory(slots, out, self.block_bytes)
        return self._start(ReadRecords, self._table.begin_read, slots, out, self.codec)

    def read_encoded(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """`read` without decoding: `record_bytes` of each."""
        self._check_usable()
        self._check_memory(slots, out, self.record_bytes)
        return self._start(ReadRecords, self._table.begin_read, slots, out, None)

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Store records. Of a failed transfer, those records that were stored stay readable. With a
        codec a block that it cannot encode fails with the errno NOT_ENCODED."""
        self._check_usable()
        self._check_memory(slots, data, self.block_bytes)
        return self._start(WriteRecords, self._table.begin_write, slots, data, self.codec)

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        self._check_usable()
        self._table.check_allocated(slots)

    @property
    def record_bytes(self) -> int:
        """See `Tier.record_bytes`."""
        return self.block_bytes if self.codec is None else self.codec.encoded_bytes

    @property
    def where(self) -> str:
        """The folder of the file."""
        return self.directory

    @property
    def used_slots(self) -> int:
        """Slots handed out and not freed."""
        return self._table.num_used

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget, which are bytes reserved on disk."""
        return self._table.committed_bytes

    def num_free(self) -> int:
        """Slots that could still be allocated."""
        return self._table.num_free()

    def close(self) -> None:
        """Cancel what is queued (it fails with TierIOError), wait for what is under way, let the
        threads go, drop the file.

        Idempotent, and may be repeated after an interrupt. Also done when the tier is garbage
        collected, and at interpreter exit. In a forked child only the child's descriptors are
        closed.
        """
        _shut_down(self._pid, self._mover, self._table, self._file)
        self._finalizer.detach()

    def _check_usable(self) -> None:
        if self._table.is_closing:
            raise ClosedCacheError("the disk tier is closed; make a new cache")
        if os.getpid() != self._pid:
            raise ClosedCacheError(
                f"the disk tier belongs to process {self._pid}, and its threads stayed there; make"
                " a new cache after fork()"
            )

    def _check_memory(
        self, slots: Sequence[int], blocks: Sequence[torch.Tensor], num_bytes: int
    ) -> None:
        check_blocks(slots, blocks, num_bytes)
        for slot, block in zip(slots, blocks, strict=True):
            if not block.is_cpu:
                raise UnsupportedInputError(
                    f"slot {slot}: the disk moves cpu memory, got a tensor on {block.device}"
                )

    def _start(
        self,
        job: type[ReadRecords] | type[WriteRecords],
        begin: Callable[[Sequence[RecordsJob]], None],
        slots: Sequence[int],
        blocks: Sequence[torch.Tensor],
        codec: Codec | None,
    ) -> Transfer:
        """Queue one job per piece."""
        if not slots:
            return DONE
        self._mover.start()
        before = self._table.users
        self._mover.settle(before)
        pieces = self._pieces(slots)
        transfer = self._mover.transfer(len(pieces))
        jobs = [
            job(
                self._file,
                self._table,
                transfer,
                number,
                slots[start:stop],
                blocks[start:stop],
                direct=slots[start] >= self._first_direct_slot,
                codec=codec,
            )
            for number, (start, stop) in enumerate(pieces)
        ]
        begin(jobs)
        submit_jobs(self._mover, jobs, before)
        return transfer

    def _pieces(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """Index ranges of `slots` that one system call can move: neighbours, up to PIECE_BYTES."""
        max_slots = max(1, PIECE_BYTES // self.record_bytes)
        pieces: list[tuple[int, int]] = []
        start = 0
        for index in range(1, len(slots) + 1):
            if (
                index == len(slots)
                or slots[index] != slots[index - 1] + 1
                or slots[index] == self._first_direct_slot
                or index - start == max_slots
            ):
                pieces.append((start, index))
                start = index
        return pieces


def _check_directory(directory: str, budget: Budget) -> None:
    """Raise ConfigError unless the folder exists, is writable and has room for the budget."""
    if not os.path.isdir(directory):
        raise ConfigError(f"disk_dir {directory!r} is not a folder; make it or choose another")
    free_bytes = free_disk_bytes(Path(directory))
    if budget.free_bytes > free_bytes:
        raise ConfigError(
            f"disk_dir {directory!r} has {free_bytes} bytes free but {budget.free_bytes} were asked"
            " for; lower disk_bytes, free space, or choose another folder with disk_dir"
        )


def _shut_down(pid: int, mover: Mover, table: RecordTable[RecordsJob], file: BlockFile) -> None:
    """Close everything of a tier. Must not refer to the tier: its finalizer holds this."""
    if os.getpid() != pid:
        table.is_closing = True
        file.close_after_fork()
        return
    do_all(
        table.stop_waiting, partial(end_jobs, mover, table), mover.close, file.close, table.close
    )
