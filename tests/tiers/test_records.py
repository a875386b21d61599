"""The states of a record, and what each allows."""

import threading
import time
from itertools import count

import pytest

from hf_tiered_cache.errors import BlockStateError
from hf_tiered_cache.tiers import Budget
from hf_tiered_cache.tiers.disk.records import RecordState, RecordTable
from hf_tiered_cache.tiers.slots import SlotPool
from hf_tiered_cache.transfers import Transfer


@pytest.fixture
def table():
    return RecordTable(SlotPool(4096, Budget("disk", 3 * 4096), "disk"))


class User:
    """A part of a transfer, without bytes."""

    def __init__(self, table: RecordTable, slots, is_write: bool) -> None:
        self.table, self.slots, self.is_write = table, slots, is_write
        self.records = ()
        self.transfer = Transfer()
        self.has_ended = False

    def end(self, failure: str = "") -> None:
        if self.is_write:
            self.table.note(self, [b"sum"] * len(self.slots), failure)
        self.has_ended = True
        self.transfer.end_part()
        self.table.forget(self)


def write(table: RecordTable, *slots: int) -> User:
    user = User(table, slots, is_write=True)
    table.begin_write([user])
    return user


def read(table: RecordTable, *slots: int) -> User:
    user = User(table, slots, is_write=False)
    table.begin_read([user])
    return user


def test_empty_writing_stored_writing_failed_writing_stored(table):
    slot = table.allocate()
    record = table._records[slot]
    assert record.state is RecordState.EMPTY
    for failure in ("", "why", ""):
        user = write(table, slot)
        assert record.state is RecordState.WRITING
        assert table.written(record) == (b"", "its write was interrupted, or the tier closed first")
        user.end(failure)
        assert record.state is (RecordState.FAILED if failure else RecordState.STORED)
        assert table.wait_written(record) == (b"" if failure else b"sum", failure)


def test_what_a_write_notes_again_does_not_touch_the_next_one(table):
    slot = table.allocate()
    first = write(table, slot)
    first.end()
    write(table, slot).end()
    first.end("again, after an interrupt")
    assert table._records[slot].state is RecordState.STORED


def test_an_empty_record_is_not_read(table):
    slot = table.allocate()
    for _ in range(2):
        with pytest.raises(BlockStateError, match="never written"):
            read(table, slot)
        table.free(slot)
        assert table.allocate() == slot


@pytest.mark.parametrize("begin", [write, read])
def test_no_write_while_a_transfer_is_under_way(table, begin):
    slot, other = table.allocate(), table.allocate()
    write(table, slot).end()
    begin(table, slot)
    with pytest.raises(BlockStateError, match="under way"):
        write(table, other, slot)
    write(table, other)  # the refused one had changed nothing


def test_one_write_names_a_slot_once(table):
    slot = table.allocate()
    with pytest.raises(BlockStateError, match="twice"):
        write(table, slot, slot)
    write(table, slot)


def test_a_retired_slot_is_free_to_the_caller_and_reused_when_its_users_ended(table):
    slots = [table.allocate() for _ in range(3)]
    writes = [write(table, slot) for slot in slots]
    for user in writes[1:]:
        user.end()
    reading = read(table, 1)
    table.free(0)
    table.free(1)
    assert (table.num_used, table.num_free()) == (1, 2)
    for refused in (lambda: table.free(0), lambda: read(table, 0)):
        with pytest.raises(BlockStateError, match="was freed"):
            refused()
    threading.Timer(0.05, writes[0].end).start()
    before = time.monotonic()
    assert table.allocate() == 0  # waits for its write; slot 1 is still being read
    assert time.monotonic() - before > 0.02
    reading.end()
    assert table.allocate() == 1
    assert table.allocate() is None


def test_a_slot_that_an_interrupt_left_without_a_record_is_free(table):
    """`allocate` was interrupted when the pool had given it."""
    numbers = count()

    class Interrupted(dict):
        def __setitem__(self, slot, record):
            if next(numbers) == 1:
                raise KeyboardInterrupt
            super().__setitem__(slot, record)

    table._records = Interrupted()
    table.allocate()
    with pytest.raises(KeyboardInterrupt):
        table.allocate()
    assert (table.num_used, table.num_free()) == (1, 2)
    assert sorted([table.allocate(), table.allocate()]) == [1, 2]
    assert table.allocate() is None


def test_closing_ends_the_waiting_for_a_write(table):
    slot = table.allocate()
    user, found = write(table, slot), []
    waiting = threading.Thread(target=lambda: found.append(table.wait_written(user.records[0])))
    waiting.start()
    table.stop_waiting()
    waiting.join(5)
    assert found == [(b"", "its write was interrupted, or the tier closed first")]
    table.close()
    table.close()
    user.end("late")  # a transfer still under way ends without harm
