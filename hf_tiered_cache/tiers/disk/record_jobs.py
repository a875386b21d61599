"""Moving a run of neighbouring records, and what comes of it: checksums, states, errors.

A thread of Python runs a whole job. For the compiled core a job says what to move and settles what
came of it.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
import xxhash

from hf_tiered_cache.errors import TierIOError, io_error
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.tiers.codecs import Codec
from hf_tiered_cache.tiers.disk.block_file import BlockFile, Entrance, full_transfer, stood_still
from hf_tiered_cache.tiers.disk.records import Record, RecordTable
from hf_tiered_cache.tiers.disk.remedies import remedy
from hf_tiered_cache.tiers.io_threads import Job
from hf_tiered_cache.transfers import Transfer

# Why a move of the compiled core ended, besides errno (csrc/block_io.h).
END_OF_FILE, CANCELLED, UNPACKABLE = -1, -2, -3
# The errno of a write whose block the codec could not encode: nothing was written.
NOT_ENCODED = errno.EOVERFLOW


class Outcome(NamedTuple):
    """What came of a job."""

    error: TierIOError | None
    checksums: Sequence[bytes] = ()  # of what a write stored
    began: float | None = None
    ended: float | None = None


class RecordsJob(Job):
    """One part of a transfer: the records of consecutive slots; a user of the table.

    Whoever learns what came of it concludes it: the Python thread that ran it, whoever settles it,
    or whoever cancels it. It has one outcome, the first; concluding it may be repeated.
    `is_queued`: the mover has it. `move` and `after` (the writes it follows) are the compiled
    mover's.
    """

    is_write = False
    __slots__ = (
        *("_blocks", "_file", "_number", "_outcome", "_table"),
        *("after", "codec", "entrance", "is_direct", "is_queued", "move", "records", "slots"),
        "transfer",
    )

    def __init__(
        self,
        file: BlockFile,
        table: "RecordTable[RecordsJob]",
        transfer: Transfer,
        number: int,
        slots: Sequence[int],
        blocks: Sequence[torch.Tensor],
        *,
        direct: bool,
        codec: Codec | None,
    ) -> None:
        """number: of the part of the transfer. codec: what blocks are encoded with on their way to
        the file, and decoded on their way back; None: they are moved as they are. Raises
        TierIOError when the file cannot be opened for such a job."""
        super().__init__()
        self._file = file
        self._table = table
        self._blocks = blocks
        self._number = number
        self._outcome: Outcome | None = None
        self.codec = codec
        self.transfer = transfer
        self.slots = slots
        self.records: Sequence[Record] = ()
        self.is_direct = direct
        self.is_queued = False
        self.move: Any = None
        self.after: list[RecordsJob] = []
        try:
            # Held while the file is used, so that it stays open.
            self.entrance: Entrance | None = file.entrance(direct=direct)
        except OSError as error:
            raise _failure("open", file, slots, self.offset, error) from error

    @property
    def has_ended(self) -> bool:
        """Whether it is known what came of it."""
        return self._outcome is not None

    def settle(self) -> None:
        """The compiled core is through with `move`: see what came of it, then end the part."""
        with self._table.lock:
            if self._outcome is None:
                self._conclude(self._attempt(self._settle))
            else:
                self.conclude_again()

    def conclude_again(self) -> None:
        """Do what is left to do, where that was interrupted; nothing while it is under way."""
        if self._outcome is not None:
            self._conclude(self._outcome)

    @property
    def offset(self) -> int:
        """Where the records begin in the file."""
        return self.slots[0] * self.record_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of each record in the file."""
        return self.block_bytes if self.codec is None else self.codec.encoded_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of each record in memory."""
        return self._blocks[0].numel()

    @property
    def addresses(self) -> list[int]:
        """Where each record is in memory, for as long as this job is kept."""
        return [block.data_ptr() for block in self._blocks]

    _verb = ""

    def _move(self) -> Sequence[bytes]:
        """Move the records with Python's system calls and verify them; the checksums of a write."""
        raise NotImplementedError

    def _settle(self) -> Sequence[bytes]:
        """Verify the records that `move` moved; the checksums of a write."""
        raise NotImplementedError

    def _run(self) -> None:
        self._conclude(self._attempt(self._move))

    def _cancel(self) -> None:
        self._conclude(Outcome(self._cancelled()))

    def _attempt(self, work: Callable[[], Sequence[bytes]]) -> Outcome:
        """Do `work`; errors go to whoever waits for the transfer. What is no error but an interrupt
        passes, and leaves the job as it was."""
        error: TierIOError | None = None
        checksums: Sequence[bytes] = ()
        began = perf_counter()
        try:
            checksums = work()
        except TierIOError as failure:
            error = failure
        except OSError as cause:
            error = _failure(self._verb, self._file, self.slots, self.offset, cause)
        except MemoryError:
            refusal = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            error = _failure(self._verb, self._file, self.slots, self.offset, refusal)
        except Exception as cause:
            error = io_error(None, f"cannot {self._verb} {_names(self.slots)}: {cause!r}")
            error.__cause__ = cause
        _strip(error)
        if self.move is None:
            return Outcome(error, checksums, began, perf_counter())
        if self.move.error == CANCELLED:
            return Outcome(error)
        return Outcome(error, checksums, self.move.began, self.move.ended)

    def _conclude(self, outcome: Outcome) -> None:
        """End the part. Under the lock: who waited for the transfer finds its slots free to use."""
        with self._table.lock:
            if self._outcome is None:
                if self.is_write:
                    self._table.note(self, outcome.checksums, str(outcome.error or ""))
                self._outcome = outcome
            error, _, began, ended = self._outcome
            self.after, self.entrance = [], None
            self.transfer.end_part(error, part=self._number, began=began, ended=ended)
            self._table.forget(self)

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
        if error == UNPACKABLE:
            raise self._not_encoded()
        if error:
            raise OSError(error, os.strerror(error))

    def _not_encoded(self) -> TierIOError:
        return io_error(NOT_ENCODED, f"what is to be {_names(self.slots)} cannot be packed")

    def _needs_copy(self) -> bool:
        """Whether direct I/O would refuse this memory."""
        return self.is_direct and any(block.data_ptr() % ALIGNMENT_BYTES for block in self._blocks)

    def _buffers(self) -> list[torch.Tensor]:
        """Memory for the records as they are in the file, for the time of one job: that of the
        blocks, where that will do, else aligned memory."""
        if self.codec is None and not self._needs_copy():
            return list(self._blocks)
        memory = mmap.mmap(-1, self.record_bytes * len(self._blocks))
        return list(torch.frombuffer(memory, dtype=torch.uint8).split(self.record_bytes))


