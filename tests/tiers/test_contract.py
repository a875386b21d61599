"""What every tier promises, over the registry: a new tier is tested by existing."""

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiers.late_lane import LateDevice, LateLane, RefusingPinning
from tiers.late_tier import LateTier, Link
from toy_codecs import Mirror
from toy_tiers import Drawer, Shelf

from hf_tiered_cache.errors import (
    BlockStateError,
    ClosedCacheError,
    ConfigError,
    TierIOError,
    UnsupportedInputError,
)
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers import Budget, DiskTier, HostTier, Surroundings, Tier
from hf_tiered_cache.tiers.device_side import BounceRing, DeviceSideTier, behind_lane

BLOCK = 8192
LAYOUT = BlockLayout(2, 16, 16, 64, torch.bfloat16)  # its blocks are as large


def from_budget(name: str):
    """Makes a tier as a cache does whose device is the CPU."""

    def make(block: int, budget: Budget, folder: Path) -> Tier:
        around = Surroundings(folder, "auto", 0, None, frozenset())
        return Tier.by_name(name).from_budget(block, budget, around)

    return make


OURS = [name for name, kind in Tier.registry.items() if kind.__module__.startswith("hf_tiered")]
FACTORIES = {name: from_budget(name) for name in [*OURS, Shelf.name, Drawer.name]}
VARIANTS = {
    **FACTORIES,
    "host late": lambda block, budget, _folder: LateTier(block, budget, Link(seed=1), False),
    "disk direct": lambda block, budget, folder: DiskTier(block, budget, folder, io="direct"),
    "disk buffered": lambda block, budget, folder: DiskTier(block, budget, folder, io="buffered"),
    "disk mixed": lambda block, budget, folder: DiskTier(
        block, budget, folder, page_cache_bytes=4 * block, num_threads=1
    ),
    "disk python": lambda block, budget, folder: DiskTier(
        block, budget, folder, io="direct", mover="python"
    ),
    "disk python mixed": lambda block, budget, folder: DiskTier(
        block, budget, folder, page_cache_bytes=4 * block, num_threads=1, mover="python"
    ),
    "disk encoded": lambda block, budget, folder: DiskTier.from_budget(
        block, budget, Surroundings(folder, "auto", 4 * block, None, frozenset(), Mirror(LAYOUT))
    ),
}


class EverythingOutside(LateLane):
    """Takes all memory but that of the tiers it serves for the device's."""

    def carries(self, block: torch.Tensor) -> bool:
        return True


def behind(tier: Tier, pinned_ranges: int = 0) -> DeviceSideTier:
    """A tier as a device sees it that lags behind, with bounce slots for three blocks."""
    memory = HostTier(BLOCK, Budget("bounce", 3 * BLOCK), pinning=RefusingPinning(pinned_ranges))
    return behind_lane(tier, EverythingOutside(LateDevice()), BounceRing(memory, 3))


VARIANTS |= {
    "host pinned, behind a lane": lambda block, budget, _folder: behind(
        HostTier(block, budget, pinning=RefusingPinning())
    ),
    "host pageable, behind a lane": lambda block, budget, _folder: behind(HostTier(block, budget)),
    "disk behind a lane": lambda block, budget, folder: behind(
        DiskTier(block, budget, folder, io="buffered")
    ),
}


@pytest.fixture(params=VARIANTS)
def make(request, tmp_path):
    """Makes the tier under test: `make(num_slots)`."""
    tiers = []

    def make_tier(num_slots: int, budget: Budget | None = None) -> Tier:
        budget = budget or Budget(request.param.split()[0], num_slots * BLOCK)
        tiers.append(VARIANTS[request.param](BLOCK, budget, tmp_path))
        return tiers[-1]

    yield make_tier
    for tier in tiers:
        tier.close()


