"""What is demoted and when, in numbers; hard caps and right bytes on random walks; failures."""

import errno
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    Footprint,
    Shadowed,
    chunks,
    make_manager,
    new_tokens,
    placement,
    settle,
)
from tiers import faulty_file as faults

from hf_tiered_cache.errors import ClosedCacheError, OutOfBlocksError, TierIOError
from hf_tiered_cache.layout import BlockLayout


def shadowed_layers(manager, num_layers: int, batch: int = 1) -> list[Shadowed]:
    return [Shadowed.new(manager, layer, batch) for layer in range(num_layers)]


def sizes(manager) -> list[tuple[int, int]]:
    """(used, free) slots of each tier, staging that is taken but empty not counted as used."""
    return [(tier.used_slots, tier.num_free()) for tier in manager.tiers]


def state(manager) -> list[tuple[int, list[list[tuple[int | None, ...]]]]]:
    """Every block's address, by table."""
    return [
        (table.num_tokens, [[tuple(block.slots) for block in row] for row in table.rows])
        for table in manager.blocks.tables
    ]


def test_nothing_is_stored_when_all_fits(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 * 10 + 2 + 2)
    layers = shadowed_layers(manager, 2)
    for _ in range(10):
        for layer in layers:
            layer.append(BLOCK_TOKENS)
    assert manager.counters.stores == 0
    assert [placement(layer.table) for layer in layers] == ["D" * 10] * 2
    for layer in layers:
        layer.check()
    assert (manager.counters.loads, manager.counters.resident_reads) == (0, 20)


def test_the_oldest_blocks_go_down_first_and_every_layer_keeps_the_same_share(tmp_path):
    manager = make_manager(tmp_path, device_blocks=3 * 4 + 2)
    layers = shadowed_layers(manager, 3)
    for _ in range(40):
        for layer in layers:
            layer.append(1)
            manager.check_integrity()
    settle(manager)
    assert [placement(layer.table).strip("bD") for layer in layers] == ["d" * 6] * 3
    assert [len(placement(layer.table).strip("d")) for layer in layers] == [4, 4, 4]
    for layer in layers:
        layer.check()


def test_a_block_is_stored_at_most_once_however_often_it_is_read(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 3)
    layer = Shadowed.new(manager)
    for _ in range(60):
        layer.append(1)
        layer.check()
    disk = manager.tiers[1]
    written = [slot for slots in disk.writes for slot in slots]
    assert len(written) == len(set(written)) == manager.counters.stores <= 14
    assert manager.counters.stored_bytes == manager.counters.stores * BLOCK_BYTES
    assert manager.counters.loaded_bytes == manager.counters.loads * BLOCK_BYTES


def test_stores_begin_before_their_room_is_needed(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 4)
    layer = Shadowed.new(manager)
    layer.append(4 * BLOCK_TOKENS)  # the device is full, the next token needs a block
    assert manager.counters.stores == 1
    settle(manager)
    assert placement(layer.table) == "bDDD"
    layer.append(1)
    assert manager.counters.store_wait_seconds == 0
    assert placement(layer.table) == "dDDDD"


def test_a_prompt_twenty_times_the_device_goes_in_by_one_append(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 4)
    layer = Shadowed.new(manager, batch=2)
    layer.append(40 * BLOCK_TOKENS + 3)
    manager.check_integrity()
    layer.check()
    assert manager.device_tier.budget.peak_bytes <= 6 * BLOCK_BYTES


# --- hard caps and right bytes, whatever comes ---------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 6 + ["stream", "truncate", "select", "fork", "drop", "abandon"]
        ),
        st.integers(0, 7),
        st.integers(0, 11),
    ),
    min_size=1,
    max_size=25,
)


