"""A chain of three rungs and more: what lies where, hard caps, late and failing links between."""

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    LAYOUT,
    Footprint,
    Shadowed,
    addresses,
    chunks,
    make_manager,
    settle,
)
from test_offload_manager import STEPS, shadowed_layers, sizes, state, walk
from tiers import faulty_file as faults
from tiers.late_tier import LateTier, Link

from hf_tiered_cache.blocks.offload_manager import OffloadManager
from hf_tiered_cache.errors import OutOfBlocksError, TierIOError
from hf_tiered_cache.tiers import Budget, DeviceTier, HostTier

IN_TMP_PATH = [HealthCheck.function_scoped_fixture]


def late_manager(link: Link, *num_blocks: int, staging: int = 2) -> OffloadManager:
    """A manager over a device and any number of late tiers on one link."""
    device = DeviceTier(BLOCK_BYTES, Budget("device", num_blocks[0] * BLOCK_BYTES))
    device.poison = True
    lower = [
        LateTier(BLOCK_BYTES, Budget(f"rung {rung}", count * BLOCK_BYTES), link)
        for rung, count in enumerate(num_blocks[1:], 1)
    ]
    return OffloadManager(LAYOUT, [device, *lower], staging)


def highest(table) -> str:
    """The letter of each block's highest rung."""
    return "".join(word[0] for word in addresses(table).split())


# --- placement by age ----------------------------------------------------------------------------


def test_blocks_go_down_rung_by_rung_the_oldest_lowest(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 4, host_blocks=3)
    layer = Shadowed.new(manager)
    seen = []
    for _ in range(10):
        layer.append(BLOCK_TOKENS)
        settle(manager)
        manager.check_integrity()
        seen.append(addresses(layer.table))
    assert seen == [
        "D",
        "D D",
        "D D D",
        "Dh D D D",  # the device is full: the oldest is stored before its room is needed
        "h Dh D D D",
        "hd h Dh D D D",  # the host is full: so is its oldest
        "d hd h Dh D D D",
        "d d hd h Dh D D D",
        "d d d hd h Dh D D D",
        "d d d d hd h Dh D D D",
    ]
    layer.check()


def test_every_layer_keeps_the_same_share_of_every_rung(tmp_path):
    manager = make_manager(tmp_path, device_blocks=3 * 4 + 2, host_blocks=3 * 2)
    layers = shadowed_layers(manager, 3)
    for _ in range(12 * BLOCK_TOKENS):
        for layer in layers:
            layer.append(1)
            manager.check_integrity()
    settle(manager)
    # Of the six on the host three are there ahead of need, while they are on the device as well.
    assert [highest(layer.table) for layer in layers] == ["dddddddhDDDD"] * 3
    for layer in layers:
        layer.check()


def test_a_block_is_stored_once_on_each_rung_and_never_goes_up_for_it():
    link = Link(speed=1)
    manager = late_manager(link, 2 + 3, 4, 1000)
    layer = Shadowed.new(manager)
    for _ in range(40):
        layer.append(2)
        layer.check()
    _, host, disk = manager.tiers
    assert host.num_writes <= 18  # 20 blocks, 3 of them on the device, and one stored ahead
    assert disk.num_writes <= 15  # as many less 4, and one ahead
    assert manager.counters.stores == host.num_writes + disk.num_writes
    assert manager.counters.loads == host.num_reads + disk.num_reads


def test_loads_come_from_the_highest_rung(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 2, host_blocks=100)
    layer = Shadowed.new(manager)
    layer.append(10 * BLOCK_TOKENS)
    layer.check()
    assert manager.counters.loads > 0
    assert manager.tiers[2].reads == manager.tiers[2].writes == []


def test_room_is_made_on_the_host_before_the_device_needs_it(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 3, host_blocks=3)
    layer = Shadowed.new(manager)
    for _ in range(30 * BLOCK_TOKENS):
        layer.append(1)
        if layer.table.num_blocks > 7:
            assert manager.tiers[1].num_free() + manager.blocks.num_clean_on(1) > 0
        settle(manager)
    assert manager.counters.store_wait_seconds == 0
    layer.check()


def test_a_rung_that_another_manager_filled_is_passed_by(tmp_path):
    """Budgets are shared: this manager's blocks go to disk though it has no slot on the host."""
    first = make_manager(tmp_path, device_blocks=2 + 3, host_blocks=3)
    host = first.tiers[1].budget
    full = Shadowed.new(first)
    full.append(7 * BLOCK_TOKENS)
    assert host.free_bytes == 0
    second = make_manager(tmp_path, device_blocks=2 + 3)
    tiers = [second.tiers[0], HostTier(BLOCK_BYTES, host), second.tiers[1]]
    second = OffloadManager(LAYOUT, tiers, 2)
    layer = Shadowed.new(second)
    layer.append(9 * BLOCK_TOKENS)
    assert highest(layer.table) == "ddddddDDD"
    for one in (full, layer):
        one.check()
        one.manager.check_integrity()


