"""What is known of each record of a block file: its state and its checksum. No I/O."""

import threading
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import chain
from typing import Generic, Protocol, TypeVar

from hf_tiered_cache.errors import BlockStateError
from hf_tiered_cache.tiers.slots import SlotPool
from hf_tiered_cache.transfers import WAKE_SECONDS, Transfer


class RecordState(Enum):
    """What a read of the record would find."""

    EMPTY = "empty"  # allocated, never written
    WRITING = "writing"  # a read waits for the write
    STORED = "stored"  # its bytes have the checksum
    FAILED = "failed"  # its write failed; it may be written again, or freed


class User(Protocol):
    """A part of a transfer, from `begin_read` or `begin_write` until it `has_ended`."""

    is_write: bool
    slots: Sequence[int]
    records: Sequence["Record"]
    transfer: Transfer

    @property
    def has_ended(self) -> bool:
        """Whether it is known what came of it."""


class Record:
    """What is in the file for one slot, as long as the slot is handed out.

    EMPTY, STORED, FAILED --begin_write--> WRITING --note a checksum--> STORED
                                           WRITING --note a failure---> FAILED
    """

    __slots__ = ("checksum", "failure", "writer")

    def __init__(self) -> None:
        self.checksum = b""
        self.failure = ""
        self.writer: User | None = None  # until it is forgotten

    @property
    def state(self) -> RecordState:
        """See `RecordState`; it follows from the rest."""
        if self.writer is not None and not self.writer.has_ended:
            return RecordState.WRITING
        if self.failure:
            return RecordState.FAILED
        return RecordState.STORED if self.checksum else RecordState.EMPTY


AnyUser = TypeVar("AnyUser", bound=User)


