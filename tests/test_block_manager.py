"""The laws of the block tables, in numbers and on random walks beside a plain-Python model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BLOCK_TOKENS, LAYOUT

from hf_tiered_cache.blocks.block_manager import DEVICE, BlockTable, KVBlock, KVBlockManager
from hf_tiered_cache.errors import BlockStateError

DISK = 1


class Caller:
    """What the offload manager does around the block manager, on lists: slots hold token numbers.

    A freed slot is forgotten, so reading through a stale address raises KeyError.
    """

    def __init__(self) -> None:
        self.blocks = KVBlockManager(num_tiers=2)
        self.memory: list[dict[int, list[int]]] = [{}, {}]
        self.next_slot = [0, 0]
        self.next_token = 0

    def take(self, tier: int, tokens: list[int]) -> int:
        slot = self.next_slot[tier]
        self.next_slot[tier] += 1
        self.memory[tier][slot] = list(tokens)
        return slot

    def content(self, block: KVBlock) -> list[int]:
        tier = DEVICE if block.is_resident else DISK
        return self.memory[tier][block.slots[tier]]

    def release(self, dropped: list[KVBlock]) -> None:
        for block in dropped:
            for tier in (DEVICE, DISK):
                self.give_back(block, tier)

    def give_back(self, block: KVBlock, tier: int) -> None:
        slot = self.blocks.move(block, tier, None)
        if slot is not None:
            del self.memory[tier][slot]

    def append(self, table: BlockTable, num_tokens: int) -> list[list[int]]:
        """Append new tokens to every row; return them."""
        written: list[list[int]] = [[] for _ in table.rows]
        for _ in range(num_tokens):
            for row in range(table.batch):
                if not table.is_filling:
                    self.blocks.append_block(table, row, self.take(DEVICE, []))
                self.own_last(table, row)
                self.next_token += 1
                content = self.content(table.rows[row][-1])
                del content[table.num_tokens % BLOCK_TOKENS :]
                content.append(self.next_token)
                written[row].append(self.next_token)
            self.blocks.advance(table, 1)
        return written

    def own_last(self, table: BlockTable, row: int) -> None:
        block = table.rows[row][-1]
        if block.ref_count > 1:
            self.blocks.replace_last(table, row, self.take(DEVICE, self.content(block)))
            return
        if not block.is_resident:
            self.blocks.move(block, DEVICE, self.take(DEVICE, self.content(block)))
        self.blocks.start_filling(block)
        self.give_back(block, DISK)

    def store(self, block: KVBlock) -> None:
        self.blocks.move(block, DISK, self.take(DISK, self.content(block)))

    def demote(self, block: KVBlock) -> None:
        if not block.is_stored:
            self.store(block)
        self.give_back(block, DEVICE)

    def tokens(self, table: BlockTable) -> list[list[int]]:
        return [
            [token for block in row for token in self.content(block)][: table.num_tokens]
            for row in table.rows
        ]


def filled(num_tokens: int, batch: int = 1, layer: int = 0) -> tuple[Caller, BlockTable]:
    caller = Caller()
    table = caller.blocks.new_table(layer, LAYOUT, batch)
    caller.append(table, num_tokens)
    return caller, table


def test_ten_tokens_take_two_full_blocks_and_one_filling():
    caller, table = filled(10)
    assert table.num_blocks == 3
    assert table.is_filling
    assert caller.blocks.num_dirty == 2
    assert [caller.blocks.is_demotable(block) for block in table.rows[0]] == [True, True, False]


def test_advance_returns_exactly_the_blocks_that_became_full():
    blocks = KVBlockManager(num_tiers=1)
    table = blocks.new_table(0, LAYOUT, batch=2)
    rows = [[blocks.append_block(table, row, 3 * row + i) for i in range(3)] for row in range(2)]
    assert blocks.advance(table, 3) == []
    assert blocks.advance(table, 1) == [rows[0][0], rows[1][0]]
    assert blocks.advance(table, 8) == [rows[0][1], rows[1][1], rows[0][2], rows[1][2]]


def test_more_tokens_than_blocks_hold_is_a_broken_law():
    blocks = KVBlockManager(num_tiers=1)
    table = blocks.new_table(0, LAYOUT, batch=1)
    blocks.append_block(table, 0, 0)
    with pytest.raises(BlockStateError, match="5 tokens in 1 blocks"):
        blocks.advance(table, 5)


HOST, BOTTOM = 1, 2


def filled_chain(*num_blocks: int) -> tuple[KVBlockManager, list[BlockTable]]:
    """Layers of so many full blocks over three rungs, all on the device."""
    blocks = KVBlockManager(num_tiers=3)
    tables = []
    slots = iter(range(1000))
    for layer, count in enumerate(num_blocks):
        tables.append(blocks.new_table(layer, LAYOUT, 1))
        for _ in range(count):
            blocks.append_block(tables[-1], 0, next(slots))
        blocks.advance(tables[-1], count * BLOCK_TOKENS)
    return blocks, tables


def test_a_copy_waits_on_its_own_rung_clean_once_there_is_one_below():
    blocks, (table,) = filled_chain(2)
    first, second = table.rows[0]
    blocks.move(first, HOST, 0)
    assert (blocks.num_clean_on(DEVICE), blocks.num_clean_on(HOST)) == (1, 0)
    assert [blocks.num_demotable(rung) for rung in (DEVICE, HOST)] == [2, 1]
    assert [list(blocks.waiting[rung].dirty[0]) for rung in (DEVICE, HOST)] == [[second], [first]]
    blocks.move(first, BOTTOM, 0)
    assert (blocks.num_clean, blocks.num_dirty) == (2, 1)  # a device and a host copy; the second's
    blocks.move(first, HOST, None)
    assert (blocks.num_clean_on(DEVICE), blocks.num_demotable(HOST)) == (1, 0)
    assert first.copy_below(DEVICE) == BOTTOM
    blocks.check_integrity()
    assert blocks.truncate(table, 0) == [first, second]
    assert blocks.num_clean + blocks.num_dirty == 0


def test_a_block_on_the_host_that_would_never_be_demoted_is_noticed():
    blocks, (table,) = filled_chain(1)
    table.rows[0][0].slots[HOST] = 0
    with pytest.raises(BlockStateError, match="wrong queue of demotion"):
        blocks.check_integrity()
    blocks, (table,) = filled_chain(1)
    blocks.move(table.rows[0][0], HOST, 0)
    blocks.move(table.rows[0][0], DEVICE, None)
    blocks.waiting[HOST].dirty[0].clear()
    with pytest.raises(BlockStateError, match="1 blocks on rung 1, 0 wait for demotion"):
        blocks.check_integrity()


def test_selecting_rows_shares_blocks_and_moves_no_slot():
    caller, table = filled(10, batch=3)
    slots = [[block.slots[DEVICE] for block in row] for row in table.rows]
    dropped = caller.blocks.select_rows(table, [2, 2, 0, -1])
    assert [[b.slots[DEVICE] for b in row] for row in table.rows] == [
        slots[2],
        slots[2],
        slots[0],
        slots[2],
    ]
    assert [block.ref_count for block in table.rows[0]] == [3, 3, 3]
    assert [block.slots[DEVICE] for block in dropped] == slots[1]
    caller.release(dropped)
    caller.blocks.check_integrity()


def test_shared_blocks_are_given_once_per_column():
    caller, table = filled(8, batch=2)
    caller.release(caller.blocks.select_rows(table, [0, 0, 1]))
    assert len(list(table.blocks())) == 4
    assert [block.index for block in table.blocks(1, 2)] == [1, 1]


def test_only_a_shared_last_block_can_be_replaced():
    caller, table = filled(6)
    with pytest.raises(BlockStateError, match="is not shared"):
        caller.blocks.replace_last(table, 0, 99)
    fork = caller.blocks.fork(table)
    shared, own = caller.blocks.replace_last(fork, 0, caller.take(DEVICE, [5, 6]))
    assert (shared.ref_count, own.ref_count) == (1, 1)
    assert table.rows[0][-1] is shared
    assert fork.rows[0][-1] is own
    caller.blocks.check_integrity()


def test_a_fork_shares_every_block_and_diverges_on_write():
    caller, table = filled(6)
    fork = caller.blocks.fork(table)
    assert len(caller.memory[DEVICE]) == 2
    caller.append(fork, 1)
    assert len(caller.memory[DEVICE]) == 3  # only the filling block was copied
    caller.append(table, 1)
    assert len(caller.memory[DEVICE]) == 3  # the original's is no longer shared
    assert caller.tokens(table) == [[1, 2, 3, 4, 5, 6, 8]]
    assert caller.tokens(fork) == [[1, 2, 3, 4, 5, 6, 7]]


def test_dropping_one_of_two_sharers_frees_nothing():
    caller, table = filled(6)
    fork = caller.blocks.fork(table)
    assert caller.blocks.drop_table(fork) == []
    assert len(caller.blocks.drop_table(table)) == 2
    assert caller.blocks.tables == []


def test_truncate_frees_whole_blocks_and_keeps_the_partly_kept_one():
    caller, table = filled(11)
    last_two = table.rows[0][1:]
    dropped = caller.blocks.truncate(table, 7)
    assert dropped == last_two[1:]
    assert table.rows[0][-1] is last_two[0]
    caller.release(dropped)
    caller.blocks.check_integrity()
    assert [len(caller.blocks.truncate(table, n)) for n in (5, 4, 0)] == [0, 1, 1]


@pytest.mark.parametrize("num_tokens", [-1, 12])
def test_truncate_refuses_lengths_that_are_no_prefix(num_tokens):
    caller, table = filled(11)
    with pytest.raises(BlockStateError, match=f"truncate 11 tokens to {num_tokens}"):
        caller.blocks.truncate(table, num_tokens)


def runs(placement):
    return [(run.first, run.last, run.rung) for run in placement.runs]


def test_a_placement_names_slots_and_runs_and_is_kept_until_something_moves():
    caller, table = filled(16, batch=2)
    for block in list(table.blocks(1, 3)):
        caller.demote(block)
    placement = caller.blocks.placement(table)
    assert placement.slots.dtype == torch.int32
    assert placement.slots.tolist() == [[0, -1, -1, 6], [1, -1, -1, 7]]
    assert runs(placement) == [(0, 1, DEVICE), (1, 3, DISK), (3, 4, DEVICE)]
    assert [run.slots.tolist() for run in placement.runs] == [
        [[0], [1]],
        [[block.slots[DISK] for block in row[1:3]] for row in table.rows],
        [[6], [7]],
    ]
    assert caller.blocks.placement(table) is placement
    caller.demote(table.rows[0][0])
    assert runs(caller.blocks.placement(table)) == [(0, 1, None), (1, 3, DISK), (3, 4, DEVICE)]


def test_a_column_with_one_cold_block_is_on_no_rung():
    caller, table = filled(8, batch=2)
    caller.demote(table.rows[1][0])
    first, second = caller.blocks.placement(table).runs
    assert (first.rung, second.rung) == (None, DEVICE)
    assert first.slots.tolist() == [[0], [-1]]  # what is on the device can be read there


@pytest.mark.parametrize(
    ("breach", "message"),
    [
        (lambda _, row: setattr(row[0], "ref_count", 2), "ref_count 2, 1 holders"),
        (lambda _, row: row[0].slots.__setitem__(DEVICE, None), "is nowhere"),
        (lambda _, row: row.pop(), "2 blocks for 10 tokens"),
        (lambda _, row: setattr(row[1], "index", 0), "stands at"),
        (lambda _, row: row[1].slots.__setitem__(DEVICE, 77), "placement"),
        (lambda blocks, row: blocks.start_filling(row[0]), "would never be demoted"),
        (lambda _, row: row[0].slots.__setitem__(DISK, 5), "wrong queue"),
        (lambda blocks, row: blocks.move(row[1], DEVICE, 0), "share a slot of tier 0"),
    ],
)
def test_check_integrity_notices_each_broken_law(breach, message):
    caller, table = filled(10)
    caller.blocks.check_integrity()
    breach(caller.blocks, table.rows[0])
    with pytest.raises(BlockStateError, match=message):
        caller.blocks.check_integrity()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append"] * 4 + ["demote"] * 3 + ["truncate", "select", "fork", "drop"]),
        st.integers(0, 5),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=120, deadline=None)
@given(steps=STEPS, batch=st.integers(1, 3))
def test_random_walk_reads_what_the_plain_model_holds(steps, batch):
    caller = Caller()
    first = caller.blocks.new_table(0, LAYOUT, batch)
    second = caller.blocks.new_table(1, LAYOUT, batch)
    shadows = [(first, [[] for _ in range(batch)]), (second, [[] for _ in range(batch)])]
    for name, which, amount in steps:
        index = which % len(shadows)
        table, rows = shadows[index]
        if name == "append":
            for row, new in zip(rows, caller.append(table, amount), strict=True):
                row += new
        elif name == "truncate":
            keep = max(0, table.num_tokens - amount)
            caller.release(caller.blocks.truncate(table, keep))
            rows[:] = [row[:keep] for row in rows]
        elif name == "select":
            chosen = [(which + i * amount) % table.batch for i in range(1 + amount % 4)]
            caller.release(caller.blocks.select_rows(table, chosen))
            rows[:] = [list(rows[row]) for row in chosen]
        elif name == "fork" and len(shadows) < 5:
            shadows.append((caller.blocks.fork(table), [list(row) for row in rows]))
        elif name == "drop" and len(shadows) > 1:
            caller.release(caller.blocks.drop_table(table))
            del shadows[index]
        elif name == "demote" and (waiting := list(caller.blocks.waiting[DEVICE])):
            caller.demote(waiting[amount % len(waiting)])
        caller.blocks.check_integrity()
        for table, rows in shadows:
            assert caller.tokens(table) == rows
    for table, _ in shadows:
        caller.release(caller.blocks.drop_table(table))
    assert caller.memory == [{}, {}], "no slot is lost"
