"""Demotion: what every registered policy promises, and whose turn it is by age."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Shadowed, make_manager
from test_block_manager import BOTTOM, DISK, HOST, LAYOUT, filled, filled_chain

from hf_tiered_cache.blocks.block_manager import DEVICE, KVBlock, KVBlockManager
from hf_tiered_cache.blocks.demotion import ByAge, DemotionPolicy, SinksAndRecent
from hf_tiered_cache.errors import BlockStateError

BY_AGE = ByAge()


def to_demote(blocks: KVBlockManager, may_store: bool = True, rung: int = DEVICE) -> KVBlock | None:
    return BY_AGE.next_to_demote(blocks.waiting[rung], may_store)


def to_store(blocks: KVBlockManager) -> KVBlock | None:
    return BY_AGE.next_to_store(blocks.waiting[DEVICE])


@pytest.fixture(params=DemotionPolicy.registry)
def policy(request) -> DemotionPolicy:
    return DemotionPolicy.by_name(request.param)()


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("SDsd"), st.booleans()), max_size=30))
@pytest.mark.parametrize("name", DemotionPolicy.registry)
def test_every_policy_chooses_what_may_leave_as_long_as_there_is_some(name, steps):
    """S, s: store ahead from the device, the host. D, d: demote from there."""
    policy = DemotionPolicy.by_name(name)()
    blocks, _ = filled_chain(3, 5, 1)
    slots = iter(range(1000, 2000))
    for step, may_store in steps:
        rung = DEVICE if step.isupper() else HOST
        waiting = blocks.waiting[rung]
        if step in "Ss":
            block = policy.next_to_store(waiting)
            assert block is None or block in waiting.dirty[block.layer]
        else:
            block = policy.next_to_demote(waiting, may_store)
            assert (block is None) == (waiting.num_clean + may_store * waiting.num_dirty == 0)
            if block is not None and not may_store:
                assert block in waiting.clean[block.layer]
        if block is not None and block.copy_below(rung) is None:
            blocks.move(block, rung + 1, next(slots))
        if block is not None and step in "Dd":
            blocks.move(block, rung, None)
        blocks.check_integrity()


def test_every_policy_keeps_every_bit(tmp_path, policy):
    manager = make_manager(tmp_path, device_blocks=6, host_blocks=4, demotion=policy)
    tables = [Shadowed.new(manager, layer) for layer in range(2)]
    for num_tokens in (5, 9, 1, 17, 30):
        for table in tables:
            table.append(num_tokens)
        for table in tables:
            table.check([other.table for other in tables])
        manager.check_integrity()
    assert manager.num_cold_blocks() > 0
    manager.close()


def test_the_oldest_block_of_the_fullest_layer_is_demoted_first():
    caller, first = filled(8, layer=0)  # blocks 0 and 1 are full
    second = caller.blocks.new_table(1, LAYOUT, 1)
    caller.append(second, 16)  # four full blocks
    victims = []
    for _ in range(6):
        block = to_demote(caller.blocks)
        victims.append((block.layer, block.index))
        caller.demote(block)
        caller.blocks.check_integrity()
    assert victims == [(1, 0), (1, 1), (0, 0), (1, 2), (0, 1), (1, 3)]
    assert to_demote(caller.blocks) is None
    assert caller.tokens(first) == [list(range(1, 9))]


def test_a_clean_block_leaves_before_an_older_dirty_one_is_stored_for_nothing():
    caller, table = filled(16)
    caller.store(table.rows[0][0])
    assert to_demote(caller.blocks) is table.rows[0][0]
    assert to_store(caller.blocks) is table.rows[0][1]
    assert (caller.blocks.num_clean, caller.blocks.num_dirty) == (1, 3)


def test_without_room_below_only_clean_blocks_are_demoted():
    caller, first = filled(16, layer=0)
    second = caller.blocks.new_table(1, LAYOUT, 1)
    caller.append(second, 4)
    assert to_demote(caller.blocks, may_store=False) is None
    caller.store(second.rows[0][0])
    assert to_demote(caller.blocks) is first.rows[0][0]
    assert to_demote(caller.blocks, may_store=False) is second.rows[0][0]


def test_a_block_whose_store_failed_is_the_oldest_again():
    caller, table = filled(12)
    oldest = table.rows[0][0]
    caller.store(oldest)
    assert to_store(caller.blocks) is table.rows[0][1]
    caller.give_back(oldest, DISK)
    assert to_store(caller.blocks) is oldest
    caller.blocks.check_integrity()


def test_below_the_device_the_oldest_block_of_all_layers_goes_first():
    """The fullest layer there may be the one of which most are still on the device."""
    blocks, tables = filled_chain(3, 3)
    for slot, (layer, index) in enumerate([(0, 0), (1, 0), (1, 1), (0, 1), (0, 2)]):
        blocks.move(tables[layer].rows[0][index], HOST, slot)
    victims = []
    while block := to_demote(blocks, rung=HOST):
        victims.append((block.layer, block.index))
        blocks.move(block, BOTTOM, len(victims))
        blocks.move(block, HOST, None)
        blocks.check_integrity()
    assert victims == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]


class Stubborn(ByAge):
    """Chooses the same block for ever."""

    def next_to_demote(self, waiting, may_store):
        self.chosen = getattr(self, "chosen", None) or super().next_to_demote(waiting, may_store)
        return self.chosen


class Hasty(ByAge):
    """Stores what is stored already."""

    def next_to_store(self, waiting):
        clean = [block for queue in waiting.clean.values() for block in queue]
        return clean[0] if clean else super().next_to_store(waiting)


@pytest.mark.parametrize("policy", [Stubborn(), Hasty()])
def test_a_policy_that_chooses_what_may_not_leave_is_refused_and_the_tokens_stay(tmp_path, policy):
    manager = make_manager(tmp_path, device_blocks=10, demotion=policy)
    table = Shadowed.new(manager, batch=2)
    with pytest.raises(BlockStateError, match=f"{type(policy).__name__} chose KVBlock"):
        append_much(table)
    table.check()
    manager.check_integrity()
    manager.close()


def append_much(table: Shadowed) -> None:
    for _ in range(20):
        table.append(3)


def test_the_first_block_stays_for_drafts_as_long_as_there_is_another():
    caller, table = filled(16)
    policy = SinksAndRecent()
    victims = []
    for _ in range(4):
        block = policy.next_to_demote(caller.blocks.waiting[DEVICE], may_store=True)
        assert policy.next_to_store(caller.blocks.waiting[DEVICE]) is block
        victims.append(block.index)
        caller.demote(block)
    assert victims == [1, 2, 3, 0]
    assert caller.tokens(table) == [list(range(1, 17))]