# --- hard caps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("host_blocks", [1, 2, 5])
@pytest.mark.parametrize("disk_blocks", [0, 1, 4])
def test_all_rungs_are_filled_before_a_clear_refusal(
    tmp_path, num_layers, host_blocks, disk_blocks
):
    device_blocks = 2 + 2 * num_layers
    manager = make_manager(tmp_path, device_blocks, disk_blocks, host_blocks=host_blocks)
    layers = shadowed_layers(manager, num_layers)
    num_fitting = device_blocks - 2 + host_blocks + disk_blocks
    for number in range(num_fitting):
        layers[number % num_layers].append(BLOCK_TOKENS)
    settle(manager)
    before, used = state(manager), sizes(manager)
    with pytest.raises(OutOfBlocksError, match=rf"host: \d of {host_blocks} blocks") as error:
        layers[num_fitting % num_layers].append(1)
    assert (state(manager), sizes(manager)) == (before, used)
    knobs = "disk_bytes or host_bytes or" if disk_blocks else "host_bytes or"
    assert f"raise {knobs} device_bytes" in str(error.value)
    manager.check_integrity()
    for layer in layers:
        layer.check()


def test_one_append_that_fits_exactly_goes_in_and_one_more_block_changes_nothing(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 3, disk_blocks=5, host_blocks=4)
    layer = Shadowed.new(manager)
    with pytest.raises(OutOfBlocksError, match="no room for 13 more blocks"):
        layer.append(13 * BLOCK_TOKENS)
    assert sizes(manager) == [(0, 5), (0, 4), (0, 5)]
    layer.append(12 * BLOCK_TOKENS)
    assert [free for _, free in sizes(manager)[1:]] == [0, 0]
    layer.check()


