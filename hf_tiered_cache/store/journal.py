"""What happened in a store, in order, for every process on its folder: `Journal`.

An append-only file of fixed records. Each process replays it into an index of its own, so that all
agree on what is there and whose turn it is to leave. It is a hint: the files are the truth, and a
journal that is missing, torn or damaged is made anew from them.

Puts and evictions are appended by whoever holds the store's lock, hits by anybody (one write with
O_APPEND is one step on a local file system). One hit tells of a whole prefix: its last block.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import xxhash

from hf_tiered_cache.store.files import FILE_MODE, REFUSALS

NAME = "journal"
TEMPORARY = f"{NAME}.tmp"  # of whoever holds the lock: what a killed one left is written over
_RECORD = struct.Struct("<BxxxxxxxQ32s32s32s8s")
RECORD_BYTES = _RECORD.size
_CHECKED = RECORD_BYTES - 8
_NO_KEY = bytes(32)


class Event(IntEnum):
    """What a record tells."""

    PUT = 1
    HIT = 2
    GONE = 3


_EVENTS = frozenset(Event)


class Record(NamedTuple):
    """One event of one block."""

    event: Event
    key: bytes
    num_bytes: int = 0
    parent: bytes = _NO_KEY
    space: bytes = _NO_KEY

    def pack(self) -> bytes:
        """The record as it stands in the file."""
        fields = (self.event, self.num_bytes, self.key, self.parent, self.space)
        data = _RECORD.pack(*fields, bytes(8))[:_CHECKED]
        return data + xxhash.xxh3_64_digest(data)


class TornJournalError(Exception):
    """The journal cannot be replayed: it is to be made anew from the files."""


class Journal:
    """The journal of one store as one process reads it, from where it read last."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._fd = -1
        self._offset = 0

    @property
    def num_records(self) -> int:
        """Records read so far."""
        return self._offset // RECORD_BYTES

    def is_current(self) -> bool:
        """Whether the file that is read is still the store's journal."""
        try:
            named = os.stat(NAME, dir_fd=self._root_fd)
        except FileNotFoundError:
            return False
        if self._fd < 0:
            return False
        ours = os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)

    def open(self) -> bool:
        """Begin to read the store's journal from its start; False where there is none."""
        self.close()
        try:
            self._fd = self._opened()
        except FileNotFoundError:
            return False
        return True

    def _opened(self) -> int:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(NAME, flags | os.O_RDWR | os.O_APPEND, dir_fd=self._root_fd)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
        return os.open(NAME, flags | os.O_RDONLY, dir_fd=self._root_fd)

    def read_new(self) -> list[Record]:
        """What was appended since. Raises TornJournalError."""
        num_bytes = os.fstat(self._fd).st_size - self._offset
        if num_bytes == 0:
            return []
        if num_bytes < 0 or num_bytes % RECORD_BYTES:
            raise TornJournalError
        data = os.pread(self._fd, num_bytes, self._offset)
        records = []
        for at in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            raw = data[at : at + RECORD_BYTES]
            event, size, key, parent, space, checksum = _RECORD.unpack(raw)
            if xxhash.xxh3_64_digest(raw[:_CHECKED]) != checksum or event not in _EVENTS:
                raise TornJournalError
            records.append(Record(Event(event), key, size, parent, space))
        self._offset += len(records) * RECORD_BYTES
        return records

    def append(self, records: Iterable[Record]) -> None:
        """Write records behind all others, in one step. Raises OSError."""
        data = b"".join(record.pack() for record in records)
        if data and self._fd >= 0 and os.write(self._fd, data) != len(data):
            raise OSError(errno.ENOSPC, f"the journal took a part: {os.strerror(errno.ENOSPC)}")

    def rewrite(self, records: Iterable[Record]) -> None:
        """Put a journal of these records in the place of the store's; for whoever holds its lock.
        It is to be opened. Raises OSError, and changes nothing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(TEMPORARY, flags, FILE_MODE, dir_fd=self._root_fd)
        try:
            try:
                os.fchmod(fd, FILE_MODE)
                with open(fd, "wb", closefd=False) as file:
                    file.write(b"".join(record.pack() for record in records))
            finally:
                os.close(fd)
            os.rename(TEMPORARY, NAME, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(TEMPORARY, dir_fd=self._root_fd)
            raise

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        fd, self._fd, self._offset = self._fd, -1, 0
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