def blocks(num_blocks: int, seed: int = 0) -> torch.Tensor:
    """uint8 [num_blocks, BLOCK], random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_blocks, BLOCK), dtype=torch.uint8, generator=generator)


def stored(tier: Tier, slots) -> torch.Tensor:
    out = torch.zeros(len(slots), BLOCK, dtype=torch.uint8)
    tier.read(slots, list(out)).wait()
    return out


def test_what_is_written_is_read(make):
    tier = make(10)
    slots = [tier.allocate() for _ in range(10)]
    data = blocks(10)
    tier.write(slots, list(data)).wait()
    assert torch.equal(stored(tier, slots), data)


def test_batches_of_any_order_and_size(make):
    tier = make(9)
    slots = [tier.allocate() for _ in range(9)]
    data = blocks(9)
    for part in ([8, 7], [0, 1, 2, 4], [6], [3, 5]):
        tier.write([slots[i] for i in part], [data[i] for i in part]).wait()
    order = [4, 4, 0, 8, 7, 1, 2, 3, 6, 5]
    assert torch.equal(stored(tier, [slots[i] for i in order]), data[order])


def test_an_empty_batch_is_done(make):
    tier = make(1)
    assert tier.read([], []).is_ready()
    assert tier.write([], []).is_ready()


def test_memory_need_not_be_aligned(make):
    tier = make(3)
    slots = [tier.allocate() for _ in range(3)]
    room = torch.zeros(3 * BLOCK + 1, dtype=torch.uint8)
    odd = [room[1 + i * BLOCK :][:BLOCK] for i in range(3)]
    data = blocks(3)
    for block, source in zip(odd, data, strict=True):
        block.copy_(source)
    tier.write(slots, odd).wait()
    room.zero_()
    tier.read(slots, odd).wait()
    assert torch.equal(torch.stack(odd), data)
    assert room[0] == 0


def test_slots_come_lowest_first(make):
    tier = make(6)
    assert [tier.allocate() for _ in range(4)] == [0, 1, 2, 3]
    for slot in (2, 0, 3):
        tier.free(slot)
    assert [tier.allocate() for _ in range(4)] == [0, 2, 3, 4]


def test_a_full_budget_gives_none_and_changes_nothing(make):
    tier = make(3)
    slots = [tier.allocate() for _ in range(3)]
    data = blocks(3)
    tier.write(slots, list(data)).wait()
    before = (tier.used_slots, tier.committed_bytes, tier.budget.used_bytes, tier.num_free())
    assert tier.allocate() is None
    assert tier.allocate() is None
    assert before == (
        tier.used_slots,
        tier.committed_bytes,
        tier.budget.used_bytes,
        tier.num_free(),
    )
    assert torch.equal(stored(tier, slots), data)
    tier.free(slots[1])
    assert tier.allocate() == slots[1]


def test_counts(make):
    tier = make(5)
    assert (tier.used_slots, tier.used_bytes, tier.num_free()) == (0, 0, 5)
    slots = [tier.allocate() for _ in range(4)]
    assert (tier.used_slots, tier.used_bytes, tier.num_free()) == (4, 4 * BLOCK, 1)
    tier.free(slots[0])
    assert (tier.used_slots, tier.used_bytes, tier.num_free()) == (3, 3 * BLOCK, 2)
    assert tier.committed_bytes == tier.budget.used_bytes == 4 * BLOCK


def test_a_budget_is_shared(make):
    budget = Budget("shared", 5 * BLOCK)
    one, other = make(0, budget), make(0, budget)
    taken = [one.allocate(), other.allocate(), one.allocate(), other.allocate(), one.allocate()]
    assert None not in taken
    assert one.allocate() is None
    assert other.allocate() is None
    assert budget.used_bytes == one.committed_bytes + other.committed_bytes == 5 * BLOCK
    one.close()
    assert budget.used_bytes == 2 * BLOCK
    assert other.allocate() is not None


def test_a_budget_of_less_than_a_block_holds_nothing(make):
    tier = make(0, Budget("small", BLOCK - 1))
    assert tier.num_free() == 0
    assert tier.allocate() is None


def test_double_free_and_unknown_slots_are_refused(make):
    tier = make(4)
    slot = tier.allocate()
    tier.free(slot)
    with pytest.raises(BlockStateError, match="slot 0 was freed"):
        tier.free(slot)
    for unknown in (2, 99, -1):
        with pytest.raises(BlockStateError, match=f"slot {unknown} "):
            tier.free(unknown)
    assert tier.num_free() == 4


def test_reading_or_writing_a_slot_that_is_not_allocated_is_refused(make):
    tier = make(4)
    good, freed = tier.allocate(), tier.allocate()
    data = blocks(2)
    tier.write([good, freed], list(data)).wait()
    tier.free(freed)
    for slots in ([good, freed], [good, 3]):
        with pytest.raises(BlockStateError):
            tier.read(slots, list(blocks(2)))
        with pytest.raises(BlockStateError):
            tier.write(slots, list(blocks(2, seed=1)))
    assert torch.equal(stored(tier, [good])[0], data[0])


def test_tensors_that_do_not_fit_are_refused_before_anything_happens(make):
    tier = make(2)
    slots = [tier.allocate(), tier.allocate()]
    data = blocks(2)
    tier.write(slots, list(data)).wait()
    for wrong in (torch.zeros(BLOCK), torch.zeros(1, dtype=torch.uint8)):
        with pytest.raises(UnsupportedInputError):
            tier.write(slots, [blocks(1, seed=5)[0], wrong])
        with pytest.raises(UnsupportedInputError):
            tier.read(slots, [torch.zeros(BLOCK, dtype=torch.uint8), wrong])
    with pytest.raises(UnsupportedInputError):
        tier.write(slots, list(blocks(1)))
    assert torch.equal(stored(tier, slots), data)


def test_slots_can_be_rewritten(make):
    tier = make(1)
    slot = tier.allocate()
    for seed in range(5):
        data = blocks(1, seed)
        tier.write([slot], list(data)).wait()
        assert torch.equal(stored(tier, [slot]), data)


def test_a_read_sees_the_write_begun_before_it(make):
    tier = make(8)
    slots = [tier.allocate() for _ in range(8)]
    for seed in range(20):
        data, out = blocks(8, seed), torch.zeros(8, BLOCK, dtype=torch.uint8)
        write = tier.write(slots, list(data))
        tier.read(slots[::-1], list(out)).wait()
        write.wait()
        assert torch.equal(out.flip(0), data)


def test_freeing_a_slot_does_not_disturb_its_transfers(make):
    tier = make(4)
    for seed in range(20):
        slots = [tier.allocate() for _ in range(4)]
        data, out = blocks(4, seed), torch.zeros(4, BLOCK, dtype=torch.uint8)
        write = tier.write(slots, list(data))
        read = tier.read(slots, list(out))
        for slot in slots:
            tier.free(slot)
        assert (tier.used_slots, tier.num_free()) == (0, 4)
        again = [tier.allocate() for _ in range(4)]
        assert sorted(again) == slots
        other = tier.write(again, list(blocks(4, seed + 100)))
        for transfer in (write, read, other):
            transfer.wait()
        assert torch.equal(out, data)
        assert torch.equal(stored(tier, again), blocks(4, seed + 100))
        for slot in again:
            tier.free(slot)


def test_nothing_works_after_close(make):
    tier = make(2)
    slot = tier.allocate()
    tier.close()
    tier.close()
    block = [torch.zeros(BLOCK, dtype=torch.uint8)]
    for verb in (
        tier.allocate,
        lambda: tier.free(slot),
        lambda: tier.read([slot], block),
        lambda: tier.write([slot], block),
        tier.drain,
        lambda: tier.keep_only([slot]),
    ):
        with pytest.raises(ClosedCacheError):
            verb()
    assert tier.budget.used_bytes == 0


def test_a_dropped_tier_gives_its_budget_back(make, tmp_path, request):
    budget = Budget("dropped", 4 * BLOCK)
    tier = VARIANTS[request.node.callspec.params["make"]](BLOCK, budget, tmp_path)
    slot = tier.allocate()
    tier.write([slot], list(blocks(1)))
    alive = weakref.ref(tier)
    del tier
    gc.collect()
    assert alive() is None
    assert budget.used_bytes == 0


def test_drain_waits_for_every_transfer_also_for_those_that_nobody_holds(make):
    tier = make(8)
    slots = [tier.allocate() for _ in range(8)]
    data, out = blocks(8), torch.zeros(8, BLOCK, dtype=torch.uint8)
    tier.write(slots, list(data))
    reads = [tier.read(slots, list(out)) for _ in range(3)]
    tier.drain()
    assert all(read.is_ready() for read in reads)
    assert torch.equal(out, data)
    tier.drain()
    tier.write(slots, list(data))  # no slot has a transfer under way


def test_keep_only_gives_back_all_other_slots(make):
    tier = make(6)
    slots = [tier.allocate() for _ in range(6)]
    data = blocks(6)
    tier.write(slots, list(data))
    tier.free(slots[4])
    tier.drain()
    for _ in range(2):  # it may be repeated
        tier.keep_only(iter([slots[1], slots[3]]))
        assert (tier.used_slots, tier.num_free()) == (2, 4)
        assert tier.committed_bytes == tier.budget.used_bytes == 6 * BLOCK
    assert torch.equal(stored(tier, [1, 3]), data[[1, 3]])
    with pytest.raises(BlockStateError):
        tier.free(0)
    assert [tier.allocate() for _ in range(5)] == [0, 2, 4, 5, None]


def test_keep_only_hands_out_again_what_was_freed(make):
    """An interrupted caller still names it. Its bytes are those, or poison, or refused."""
    tier = make(3)
    slots = [tier.allocate() for _ in range(3)]
    data = blocks(3)
    tier.write(slots, list(data)).wait()
    tier.free(slots[1])
    tier.drain()
    tier.keep_only(slots)
    assert (tier.used_slots, tier.num_free()) == (3, 0)
    with contextlib.suppress(TierIOError):
        found = stored(tier, [1])
        assert torch.equal(found, data[[1]]) or bool((found == 0xFF).all())
    tier.write([1], list(data[:1])).wait()
    assert torch.equal(stored(tier, slots), data[[0, 0, 2]])


def test_keep_only_refuses_a_slot_that_was_never_the_tier_s_and_changes_nothing(make):
    tier = make(3)
    slots = [tier.allocate() for _ in range(2)]
    for unknown in (99, -1):
        with pytest.raises(BlockStateError, match=f"slot {unknown} was never allocated"):
            tier.keep_only([slots[0], unknown])
        assert (tier.used_slots, tier.num_free()) == (2, 1)


@pytest.mark.parametrize("block_bytes", [0, -4096, 100, 4097])
@pytest.mark.parametrize("name", FACTORIES)
def test_block_bytes_must_be_whole_pages(name, block_bytes, tmp_path):
    with pytest.raises(ConfigError, match=f"block_bytes is {block_bytes}"):
        FACTORIES[name](block_bytes, Budget(name, 1 << 20), tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1000)), max_size=60))
def test_a_random_walk_against_a_dictionary(name, tmp_path, steps):
    """Six slots; allocate, free, write, read, wait in any order; content is told by its seed."""
    budget = Budget(name, 6 * BLOCK)
    tier = VARIANTS[name](BLOCK, budget, tmp_path)
    written: dict[int, int | None] = {}  # slot -> seed of its content
    writing = {}  # slot -> its write
    reads = []  # (transfer, out, seeds)
    try:
        for number, (verb, choice) in enumerate(steps):
            slot = sorted(written)[choice % len(written)] if written else None
            if verb == 0:
                slot = tier.allocate()
                assert (slot is None) == (len(written) == 6)
                if slot is not None:
                    assert slot not in written
                    written[slot] = None
            elif slot is None:
                continue
            elif verb == 1:
                tier.free(slot)
                del written[slot]
                writing.pop(slot, None)
            elif verb == 2:
                for transfer, _, _ in reads:
                    transfer.wait()  # a slot with a transfer under way may not be written
                if slot in writing:
                    writing[slot].wait()
                writing[slot] = tier.write([slot], list(blocks(1, number)))
                written[slot] = number
            elif verb == 3:
                slots = [s for s in written if written[s] is not None]
                out = torch.zeros(len(slots), BLOCK, dtype=torch.uint8)
                reads.append((tier.read(slots, list(out)), out, [written[s] for s in slots]))
            elif reads:
                check_read(*reads.pop(choice % len(reads)))
            assert tier.used_slots == len(written)
            assert tier.num_free() == 6 - len(written)
        for read in reads:
            check_read(*read)
    finally:
        tier.close()
    assert budget.used_bytes == 0


def check_read(transfer, out, seeds):
    transfer.wait()
    for block, seed in zip(out, seeds, strict=True):
        assert torch.equal(block, blocks(1, seed)[0])