def walk(manager, steps, batch: int, num_layers: int) -> None:
    """Do the steps; after each of them the laws hold, the caps hold and every byte is right."""
    shadows = shadowed_layers(manager, num_layers, batch)
    for name, which, amount in steps:
        index = which % len(shadows)
        shadow = shadows[index]
        scan = [other.table for other in shadows]
        try:
            if name == "append":
                shadow.append(amount)
            elif name == "stream":
                shadow.check(scan)
            elif name == "truncate":
                shadow.truncate(max(0, shadow.table.num_tokens - amount))
            elif name == "select":
                rows = [(which + i * amount) % shadow.table.batch for i in range(1 + amount % 4)]
                shadow.select_rows(rows)
            elif name == "fork" and len(shadows) < 8:
                shadows.append(shadow.fork())
            elif name in ("drop", "abandon") and len(shadows) > 1:
                del shadows[index]
                drop = manager.drop_table if name == "drop" else manager.abandon_table
                drop(shadow.table)
        except OutOfBlocksError:
            assert name == "append"
        manager.check_integrity()
        for tier in manager.tiers:
            assert tier.committed_bytes <= tier.budget.peak_bytes <= tier.budget.limit_bytes
        for other in shadows:
            other.check(scan)
    for shadow in shadows:
        shadow.drop()
    manager.check_integrity()
    assert not any(tier.used_slots for tier in manager.tiers[1:])
    assert manager.device_tier.used_slots <= manager.num_staging_slots
    manager.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=STEPS,
    batch=st.integers(1, 2),
    num_layers=st.integers(1, 3),
    device_blocks=st.integers(3, 30),
    disk_blocks=st.sampled_from([0, 2, 5, 1000]),
    staging=st.integers(2, 7),
)
def test_random_walk_over_small_budgets(
    tmp_path, steps, batch, num_layers, device_blocks, disk_blocks, staging
):
    walk(make_manager(tmp_path, device_blocks, disk_blocks, staging), steps, batch, num_layers)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=STEPS,
    faulty_calls=st.sets(st.integers(0, 30), max_size=8),
    call=st.sampled_from(["read", "write"]),
)
def test_random_walk_over_a_disk_that_fails_now_and_then(tmp_path, steps, faulty_calls, call):
    """A failed transfer is told; nothing else than the one call is lost by it."""
    manager = make_manager(tmp_path, 9, staging=3, faulty=True)
    disk = manager.tiers[1]
    for number in faulty_calls:
        disk.file.plan[call, number] = faults.fails_with(errno.EIO)
    shadows = shadowed_layers(manager, 2)
    for name, which, amount in steps:
        shadow = shadows[which % 2]
        try:
            if name in ("append", "fork", "drop", "abandon"):
                shadow.append(amount)
            elif name == "truncate":
                shadow.truncate(max(0, shadow.table.num_tokens - amount))
            else:
                shadow.check()
        except TierIOError:
            pass
        manager.check_integrity()
    disk.heal()
    for shadow in shadows:
        shadow.check()
    manager.close()


def test_full_tiers_refuse_before_anything_changed(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 3, disk_blocks=4)
    layer = Shadowed.new(manager)
    layer.append(6 * BLOCK_TOKENS)
    settle(manager)
    before, used = state(manager), sizes(manager)
    with pytest.raises(OutOfBlocksError, match=r"no room for 2 more blocks .*disk: \d of 4"):
        layer.append(2 * BLOCK_TOKENS)
    assert (state(manager), sizes(manager)) == (before, used)
    layer.check()
    layer.append(BLOCK_TOKENS)  # what fits goes in: 3 on the device and 4 on disk
    layer.check()


def test_without_a_disk_the_message_says_what_would_help(tmp_path):
    manager = make_manager(tmp_path, device_blocks=3, disk_blocks=0)
    layer = Shadowed.new(manager)
    layer.append(3 * BLOCK_TOKENS)
    with pytest.raises(OutOfBlocksError, match="raise device_bytes or allow disk_bytes"):
        layer.append(1)
    layer.check()


