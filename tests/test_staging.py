"""The ring of staging slots: what it loads, when, and what it holds of the device."""

import errno

import pytest
from support import LAYOUT, RecordingDisk, Shadowed, chunks, make_manager, placement
from tiers import faulty_file as faults

from hf_tiered_cache.blocks.block_manager import KVBlock
from hf_tiered_cache.blocks.staging import StagingRing
from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.observe.metrics import Counters
from hf_tiered_cache.tiers import Budget, DeviceTier


class Ring:
    """A stream over a disk with `num_blocks` stored blocks; block `i` holds bytes of value `i`."""

    def __init__(self, folder, num_blocks: int, num_slots: int, faulty: bool = False) -> None:
        size = LAYOUT.num_bytes
        self.device = DeviceTier(size, Budget("device", num_slots * size))
        knobs = {"open_file": faults.FaultyFile} if faulty else {}
        self.disk = RecordingDisk(
            size, Budget("disk", num_blocks * size), folder, io="buffered", **knobs
        )
        source = DeviceTier(size, Budget("source", size))
        data = source.block(source.allocate())
        self.blocks = []
        for index in range(num_blocks):
            block = KVBlock(layer=0, index=index, num_tiers=2)
            block.slots = [None, self.disk.allocate()]
            data.fill_(index)
            self.disk.write([block.slots[1]], [data]).wait()
            self.blocks.append(block)
        self.counters = Counters()
        self.stream = StagingRing([self.device, self.disk], num_slots, self.counters)

    def load(self, *indices: int) -> None:
        """Load blocks and check that their bytes arrived."""
        slots = self.stream.load([self.blocks[index] for index in indices])
        for index, slot in zip(indices, slots, strict=True):
            assert self.device.block(slot).eq(index).all()

    def release(self, *indices: int) -> None:
        self.stream.release([self.blocks[index] for index in indices])

    def prefetch(self, *indices: int) -> None:
        self.stream.prefetch([self.blocks[index] for index in indices])


@pytest.fixture
def ring(tmp_path):
    return Ring(tmp_path, num_blocks=10, num_slots=4)


def test_neighbouring_records_are_read_in_one_call(ring):
    ring.load(2, 3, 4)
    assert ring.disk.reads == [[2, 3, 4]]
    assert (ring.counters.loads, ring.counters.loaded_bytes) == (3, 3 * LAYOUT.num_bytes)


def test_a_prefetched_block_is_not_read_again(ring):
    ring.prefetch(0, 1, 2)
    ring.load(0)
    ring.load(1, 2)
    assert ring.disk.read_slots == [0, 1, 2]


def test_prefetch_fills_the_free_slots_and_no_more(ring):
    ring.load(0)
    ring.prefetch(1, 2, 3, 4, 5)
    assert ring.disk.read_slots == [0, 1, 2, 3]
    ring.prefetch(4, 5)
    assert ring.disk.read_slots == [0, 1, 2, 3]
    ring.release(0)
    ring.prefetch(1, 2, 3, 4, 5)
    assert ring.disk.read_slots == [0, 1, 2, 3, 4]


def test_what_is_furthest_ahead_gives_way_to_what_is_needed_now(ring):
    ring.prefetch(1, 2, 3, 4)
    ring.load(9)
    ring.load(1, 2, 3)
    assert ring.disk.read_slots == [1, 2, 3, 4, 9]  # only block 4 was given up


def test_a_block_that_several_tables_share_is_staged_once(ring):
    ring.prefetch(0, 1, 0, 1, 2)
    assert ring.disk.read_slots == [0, 1, 2]
    ring.load(0, 1)
    ring.release(0, 1)
    assert ring.stream.num_taken == ring.device.used_slots == 3


def test_a_full_ring_of_wanted_blocks_is_loaded_in_place(ring):
    ring.prefetch(5, 6, 7, 8)
    ring.load(1, 5, 2, 6)
    assert sorted(ring.disk.read_slots) == [1, 2, 5, 6, 7, 8]


def test_staging_never_takes_more_slots_than_it_may(ring):
    for first in range(0, 8, 2):
        ring.load(first, first + 1)
        ring.prefetch(*range(first + 2, 10))
        assert ring.device.used_slots == ring.stream.num_taken <= 4
        ring.release(first, first + 1)
    assert ring.stream.num_reserved == 0


def test_a_smaller_ring_gives_back_what_lies_furthest_ahead(ring):
    ring.prefetch(0, 1, 2, 3)
    ring.stream.resize(2)
    assert (ring.device.used_slots, ring.stream.num_taken) == (2, 2)
    ring.load(0, 1)
    assert ring.disk.read_slots == [0, 1, 2, 3]
    ring.stream.resize(4)
    ring.load(2, 3)
    assert ring.device.used_slots == 4


def test_a_failed_load_is_told_once_and_tried_again_by_the_next(tmp_path):
    ring = Ring(tmp_path, num_blocks=4, num_slots=4, faulty=True)
    ring.disk.break_every("read", faults.fails_with(errno.EIO), calls=1)
    with pytest.raises(TierIOError, match="cannot load"):
        ring.load(0, 1)
    ring.load(0, 1)
    assert ring.stream.num_taken == 2


