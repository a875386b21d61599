"""What an I/O thread does: move a run of neighbouring records, and see to their checksums."""

import errno
import mmap
import os
import threading
from collections.abc import Sequence

import torch
import xxhash

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.tiers.base import Transfer, io_error
from hf_tiered_cache.tiers.block_file import BlockFile, full_transfer
from hf_tiered_cache.tiers.records import RecordTable

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


class _RecordsJob:
    """One part of a transfer: the records of consecutive slots.

    Its part ends whatever happens, and once: the first of `run` and `cancel` claims the job.
    """

    __slots__ = ("_blocks", "_claim", "_direct", "_file", "_slots", "_table", "_transfer")

    def __init__(
        self,
        file: BlockFile,
        table: RecordTable,
        transfer: Transfer,
        slots: Sequence[int],
        blocks: Sequence[torch.Tensor],
        *,
        direct: bool,
    ) -> None:
        self._claim = threading.Lock()
        self._file = file
        self._table = table
        self._transfer = transfer
        self._slots = slots
        self._blocks = blocks
        self._direct = direct

    def run(self) -> None:
        """Move the records, then end the part."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._move()
        except TierIOError as error:
            self._end(error)
        except OSError as error:
            self._end(_failure(self._verb, self._file, self._slots, self._offset, error))
        except BaseException as error:  # goes to whoever waits for the transfer
            failure = TierIOError(f"cannot {self._verb} {_names(self._slots)}: {error!r}")
            failure.__cause__ = error
            self._end(failure)
        else:
            self._end(None)

    def cancel(self) -> None:
        """End the part: the tier was closed, or its caller interrupted, before its turn came."""
        if not self._claim.acquire(blocking=False):
            return
        self._end(
            io_error(
                errno.ECANCELED,
                f"the disk tier was closed or interrupted before it could {self._verb}"
                f" {_names(self._slots)}; wait for transfers before close()",
            )
        )

    _verb = ""

    def _move(self) -> None:
        raise NotImplementedError

    def _end(self, error: TierIOError | None) -> None:
        # The table first: who waited for the transfer finds its slots free to use.
        self._table.end(self._slots)
        self._transfer.end_part(error)

    @property
    def _offset(self) -> int:
        return self._slots[0] * self._blocks[0].numel()

    def _views(self) -> list[memoryview]:
        return [block.numpy().data for block in self._blocks]

    def _needs_copy(self) -> bool:
        """Whether direct I/O would refuse this memory."""
        return self._direct and any(block.data_ptr() % ALIGNMENT_BYTES for block in self._blocks)

    def _aligned_views(self) -> list[memoryview]:
        """Aligned memory of the same size, for the time of one job."""
        num_bytes = self._blocks[0].numel()
        memory = memoryview(mmap.mmap(-1, num_bytes * len(self._blocks)))
        return [memory[i * num_bytes : (i + 1) * num_bytes] for i in range(len(self._blocks))]


class ReadRecords(_RecordsJob):
    """Load records and verify them."""

    _verb = "load"
    __slots__ = ()

    def _move(self) -> None:
        checksums = []
        for slot in self._slots:
            checksum, failure = self._table.wait_written(slot)
            if failure:
                raise TierIOError(f"cannot load record {slot}, it was not stored: {failure}")
            checksums.append(checksum)
        blocks = self._views()
        views = self._aligned_views() if self._needs_copy() else blocks
        full_transfer(self._file.pread_into, views, self._offset, direct=self._direct)
        for index, expected in enumerate(checksums):
            got = xxhash.xxh3_128_digest(views[index])
            if got != expected:
                raise self._corruption(index, expected, got)
            if views is not blocks:
                blocks[index][:] = views[index]

    def _corruption(self, index: int, expected: bytes, got: bytes) -> TierIOError:
        num_bytes = self._blocks[0].numel()
        return io_error(
            errno.EBADMSG,
            f"record {self._slots[index]} of the unnamed file in {self._file.directory!r} (bytes"
            f" {self._offset + index * num_bytes} and on, {num_bytes} of them) is not what was"
            f" stored: expected xxh3_128 {expected.hex()}, got {got.hex()}. The disk, its driver or"
            " memory changed it; the block is lost: start over with a new cache, and check the disk"
            " or choose another folder with disk_dir",
        )


class WriteRecords(_RecordsJob):
    """Store records and remember their checksums."""

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
        full_transfer(self._file.pwrite_from, views, self._offset, direct=self._direct)
        for slot, checksum in zip(self._slots, checksums, strict=True):
            self._table.written(slot, checksum)

    def _end(self, error: TierIOError | None) -> None:
        if error is not None:
            for slot in self._slots:
                self._table.not_written(slot, str(error))
        super()._end(error)


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
