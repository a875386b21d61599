"""Moving a run of neighbouring records, and what comes of it: checksums, states, errors.

A thread of Python runs a whole job. For the compiled core a job says what to move and settles what
came of it.
"""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
import xxhash

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.tiers.base import Transfer, io_error
from hf_tiered_cache.tiers.block_file import BlockFile, full_transfer, stood_still
from hf_tiered_cache.tiers.records import RecordTable

# Why a move of the compiled core ended, besides errno (csrc/block_io.h).
END_OF_FILE, CANCELLED = -1, -2

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


class RecordsJob:
    """One part of a transfer: the records of consecutive slots.

    Its part ends whatever happens, and once: the first of `run`, `settle` and `cancel` claims the
    job. `move` and `after` (the writes it follows) are the compiled mover's.
    """

    is_write = False
    __slots__ = (
        *("_blocks", "_claim", "_file", "_number", "_table"),
        *("after", "is_direct", "move", "slots", "transfer"),
    )

    def __init__(
        self,
        file: BlockFile,
        table: RecordTable,
        transfer: Transfer,
        number: int,
        slots: Sequence[int],
        blocks: Sequence[torch.Tensor],
        *,
        direct: bool,
    ) -> None:
        """number: of the part of the transfer."""
        self._claim = threading.Lock()
        self._file = file
        self._table = table
        self._blocks = blocks
        self._number = number
        self.transfer = transfer
        self.slots = slots
        self.is_direct = direct
        self.move: Any = None
        self.after: list[RecordsJob] = []

    def run(self) -> None:
        """Move the records, then end the part."""
        self._conclude(self._move)

    def settle(self) -> None:
        """The compiled core is through with `move`: see what came of it, then end the part."""
        self._conclude(self._settle)

    def cancel(self) -> None:
        """End the part: the tier was closed, or its caller interrupted, before its turn came."""
        if self._claim.acquire(blocking=False):
            self._end(self._cancelled())

    @property
    def descriptor(self) -> int:
        """Of the file; open until the tier is closed."""
        return self._file.descriptor(direct=self.is_direct)

    @property
    def offset(self) -> int:
        """Where the records begin in the file."""
        return self.slots[0] * self.record_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of each record."""
        return self._blocks[0].numel()

    @property
    def addresses(self) -> list[int]:
        """Where each record is in memory, for as long as this job is kept."""
        return [block.data_ptr() for block in self._blocks]

    _verb = ""

    def _move(self) -> None:
        """Move the records with Python's system calls, see to their checksums and states."""
        raise NotImplementedError

    def _settle(self) -> None:
        """See to the checksums and states of records that `move` moved."""
        raise NotImplementedError

    def _conclude(self, work: Callable[[], None]) -> None:
        """Do `work`, then end the part; errors go to whoever waits for the transfer."""
        if not self._claim.acquire(blocking=False):
            return
        failure: TierIOError | None = None
        began = perf_counter()
        try:
            work()
        except TierIOError as error:
            failure = error
        except OSError as error:
            failure = _failure(self._verb, self._file, self.slots, self.offset, error)
        except Exception as error:
            failure = TierIOError(f"cannot {self._verb} {_names(self.slots)}: {error!r}")
            failure.__cause__ = error
        except BaseException:  # Ctrl-C while the main thread settles
            failure = self._cancelled()
            raise
        finally:
            if self.move is None:
                self._end(failure, began)
            elif self.move.error != CANCELLED:
                self._end(failure, self.move.began, self.move.ended)
            else:
                self._end(failure)

    def _end(
        self, error: TierIOError | None, began: float | None = None, ended: float | None = None
    ) -> None:
        # The table first: who waited for the transfer finds its slots free to use.
        self.after = []
        try:
            self._table.end(self.slots)
        finally:
            self.transfer.end_part(error, part=self._number, began=began, ended=ended)

    def _cancelled(self) -> TierIOError:
        return io_error(
            errno.ECANCELED,
            f"the disk tier was closed or interrupted before it could {self._verb}"
            f" {_names(self.slots)}; wait for transfers before close()",
        )

    def _check_moved(self) -> None:
        """Raise what went wrong in the compiled core, if anything did."""
        error = self.move.error
        if error == CANCELLED:
            raise self._cancelled()
        if error == END_OF_FILE:
            end = self.offset + len(self.slots) * self.record_bytes
            raise stood_still(self.move.error_offset, end - self.move.error_offset)
        if error:
            raise OSError(error, os.strerror(error))

    def _views(self) -> list[memoryview]:
        return [block.numpy().data for block in self._blocks]

    def _needs_copy(self) -> bool:
        """Whether direct I/O would refuse this memory."""
        return self.is_direct and any(block.data_ptr() % ALIGNMENT_BYTES for block in self._blocks)

    def _aligned_views(self) -> list[memoryview]:
        """Aligned memory of the same size, for the time of one job."""
        num_bytes = self._blocks[0].numel()
        memory = memoryview(mmap.mmap(-1, num_bytes * len(self._blocks)))
        return [memory[i * num_bytes : (i + 1) * num_bytes] for i in range(len(self._blocks))]