def test_a_prefetch_that_failed_is_tried_again_when_its_block_is_needed(tmp_path):
    ring = Ring(tmp_path, num_blocks=4, num_slots=4, faulty=True)
    ring.disk.break_every("read", faults.bit_flip, calls=1)
    ring.prefetch(0, 1)
    ring.load(2)
    ring.load(0)
    ring.disk.break_every("read", faults.bit_flip)
    ring.prefetch(3)
    with pytest.raises(TierIOError, match="not what was stored"):
        ring.load(3)


def test_discarding_waits_for_the_load_and_frees_the_slot(tmp_path):
    ring = Ring(tmp_path, num_blocks=4, num_slots=2, faulty=True)
    ring.disk.break_every("read", faults.slow)
    ring.prefetch(0, 1)
    ring.stream.discard(ring.blocks[0])
    ring.stream.discard(ring.blocks[0])
    ring.load(3)
    assert ring.stream.num_taken == 2


def layers(folder, num_layers: int, **sizes) -> tuple[list[Shadowed], RecordingDisk]:
    """Layers of 9 tokens of which the first two blocks are cold, and their disk."""
    manager = make_manager(folder, **sizes)
    shadows = [Shadowed.new(manager, layer) for layer in range(num_layers)]
    for shadow in shadows:
        shadow.append(9)
    manager.stores.make_room(manager.device_tier.num_free() + 2 * num_layers - sizes["staging"])
    assert [placement(shadow.table) for shadow in shadows] == ["ddD"] * num_layers
    disk = manager.tiers[1]
    disk.reads.clear()
    return shadows, disk


def records(shadow: Shadowed) -> list[int]:
    """The records of a layer's cold blocks."""
    return [block.slots[1] for block in shadow.table.rows[0] if not block.is_resident]


def test_loads_run_ahead_into_the_next_layers(tmp_path):
    shadows, disk = layers(tmp_path, num_layers=2, device_blocks=20, staging=3)
    scan = [shadow.table for shadow in shadows]
    stream = chunks(shadows[0].manager, scan[0], scan)
    next(stream)
    assert disk.read_slots == records(shadows[0])[:1]
    next(stream)  # the first block was attended: all three slots are free for what comes next
    wanted = [slot for shadow in shadows for slot in records(shadow)]
    assert disk.read_slots == wanted
    list(stream)
    assert disk.read_slots == [*wanted, *wanted[:1]]  # round again: the next token


def test_a_forward_over_a_ring_that_holds_all_reads_every_block_once_per_token(tmp_path):
    shadows, disk = layers(tmp_path, num_layers=3, device_blocks=20, staging=6)
    scan = [shadow.table for shadow in shadows]
    wanted = [slot for shadow in shadows for slot in records(shadow)]
    for _token in range(3):
        for shadow in shadows:
            shadow.check(scan)
    assert disk.read_slots == wanted * 4  # the fourth token's loads are under way already


def test_loads_run_ahead_across_the_token_boundary(tmp_path):
    shadows, disk = layers(tmp_path, num_layers=2, device_blocks=12, staging=2)
    scan = [shadow.table for shadow in shadows]
    for shadow in shadows:
        shadow.check(scan)
    first = records(shadows[0])
    assert disk.read_slots[-2:] == first  # the next token's first layer, before it was asked for
    num_reads = len(disk.read_slots)
    stream = chunks(shadows[0].manager, scan[0], scan)
    next(stream)
    assert len(disk.read_slots) == num_reads
    stream.close()


def test_an_abandoned_stream_leaves_the_ring_usable(tmp_path):
    shadows, _ = layers(tmp_path, num_layers=2, device_blocks=12, staging=2)
    for shadow in [*shadows, *shadows]:
        stream = chunks(shadow.manager, shadow.table, [shadow.table])
        next(stream)
        stream.close()
        shadow.manager.check_integrity()
    for shadow in shadows:
        shadow.check()


# --- a device that lags behind -------------------------------------------------------------------


class Clock:
    """A lane that notes which moments loads were told to come after."""

    def __init__(self) -> None:
        self.now = 0
        self.held: list[int] = []

    def mark(self):
        moment = self.now

        class Mark:
            @staticmethod
            def hold_loads() -> None:
                self.held.append(moment)

        return Mark

    def settle(self) -> None:
        pass


@pytest.fixture
def lagging(ring):
    ring.device.lane = clock = Clock()
    return ring, clock


def test_a_slot_that_was_no_staging_slot_is_filled_behind_all_the_device_was_given(lagging):
    ring, clock = lagging
    clock.now = 7
    ring.load(0, 1)
    assert clock.held == [7]


def test_a_staging_slot_is_filled_behind_the_attention_of_what_was_in_it(lagging):
    ring, clock = lagging
    ring.load(0, 1, 2, 3)
    for clock.now, block in ((1, 0), (2, 1)):
        ring.release(block)
    clock.now = 9
    clock.held.clear()
    ring.prefetch(4)
    assert clock.held == [2]
    ring.prefetch(5)
    assert clock.held == [2, 1]


def test_a_slot_that_was_given_back_meanwhile_is_a_new_one(lagging):
    ring, clock = lagging
    ring.load(0, 1)
    clock.now = 1
    ring.release(0, 1)
    ring.stream.resize(0)
    ring.stream.resize(2)
    clock.now = 5
    clock.held.clear()
    ring.load(2)
    assert clock.held == [5]


def test_all_that_is_staged_can_be_given_up(ring):
    ring.prefetch(0, 1, 2)
    ring.stream.clear()
    ring.load(0)
    assert ring.disk.read_slots == [0, 1, 2, 0]
    assert ring.stream.num_taken == 3