def test_when_the_disk_is_full_blocks_that_have_a_copy_there_make_room(tmp_path):
    """Also where another layer, which has no such block, is as full."""
    manager = make_manager(tmp_path, device_blocks=2 + 6, disk_blocks=2)
    first, second = layers = shadowed_layers(manager, 2)
    first.append(2 * BLOCK_TOKENS)
    second.append(3 * BLOCK_TOKENS)
    first.append(BLOCK_TOKENS)
    settle(manager)
    assert [placement(layer.table) for layer in layers] == ["bDD", "bDD"]
    assert manager.tiers[1].num_free() == 0  # no block can be stored any more
    first.append(BLOCK_TOKENS)
    assert [placement(layer.table) for layer in layers] == ["dDDD", "bDD"]
    first.append(BLOCK_TOKENS)
    assert [placement(layer.table) for layer in layers] == ["dDDDD", "dDD"]
    with pytest.raises(OutOfBlocksError):
        first.append(BLOCK_TOKENS)
    for layer in layers:
        layer.check()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("staging", [2, 16])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_smallest_device_that_works_is_the_one_the_error_names(
    tmp_path, batch, staging, num_layers
):
    manager = make_manager(tmp_path, 1, staging=staging, expected_tables=num_layers)
    with pytest.raises(OutOfBlocksError) as error:
        Shadowed.new(manager, 0, batch).append(1)
    smallest = num_layers * batch + 2 * batch
    assert f"smallest device_bytes that works is {smallest * BLOCK_BYTES} " in str(error.value)

    one_less = make_manager(tmp_path, smallest - 1, staging=staging, expected_tables=num_layers)
    with pytest.raises(OutOfBlocksError, match=f"works is {smallest * BLOCK_BYTES} "):
        Shadowed.new(one_less, 0, batch).append(1)

    enough = make_manager(tmp_path, smallest, staging=staging, expected_tables=num_layers)
    layers = shadowed_layers(enough, num_layers, batch)
    for _ in range(3 * BLOCK_TOKENS + 1):
        for layer in layers:
            layer.append(1)
            layer.check([other.table for other in layers])
    enough.check_integrity()


def test_more_rows_get_more_staging_or_a_clear_refusal(tmp_path):
    """Rows that shared a block need one each once they are written."""
    manager = make_manager(tmp_path, device_blocks=8)
    layer = Shadowed.new(manager, batch=1)
    layer.append(3 * BLOCK_TOKENS + 1)
    layer.select_rows([0, 0])
    layer.append(2 * BLOCK_TOKENS)
    assert manager.num_staging_slots == 4
    layer.check()
    layer.select_rows([0, 1, 0])
    before = sizes(manager)
    with pytest.raises(OutOfBlocksError, match=r"3 filling blocks .* 6 staging blocks"):
        layer.append(1)
    assert sizes(manager) == before
    assert manager.num_staging_slots == 4
    layer.check()
    manager.check_integrity()


def test_rows_made_by_copying_fit_through_staging_when_another_table_demotes_them(tmp_path):
    manager = make_manager(tmp_path, device_blocks=20)
    wide = Shadowed.new(manager, 0, batch=1)
    wide.append(BLOCK_TOKENS - 1)
    wide.select_rows([0] * 6)
    wide.append(1)  # six different full blocks, and no column was added
    narrow = Shadowed.new(manager, 0, batch=1)
    narrow.append(30 * BLOCK_TOKENS)
    assert placement(wide.table) == "d"
    wide.check()
    narrow.check()


def test_rows_that_share_a_filling_block_diverge(tmp_path):
    manager = make_manager(tmp_path, device_blocks=20)
    layer = Shadowed.new(manager, batch=2)
    layer.append(6)
    layer.select_rows([1, 1, 0])
    assert manager.device_tier.used_slots == 4
    layer.append(1)
    assert manager.device_tier.used_slots == 5
    layer.check()
    assert not torch.equal(layer.keys[0], layer.keys[1])


def test_cropping_into_a_stored_block_never_brings_its_old_tokens_back(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 2)
    layer = Shadowed.new(manager)
    layer.append(8 * BLOCK_TOKENS + 2)
    assert placement(layer.table)[:6] == "dddddd"
    layer.truncate(4 * BLOCK_TOKENS + 1)  # into the fifth block, whose four tokens are on disk
    layer.check()
    layer.append(2)
    layer.check()
    assert not layer.table.rows[0][4].is_stored
    layer.append(9 * BLOCK_TOKENS)  # push it down again
    assert placement(layer.table)[4] == "d"
    layer.check()