class ReadRecords(RecordsJob):
    """Load records and verify them."""

    _verb = "load"
    __slots__ = ()

    def _move(self) -> None:
        checksums = self._stored_checksums()
        blocks = self._views()
        views = self._aligned_views() if self._needs_copy() else blocks
        full_transfer(self._file.pread_into, views, self.offset, direct=self.is_direct)
        self._verify(checksums, [xxhash.xxh3_128_digest(view) for view in views])
        if views is not blocks:
            for block, view in zip(blocks, views, strict=True):
                block[:] = view

    def _settle(self) -> None:
        for job in self.after:  # they are done: the core began this move when they were
            job.settle()
        checksums = self._stored_checksums()
        self._check_moved()
        self._verify(checksums, self.move.checksums)

    def _stored_checksums(self) -> list[bytes]:
        """What the records must have, once the writes under way have ended."""
        checksums = []
        for slot in self.slots:
            checksum, failure = self._table.wait_written(slot)
            if failure:
                raise TierIOError(f"cannot load record {slot}, it was not stored: {failure}")
            checksums.append(checksum)
        return checksums

    def _verify(self, checksums: Sequence[bytes], found: Sequence[bytes]) -> None:
        for index, (expected, got) in enumerate(zip(checksums, found, strict=True)):
            if got != expected:
                raise self._corruption(index, expected, got)

    def _corruption(self, index: int, expected: bytes, got: bytes) -> TierIOError:
        num_bytes = self._blocks[0].numel()
        return io_error(
            errno.EBADMSG,
            f"record {self.slots[index]} of the unnamed file in {self._file.directory!r} (bytes"
            f" {self.offset + index * num_bytes} and on, {num_bytes} of them) is not what was"
            f" stored: expected xxh3_128 {expected.hex()}, got {got.hex()}. The disk, its driver or"
            " memory changed it; the block is lost: start over with a new cache, and check the disk"
            " or choose another folder with disk_dir",
        )


class WriteRecords(RecordsJob):
    """Store records and remember their checksums."""

    is_write = True
    _verb = "store"
    __slots__ = ()

    def _move(self) -> None:
        blocks = self._views()
        # Before the write: bytes that change under it are noticed when they are loaded.
        checksums = [xxhash.xxh3_128_digest(block) for block in blocks]
        views = blocks
        if self._needs_copy():
            views = self._aligned_views()
            for view, block in zip(views, blocks, strict=True):
                view[:] = block
        full_transfer(self._file.pwrite_from, views, self.offset, direct=self.is_direct)
        self._written(checksums)

    def _settle(self) -> None:
        self._check_moved()
        self._written(self.move.checksums)

    def _written(self, checksums: Sequence[bytes]) -> None:
        for slot, checksum in zip(self.slots, checksums, strict=True):
            self._table.written(slot, checksum)

    def _end(
        self, error: TierIOError | None, began: float | None = None, ended: float | None = None
    ) -> None:
        if error is not None:
            for slot in self.slots:
                self._table.not_written(slot, str(error))
        super()._end(error, began, ended)


def reserve_records(file: BlockFile, start: int, stop: int, block_bytes: int) -> None:
    """Get disk space for the records `[start, stop)`. Raises TierIOError, and reserves nothing."""
    try:
        file.reserve(start * block_bytes, (stop - start) * block_bytes)
    except OSError as error:
        slots = range(start, stop)
        raise _failure("reserve space for", file, slots, start * block_bytes, error) from error


def _names(slots: Sequence[int]) -> str:
    return f"record {slots[0]}" if len(slots) == 1 else f"records [{slots[0]}, {slots[-1] + 1})"


def _failure(
    verb: str, file: BlockFile, slots: Sequence[int], offset: int, error: OSError
) -> TierIOError:
    """What failed, where, and what to do about it."""
    if error.errno in _FULL_DISK:
        remedy = "free space there, or choose another folder with disk_dir"
    elif error.errno == errno.EFBIG:
        remedy = "files may not grow that large: raise `ulimit -f` or lower disk_bytes"
    else:
        remedy = "check the disk (the kernel's log says more), or choose another folder: disk_dir"
    code = error.errno or errno.EIO
    failure = io_error(
        code,
        f"cannot {verb} {_names(slots)} of the unnamed file in {file.directory!r} at byte {offset}:"
        f" {error.strerror or os.strerror(code)}; {remedy}",
    )
    failure.__cause__ = error
    return failure