class ReadRecords(RecordsJob):
    """Load records and verify them."""

    _verb = "load"
    __slots__ = ()

    def _move(self) -> Sequence[bytes]:
        checksums = self._checksums(self._table.wait_written)
        buffers = self._buffers()
        views = _views(buffers)
        full_transfer(self._file.pread_into, views, self.offset, direct=self.is_direct)
        self._verify(checksums, [xxhash.xxh3_128_digest(view) for view in views])
        for block, buffer in zip(self._blocks, buffers, strict=True):
            if self.codec is not None:
                self.codec.decode(buffer, block)
            elif buffer is not block:
                block.copy_(buffer)
        return ()

    def _settle(self) -> Sequence[bytes]:
        for job in self.after:  # they are done: the core began this move when they were
            job.settle()
        checksums = self._checksums(self._table.written)
        self._check_moved()
        self._verify(checksums, self.move.checksums)
        return ()

    def _checksums(self, written: Callable[[Record], tuple[bytes, str]]) -> list[bytes]:
        """What the records must have, as `written` tells it."""
        checksums = []
        for slot, record in zip(self.slots, self.records, strict=True):
            checksum, failure = written(record)
            if failure:
                raise TierIOError(f"cannot load record {slot}, it was not stored: {failure}")
            checksums.append(checksum)
        return checksums

    def _verify(self, checksums: Sequence[bytes], found: Sequence[bytes]) -> None:
        for index, (expected, got) in enumerate(zip(checksums, found, strict=True)):
            if got != expected:
                raise self._corruption(index, expected, got)

    def _corruption(self, index: int, expected: bytes, got: bytes) -> TierIOError:
        num_bytes = self.record_bytes
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

    def _move(self) -> Sequence[bytes]:
        buffers = self._buffers()
        for block, buffer in zip(self._blocks, buffers, strict=True):
            if self.codec is None:
                if buffer is not block:
                    buffer.copy_(block)
            elif not self.codec.encode(block, buffer):
                raise self._not_encoded()
        views = _views(buffers)
        # Before the write: bytes that change under it are noticed when they are loaded.
        checksums = [xxhash.xxh3_128_digest(view) for view in views]
        full_transfer(self._file.pwrite_from, views, self.offset, direct=self.is_direct)
        return checksums

    def _settle(self) -> Sequence[bytes]:
        self._check_moved()
        return self.move.checksums


def reserve_records(file: BlockFile, start: int, stop: int, block_bytes: int) -> None:
    """Get disk space for the records `[start, stop)`. Raises TierIOError, and reserves nothing."""
    try:
        file.reserve(start * block_bytes, (stop - start) * block_bytes)
    except OSError as error:
        slots = range(start, stop)
        raise _failure("reserve space for", file, slots, start * block_bytes, error) from error


def _strip(error: BaseException | None) -> None:
    """Let go of the frames that an error came through: whoever keeps it would keep their memory and
    descriptors, and those of the interrupt during which it came. A bug of ours keeps its own."""
    while isinstance(error, OSError):
        error.__traceback__ = error.__context__ = None
        error = error.__cause__


def _views(blocks: Sequence[torch.Tensor]) -> list[memoryview]:
    return [block.numpy().data for block in blocks]


def _names(slots: Sequence[int]) -> str:
    return f"record {slots[0]}" if len(slots) == 1 else f"records [{slots[0]}, {slots[-1] + 1})"


def _failure(
    verb: str, file: BlockFile, slots: Sequence[int], offset: int, error: OSError
) -> TierIOError:
    """What failed, where, and what to do about it."""
    code = error.errno or errno.EIO
    failure = io_error(
        code,
        f"cannot {verb} {_names(slots)} of the unnamed file in {file.directory!r} at byte {offset}:"
        f" {error.strerror or os.strerror(code)}; {remedy(code)}",
    )
    failure.__cause__ = error
    return failure