def test_cropping_a_fork_leaves_the_full_block_of_the_other(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 4)
    layer = Shadowed.new(manager)
    layer.append(6 * BLOCK_TOKENS)
    fork = layer.fork()
    fork.truncate(2 * BLOCK_TOKENS - 1)
    fork.append(1)
    layer.check()
    fork.check()
    assert layer.table.rows[0][0] is fork.table.rows[0][0]
    assert layer.table.rows[0][1] is not fork.table.rows[0][1]


def test_a_table_abandoned_by_a_finalizer_is_dropped_by_the_next_call(tmp_path):
    manager = make_manager(tmp_path, device_blocks=20)
    layer, other = shadowed_layers(manager, 2)
    layer.append(3 * BLOCK_TOKENS)
    other.append(1)
    with manager.lock:  # in the middle of something, from any thread
        thread = threading.Thread(target=manager.abandon_table, args=(layer.table,))
        thread.start()
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert manager.device_tier.used_slots == 4
    other.append(1)
    assert manager.device_tier.used_slots == 1
    manager.check_integrity()


def test_a_dropped_table_is_neither_read_nor_written(tmp_path):
    manager = make_manager(tmp_path, device_blocks=20)
    layer = Shadowed.new(manager)
    layer.append(3)
    layer.drop()
    with pytest.raises(ClosedCacheError, match="is gone"):
        next(chunks(manager, layer.table, []))
    with pytest.raises(ClosedCacheError, match="is gone"):
        layer.append(1)


def test_a_stream_of_a_prefix_reads_no_block_behind_it(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 2)
    layer = Shadowed.new(manager)
    layer.append(8 * BLOCK_TOKENS)
    prefix = list(chunks(manager, layer.table, [], num_tokens=2 * BLOCK_TOKENS + 1))
    assert [chunk.first for chunk in prefix] == [0, 1, 2]
    assert list(chunks(manager, layer.table, [], num_tokens=0)) == []


def failing_layer(folder, **sizes) -> tuple[Shadowed, object]:
    manager = make_manager(folder, faulty=True, **sizes)
    return Shadowed.new(manager), manager.tiers[1]


def test_a_store_that_fails_is_told_where_room_is_needed_and_the_tokens_stay(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 4)
    disk.break_every("write", faults.fails_with(errno.EIO))
    layer.append(4 * BLOCK_TOKENS)
    with pytest.raises(TierIOError, match="cannot store record"):
        layer.append(1)
    layer.manager.check_integrity()
    layer.check()
    assert placement(layer.table) == "DDDD"
    disk.heal()
    layer.append(3 * BLOCK_TOKENS)
    layer.check()
    layer.manager.check_integrity()


def test_an_append_that_fails_half_way_is_rolled_back(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 4)
    layer.append(2 * BLOCK_TOKENS + 3)
    disk.file.plan["write", 3] = faults.fails_with(errno.EIO)
    with pytest.raises(TierIOError):
        layer.append(20 * BLOCK_TOKENS)
    assert layer.table.num_tokens == 2 * BLOCK_TOKENS + 3
    layer.manager.check_integrity()
    layer.check()
    layer.append(20 * BLOCK_TOKENS)
    layer.check()


def test_failed_stores_are_tried_again_oldest_first(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 4)
    disk.break_every("write", faults.fails_with(errno.EIO))
    layer.append(4 * BLOCK_TOKENS)
    with pytest.raises(TierIOError):
        layer.append(1)
    disk.heal()
    layer.append(1)
    assert placement(layer.table) == "dDDDD"