class RecordTable(Generic[AnyUser]):
    """The records of one file by slot. Thread-safe; shared by the tier and its I/O threads.

    A slot is handed out while it has a record here. One that was freed with users keeps the pool's
    slot, so that they cannot meet the next owner's bytes: it is retired until they have ended. Who
    ends a user takes `lock`, and may do all of it again after an interrupt.
    """

    def __init__(self, pool: SlotPool) -> None:
        # Reentrant: garbage collection in here may finalize the tier, which closes this table.
        # Taken by itself and not through the condition, whose own code could be interrupted.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._pool = pool
        self._records: dict[int, Record] = {}
        self._users: dict[AnyUser, None] = {}  # under way, and maybe some that ended
        self.is_closing = False

    @property
    def users(self) -> list[AnyUser]:
        """Those that began and were not forgotten, in order."""
        return list(self._users)

    @property
    def num_used(self) -> int:
        """Slots handed out and not freed."""
        return len(self._records)

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget."""
        return self._pool.committed_bytes

    def num_free(self) -> int:
        """Slots that can be handed out, retired ones included."""
        with self.lock:
            return self._pool.num_free() + self._pool.num_used - len(self._records)

    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""
        for slot in slots:
            self._record(slot)

    def allocate(self) -> int | None:
        """The lowest free slot. Waits for the users of a retired one when no other is left."""
        while True:
            with self.lock:
                slot = self._pool.allocate()
                if slot is None and self._free_retired(self._pool.used):
                    slot = self._pool.allocate()
                if slot is not None:
                    self._records[slot] = Record()
                    return slot
                user = self._user_of_retired()
            if user is None:
                return None
            user.transfer.outlast()

    def free(self, slot: int) -> None:
        """Hand `slot` back, once its users have ended. Raises BlockStateError."""
        with self.lock:
            self._record(slot)
            del self._records[slot]
            self._free_retired([slot])

    def keep_only(self, slots: Iterable[int]) -> None:
        """Let exactly `slots` be handed out; those that were not are FAILED. Nothing has users."""
        with self.lock:
            kept = set(slots)
            self._pool.keep_only(kept)
            self._records = {slot: self._records.get(slot) or _adopted() for slot in kept}

    def begin_read(self, users: Sequence[AnyUser]) -> None:
        """Users of their slots begin. Raises BlockStateError, and changes nothing."""
        with self.lock:
            for slot in _slots_of(users):
                record = self._record(slot)
                if not record.checksum and record.state is RecordState.EMPTY:
                    raise BlockStateError(_bug(slot, "is read but was never written"))
            self._begin(users)

    def begin_write(self, users: Sequence[AnyUser]) -> None:
        """The slots become WRITING. Raises BlockStateError, and changes nothing."""
        with self.lock:
            busy, named = self._busy_slots(), set()
            for slot in _slots_of(users):
                self._record(slot)
                if slot in busy:
                    raise BlockStateError(_bug(slot, "is written with a transfer under way"))
                if slot in named:
                    raise BlockStateError(_bug(slot, "comes twice in one write"))
                named.add(slot)
            self._begin(users)
            for user in users:
                for record in user.records:
                    record.writer = user

    def note(self, user: AnyUser, checksums: Sequence[bytes], failure: str) -> None:
        """What came of a write: its bytes are in the file, or nobody knows what is, and why."""
        with self.lock:
            for index, record in enumerate(user.records):
                if record.writer is user:
                    record.failure = failure
                    record.checksum = b"" if failure else checksums[index]

    def forget(self, user: AnyUser) -> None:
        """A user has ended; of its slots those that are retired may be handed out again."""
        with self.lock:
            self._users.pop(user, None)
            for record in user.records:
                if record.writer is user:
                    record.writer = None  # it keeps memory alive
            if not self.is_closing:
                self._free_retired(user.slots)
            self._changed.notify_all()

    def wait_written(self, record: Record) -> tuple[bytes, str]:
        """Wait for the write of a record, if one is under way; its checksum, or why it has none.

        In an I/O thread: in the main thread an interrupt could come in the middle of the waiting.
        """
        with self.lock:
            while record.state is RecordState.WRITING and not self.is_closing:
                self._changed.wait(WAKE_SECONDS)
            return self.written(record)

    def written(self, record: Record) -> tuple[bytes, str]:
        """The checksum of a record, or why it has none."""
        with self.lock:
            if record.state is RecordState.WRITING:
                return b"", "its write was interrupted, or the tier closed first"
            return record.checksum, record.failure

    def stop_waiting(self) -> None:
        """The tier closes: nobody waits in `wait_written` any longer. Idempotent."""
        self.is_closing = True
        with self.lock:
            self._changed.notify_all()

    def close(self) -> None:
        """Release the budget; after `stop_waiting`. Idempotent.

        The records stay: a user that is still under way ends in them.
        """
        with self.lock:
            self._pool.close()

    def _begin(self, users: Sequence[AnyUser]) -> None:
        for user in users:
            user.records = [self._records[slot] for slot in user.slots]
        self._users.update(dict.fromkeys(users))  # one step

    def _busy_slots(self) -> set[int]:
        return set(_slots_of(user for user in self._users if not user.has_ended))

    def _free_retired(self, slots: Iterable[int]) -> bool:
        """Give the pool those of the slots that nobody has and nobody uses; whether there were."""
        if self._pool.num_used == len(self._records):
            return False  # nearly always: there are none
        unused = {slot for slot in slots if slot not in self._records} & self._pool.used
        unused = unused and unused - self._busy_slots()
        for slot in unused:
            self._pool.free(slot)
        return bool(unused)

    def _user_of_retired(self) -> AnyUser | None:
        for user in self._users:
            if not user.has_ended and any(slot not in self._records for slot in user.slots):
                return user
        return None

    def _record(self, slot: int) -> Record:
        """The record of `slot`. Raises BlockStateError when it is not handed out."""
        record = self._records.get(slot)
        if record is None:
            if slot in self._pool.used:
                raise BlockStateError(_bug(slot, "was freed"))
            self._pool.check([slot])  # raises, and knows why
            raise AssertionError("the pool gave a slot away that it does not have")
        return record


def _slots_of(users: Iterable[User]) -> Iterable[int]:
    return chain.from_iterable(user.slots for user in users)


def _adopted() -> Record:
    """A record whose slot had been freed: nobody knows what is in the file."""
    record = Record()
    record.failure = "its slot had been given back"
    return record


def _bug(slot: int, what: str) -> str:
    return f"tier 'disk': slot {slot} {what}; a bug of this package, please report it"
