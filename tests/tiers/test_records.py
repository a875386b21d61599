"""The states of a record, and what each allows."""

import threading
import time

import pytest

from hf_tiered_cache.errors import BlockStateError
from hf_tiered_cache.tiers import Budget
from hf_tiered_cache.tiers.records import RecordState, RecordTable
from hf_tiered_cache.tiers.slots import SlotPool


@pytest.fixture
def table():
    return RecordTable(SlotPool(4096, Budget("disk", 3 * 4096), "disk"))


def state(table: RecordTable, slot: int) -> RecordState:
    return table._records[slot].state


def test_empty_writing_stored_writing_failed_writing_stored(table):
    slot = table.allocate()
    assert state(table, slot) is RecordState.EMPTY
    for outcome in ("stored", "failed", "stored"):
        table.begin_write([slot])
        assert state(table, slot) is RecordState.WRITING
        if outcome == "stored":
            table.written(slot, b"sum")
            assert state(table, slot) is RecordState.STORED
            assert table.wait_written(slot) == (b"sum", "")
        else:
            table.not_written(slot, "why")
            assert state(table, slot) is RecordState.FAILED
            assert table.wait_written(slot) == (b"", "why")
        table.end([slot])


def test_an_empty_record_is_not_read(table):
    slot = table.allocate()
    with pytest.raises(BlockStateError, match="never written"):
        table.begin_read([slot])
    table.free(slot)
    assert table.allocate() == slot
    with pytest.raises(BlockStateError, match="never written"):
        table.begin_read([slot])


@pytest.mark.parametrize("begin", ["begin_write", "begin_read"])
def test_no_write_while_a_transfer_is_under_way(table, begin):
    slot, other = table.allocate(), table.allocate()
    table.begin_write([slot])
    if begin == "begin_read":
        table.written(slot, b"sum")
        table.end([slot])
        table.begin_read([slot])
    with pytest.raises(BlockStateError, match="under way"):
        table.begin_write([other, slot])
    table.begin_write([other])  # the refused one had changed nothing


def test_one_write_names_a_slot_once(table):
    slot = table.allocate()
    with pytest.raises(BlockStateError, match="twice"):
        table.begin_write([slot, slot])
    table.begin_write([slot])


def test_a_retired_slot_is_free_to_the_caller_and_reused_when_its_transfers_ended(table):
    slots = [table.allocate() for _ in range(3)]
    table.begin_write(slots)
    for slot in slots:
        table.written(slot, b"sum")
    table.end(slots[1:])
    table.begin_read(slots[1:2])
    table.free(0)
    table.free(1)
    assert (table.num_used, table.num_free()) == (1, 2)
    for refused in (lambda: table.free(0), lambda: table.begin_read([0])):
        with pytest.raises(BlockStateError, match="was freed"):
            refused()
    threading.Timer(0.05, table.end, ([1],)).start()
    before = time.monotonic()
    assert table.allocate() == 1  # waits for the read of slot 1; slot 0 is still being written
    assert time.monotonic() - before > 0.02
    table.end([0])
    assert table.allocate() == 0
    assert table.allocate() is None


def test_closing_ends_the_waiting_for_a_write(table):
    slot = table.allocate()
    table.begin_write([slot])
    found = []
    reader = threading.Thread(target=lambda: found.append(table.wait_written(slot)))
    reader.start()
    table.stop_waiting()
    reader.join(5)
    assert found == [(b"", "the tier was closed first")]
    table.close()
    table.close()
    table.not_written(slot, "late")  # a transfer still under way ends without harm
    table.end([slot])