def test_a_load_that_fails_is_told_and_the_next_one_succeeds(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 2)
    layer.append(6 * BLOCK_TOKENS)
    settle(layer.manager)
    disk.break_every("read", faults.fails_with(errno.EIO))
    with pytest.raises(TierIOError, match="cannot load record"):
        layer.check()
    layer.manager.check_integrity()
    disk.heal()
    layer.check()
    layer.append(5)
    layer.check()


def test_a_flipped_bit_on_disk_is_never_attended(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 2)
    layer.append(6 * BLOCK_TOKENS)
    disk.break_every("read", faults.bit_flip)
    with pytest.raises(TierIOError, match="is not what was stored"):
        layer.check()


def test_a_failed_promotion_leaves_the_block_below(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 2)
    layer.append(6 * BLOCK_TOKENS)
    layer.truncate(BLOCK_TOKENS + 2)
    disk.break_every("read", faults.fails_with(errno.EIO))
    with pytest.raises(TierIOError):
        layer.append(1)
    layer.manager.check_integrity()
    disk.heal()
    layer.check()
    layer.append(1)
    layer.check()


def test_tokens_of_another_shape_leave_the_table_as_it_was(tmp_path):
    manager = make_manager(tmp_path, device_blocks=10)
    layer = Shadowed.new(manager)
    layer.append(5)
    keys, values = new_tokens(1, 9)
    with pytest.raises(ValueError, match="values"):
        manager.append(layer.table, keys, values[..., :3])
    manager.check_integrity()
    layer.check()


def test_forks_in_two_threads_take_turns_by_the_lock(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 6)
    layer = Shadowed.new(manager)
    layer.append(5 * BLOCK_TOKENS + 1)
    forks = [layer.fork(), layer.fork()]
    errors = []

    def decode(fork: Shadowed) -> None:
        try:
            for _ in range(30):
                with manager.lock:
                    fork.append(1)
                with manager.lock:
                    fork.check()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=decode, args=(fork,)) for fork in forks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    for shadow in (layer, *forks):
        shadow.check()
    manager.check_integrity()


def test_close_is_idempotent_and_gives_everything_back(tmp_path):
    before = Footprint.now()
    manager = make_manager(tmp_path, device_blocks=2 + 2)
    layer = Shadowed.new(manager)
    layer.append(9 * BLOCK_TOKENS)
    layer.check()
    manager.close()
    manager.close()
    assert [tier.budget.used_bytes for tier in manager.tiers] == [0, 0]
    assert Footprint.now() == before


def test_a_closed_manager_refuses_to_work_and_lets_tables_go(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 2)
    layer = Shadowed.new(manager)
    layer.append(9)
    manager.close()
    with pytest.raises(ClosedCacheError, match="make a new TieredCache"):
        layer.append(1)
    with pytest.raises(ClosedCacheError):
        next(chunks(manager, layer.table, []))
    with pytest.raises(ClosedCacheError):
        manager.new_table(1, 1)
    manager.drop_table(layer.table)
    manager.drop_table(layer.table)


def test_close_does_not_wait_for_what_is_queued(tmp_path):
    layer, disk = failing_layer(tmp_path, device_blocks=2 + 20)
    disk.break_every("write", faults.slow)
    layer.append(30 * BLOCK_TOKENS)
    layer.manager.close()
    assert all(store.is_ready() for block in layer.table.blocks() for store in block.stores)


def test_bfloat16_blocks_of_odd_head_sizes_come_back_whole(tmp_path):
    layout = BlockLayout(3, 20, 12, BLOCK_TOKENS, torch.bfloat16)
    manager = make_manager(tmp_path, device_blocks=2 + 2, layout=layout)
    table = manager.new_table(0, 1)
    keys = torch.randn(1, 3, 37, 20).bfloat16()
    values = torch.randn(1, 3, 37, 12).bfloat16()
    manager.append(table, keys, values)
    got = [
        (layout.keys(manager.device_tier.slab)[chunk.slots[0].long()].transpose(0, 1).flatten(1, 2))
        for chunk in chunks(manager, table, [table])
    ]
    assert torch.equal(torch.cat(got, 1)[:, :37], keys[0])
