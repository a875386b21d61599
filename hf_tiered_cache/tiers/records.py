"""What is known of each record of a block file: its state and its checksum. No I/O."""

import threading
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from hf_tiered_cache.errors import BlockStateError
from hf_tiered_cache.tiers.slots import SlotPool


class RecordState(Enum):
    """What a read of the record would find."""

    EMPTY = "empty"  # allocated, never written
    WRITING = "writing"  # a read waits for the write
    STORED = "stored"  # its bytes have the checksum
    FAILED = "failed"  # its write failed; it may be written again, or freed


class Record:
    """State of one allocated slot.

        EMPTY, STORED, FAILED --begin_write--> WRITING --written------> STORED
                                               WRITING --not_written--> FAILED

    `num_transfers` are under way. A record freed meanwhile is retired: its slot is handed out again
    only when they have ended, so that they cannot meet the next owner's bytes.
    """

    __slots__ = ("checksum", "failure", "is_retired", "num_transfers", "state")

    def __init__(self) -> None:
        self.state = RecordState.EMPTY
        self.checksum = b""
        self.failure = ""
        self.num_transfers = 0
        self.is_retired = False


class RecordTable:
    """The records of one file by slot. Thread-safe; shared by the tier and its I/O threads."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._records: dict[int, Record] = {}
        self._num_retired = 0
        self._is_closing = False
        # Reentrant: garbage collection in here may finalize the tier, which closes this table.
        self._changed = threading.Condition(threading.RLock())

    @property
    def num_used(self) -> int:
        """Slots handed out and not freed."""
        return self._pool.num_used - self._num_retired

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget."""
        return self._pool.committed_bytes

    def num_free(self) -> int:
        """Slots that can be handed out, retired ones included."""
        with self._changed:
            return self._pool.num_free() + self._num_retired

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        self._pool.check(slots)

    def allocate(self, wait: Callable[[], None] | None = None) -> int | None:
        """The lowest free slot. Waits for a retired one when no other is left.

        wait: waits for a transfer to end where somebody has to (without our lock, then).
        """
        while True:
            with self._changed:
                slot = self._pool.allocate()
                if slot is not None:
                    self._records[slot] = Record()
                    return slot
                if not self._num_retired:
                    return None
                if wait is None:
                    self._changed.wait()
                    continue
            wait()

    def free(self, slot: int) -> None:
        """Hand `slot` back, once its transfers have ended. Raises BlockStateError."""
        with self._changed:
            record = self._record(slot)
            if record.num_transfers:
                record.is_retired = True
                self._num_retired += 1
            else:
                del self._records[slot]
                self._pool.free(slot)

    def drain(self, wait: Callable[[], None] | None = None) -> None:
        """Return when no transfer is under way. wait: as in `allocate`."""
        while True:
            with self._changed:
                if not any(record.num_transfers for record in self._records.values()):
                    return
                if wait is None:
                    self._changed.wait()
                    continue
            wait()

    def keep_only(self, slots: Iterable[int]) -> None:
        """Let exactly `slots` be handed out; those that were not are FAILED. After `drain`."""
        with self._changed:
            kept = set(slots)
            self._pool.keep_only(kept)
            self._records = {slot: self._records.get(slot) or _adopted() for slot in kept}
            self._num_retired = 0

    def begin_read(self, slots: Sequence[int]) -> None:
        """A transfer of the slots begins. Raises BlockStateError, and changes nothing."""
        with self._changed:
            for slot in slots:
                if self._record(slot).state is RecordState.EMPTY:
                    raise BlockStateError(_bug(slot, "is read but was never written"))
            for slot in slots:
                self._records[slot].num_transfers += 1

    def begin_write(self, slots: Sequence[int]) -> None:
        """The slots become WRITING. Raises BlockStateError, and changes nothing."""
        with self._changed:
            for index, slot in enumerate(slots):
                if self._record(slot).num_transfers:
                    raise BlockStateError(_bug(slot, "is written with a transfer under way"))
                if slot in slots[:index]:
                    raise BlockStateError(_bug(slot, "comes twice in one write"))
            for slot in slots:
                record = self._records[slot]
                record.num_transfers += 1
                record.state = RecordState.WRITING

    def written(self, slot: int, checksum: bytes) -> None:
        """The bytes of `slot` are in the file."""
        with self._changed:
            record = self._records[slot]
            record.state, record.checksum, record.failure = (RecordState.STORED, checksum, "")
            self._changed.notify_all()

    def not_written(self, slot: int, failure: str) -> None:
        """The write of `slot` failed: nobody knows what is in the file."""
        with self._changed:
            record = self._records[slot]
            record.state, record.checksum, record.failure = (RecordState.FAILED, b"", failure)
            self._changed.notify_all()

    def wait_written(self, slot: int) -> tuple[bytes, str]:
        """Wait for the write of `slot`, if one is under way; its checksum, or why it has none."""
        with self._changed:
            record = self._records[slot]
            while record.state is RecordState.WRITING and not self._is_closing:
                self._changed.wait()
            if record.state is RecordState.WRITING:
                return b"", "the tier was closed first"
            return record.checksum, record.failure

    def end(self, slots: Iterable[int]) -> None:
        """A transfer of these slots ended; retired ones may be handed out again."""
        with self._changed:
            for slot in slots:
                record = self._records[slot]
                record.num_transfers -= 1
                if record.is_retired and record.num_transfers == 0 and not self._is_closing:
                    self._num_retired -= 1
                    del self._records[slot]
                    self._pool.free(slot)
            self._changed.notify_all()

    def stop_waiting(self) -> None:
        """The tier closes: nobody waits in `wait_written` any longer."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """Release the budget; after `stop_waiting`. Idempotent.

        The records stay: a transfer that is still under way ends in them.
        """
        with self._changed:
            self._pool.close()

    def _record(self, slot: int) -> Record:
        """The record of `slot`. Raises BlockStateError when it is not handed out."""
        record = self._records.get(slot)
        if record is None:
            self._pool.check([slot])  # raises, and knows why
            raise AssertionError(f"slot {slot} is handed out but has no record")
        if record.is_retired:
            raise BlockStateError(_bug(slot, "was freed"))
        return record


def _adopted() -> Record:
    """A record whose slot had been freed: nobody knows what is in the file."""
    record = Record()
    record.state, record.failure = RecordState.FAILED, "its slot had been given back"
    return record


def _bug(slot: int, what: str) -> str:
    return f"tier 'disk': slot {slot} {what}; a bug of this package, please report it"