@settings(max_examples=60, deadline=None, suppress_health_check=IN_TMP_PATH)
@given(
    steps=STEPS,
    batch=st.integers(1, 2),
    num_layers=st.integers(1, 3),
    device_blocks=st.integers(3, 20),
    host_blocks=st.integers(1, 8),
    disk_blocks=st.sampled_from([0, 2, 5, 1000]),
    staging=st.integers(2, 7),
    cpu_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_random_walk_over_three_rungs(
    tmp_path, steps, batch, num_layers, device_blocks, host_blocks, disk_blocks, staging, cpu_share
):
    manager = make_manager(
        tmp_path, device_blocks, disk_blocks, staging, host_blocks=host_blocks, cpu_share=cpu_share
    )
    walk(manager, steps, batch, num_layers)


@settings(max_examples=60, deadline=None, suppress_health_check=IN_TMP_PATH)
@given(
    steps=STEPS,
    batch=st.integers(1, 2),
    num_layers=st.integers(1, 2),
    group_columns=st.integers(2, 4),
    room=st.integers(0, 20),
    host_blocks=st.sampled_from([0, 3]),
)
def test_random_walk_by_groups_of_columns(
    tmp_path, steps, batch, num_layers, group_columns, room, host_blocks
):
    least = 2 * group_columns * batch + num_layers * batch
    manager = make_manager(
        tmp_path, least + room, host_blocks=host_blocks, group_columns=group_columns
    )
    walk(manager, steps, batch, num_layers)


def test_a_group_that_is_partly_cold_comes_whole_and_loads_what_is_cold(tmp_path):
    manager = make_manager(tmp_path, device_blocks=8 + 6, staging=8, group_columns=4)
    layer = Shadowed.new(manager)
    layer.append(11 * BLOCK_TOKENS)
    settle(manager)
    assert [block.is_resident for block in layer.table.rows[0]] == [False] * 5 + [True] * 6
    borders = [
        (chunk.first, chunk.slots.shape[1]) for chunk in chunks(manager, layer.table, [layer.table])
    ]
    assert borders == [(0, 4), (4, 4), (8, 3)]
    assert manager.counters.cold_reads == 5
    layer.check()


# --- links that are late, out of order, broken ---------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    steps=STEPS,
    batch=st.integers(1, 2),
    num_layers=st.integers(1, 3),
    num_blocks=st.tuples(st.integers(3, 14), st.integers(1, 6), st.sampled_from([2, 5, 1000])),
    num_more=st.integers(0, 3),
    staging=st.integers(2, 7),
    seed=st.integers(0, 1000),
    speed=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_random_walk_over_late_links(
    steps, batch, num_layers, num_blocks, num_more, staging, seed, speed
):
    """Three rungs, or four: with speed 0 a transfer ends only when it is waited for."""
    sizes = [*num_blocks, num_more] if num_more else num_blocks
    manager = late_manager(Link(seed, speed), *sizes, staging=staging)
    walk(manager, steps, batch, num_layers)


@settings(max_examples=120, deadline=None)
@given(
    steps=STEPS,
    host_blocks=st.integers(1, 6),
    seed=st.integers(0, 1000),
    speed=st.sampled_from([0.0, 0.3, 1.0]),
    failure_share=st.sampled_from([0.05, 0.3]),
)
def test_random_walk_over_late_links_that_fail_now_and_then(
    steps, host_blocks, seed, speed, failure_share
):
    """A failed transfer is told; nothing else than the one call is lost by it."""
    link = Link(seed, speed, failure_share)
    manager = late_manager(link, 9, host_blocks, 1000, staging=3)
    shadows = shadowed_layers(manager, 2)
    for name, which, amount in steps:
        index = which % len(shadows)
        shadow = shadows[index]
        try:
            if name == "truncate":
                shadow.truncate(max(0, shadow.table.num_tokens - amount))
            elif name == "fork" and len(shadows) < 3:
                shadows.append(shadow.fork())
            elif name in ("drop", "abandon") and len(shadows) > 2:
                del shadows[index]
                manager.drop_table(shadow.table)
            elif name == "stream":
                shadow.check([other.table for other in shadows])
            else:
                shadow.append(amount)
        except (TierIOError, OutOfBlocksError):
            pass
        manager.check_integrity()
    link.failure_share = 0.0
    for shadow in shadows:
        shadow.check()
        shadow.drop()
    manager.check_integrity()
    assert not any(tier.used_slots for tier in manager.tiers[1:])
    manager.close()


def test_the_links_do_come_late_overtake_and_fail():
    """The walks above would prove nothing over links that do nothing of this."""
    link = Link(seed=3, speed=0.2)
    manager = late_manager(link, 2 + 6, 8, 1000, staging=2)
    layers = shadowed_layers(manager, 3)
    most_pending = 0
    for _ in range(12):
        for layer in layers:
            layer.append(BLOCK_TOKENS)
            layer.check([other.table for other in layers])
            most_pending = max(most_pending, len(link.pending))
    assert most_pending > 3
    assert link.num_overtakings > 20
    link.failure_share = 0.5
    with pytest.raises(TierIOError, match="the link broke"):
        layers[0].append(20 * BLOCK_TOKENS)
    assert link.num_failures > 0


def test_a_host_copy_stays_while_it_is_being_stored_below():
    link = Link(speed=0)  # nothing ends by itself
    manager = late_manager(link, 2 + 2, 2, 1000)
    layer = Shadowed.new(manager)
    for _ in range(12):
        layer.append(BLOCK_TOKENS)
        for block in layer.table.blocks():
            if not block.stores[2].is_ready():
                assert block.slots[1] is not None
        manager.check_integrity()
    layer.check()


def test_a_host_copy_that_is_being_loaded_may_be_dropped():
    """Its slot is written again only behind the load: the tier sees to that."""
    link = Link(speed=0)
    manager = late_manager(link, 2 + 4, 3, 1000, staging=2)
    layer = Shadowed.new(manager)
    layer.append(9 * BLOCK_TOKENS)
    stream = chunks(manager, layer.table, [layer.table])
    for _ in range(4):
        next(stream)  # loads of the next cold blocks are under way
    stream.close()
    layer.append(6 * BLOCK_TOKENS)
    layer.check()
    manager.check_integrity()


def test_a_full_host_over_a_disk_that_fails_says_so_and_keeps_the_tokens(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 3, host_blocks=2, faulty=True)
    disk = manager.tiers[2]
    disk.break_every("write", faults.fails_with(errno.EIO))
    layer = Shadowed.new(manager)
    layer.append(5 * BLOCK_TOKENS)  # what the device and the host hold
    with pytest.raises(TierIOError, match="cannot store record"):
        layer.append(1)
    manager.check_integrity()
    layer.check()
    disk.heal()
    layer.append(4 * BLOCK_TOKENS)
    assert highest(layer.table) == "ddddhhDDD"
    layer.check()


def test_a_slow_disk_below_the_host_only_costs_time(tmp_path):
    manager = make_manager(tmp_path, device_blocks=2 + 3, host_blocks=2, faulty=True)
    for kind in ("read", "write"):
        manager.tiers[2].break_every(kind, faults.slow)
    layer = Shadowed.new(manager)
    for _ in range(10):
        layer.append(BLOCK_TOKENS)
        layer.check()
    manager.check_integrity()


def test_close_gives_everything_back_and_waits_for_nothing(tmp_path):
    before = Footprint.now()
    manager = make_manager(tmp_path, device_blocks=2 + 2, host_blocks=4, faulty=True)
    manager.tiers[2].break_every("write", faults.slow)
    layer = Shadowed.new(manager)
    layer.append(20 * BLOCK_TOKENS)
    manager.close()
    manager.close()
    assert [tier.budget.used_bytes for tier in manager.tiers] == [0, 0, 0]
    assert Footprint.now() == before
