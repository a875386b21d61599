"""The host tier: memory got ahead of its use, within the budget, pinned where that works."""

import contextlib
import gc
import threading
import time
import weakref

import pytest
import torch
from support import Footprint
from tiers.test_device import resident_bytes

from hf_tiered_cache.devices.pinning import CUDA_HOST_REGISTER_PORTABLE, CudaPinning
from hf_tiered_cache.errors import ClosedCacheError, ConfigError
from hf_tiered_cache.tiers import Budget, HostTier
from hf_tiered_cache.tiers import host as host_module

MIB = 1024 * 1024


class FakePinning:
    """Remembers what was locked; refuses from the `refused_from`-th range on."""

    def __init__(self, refused_from: int = 1000) -> None:
        self.refused_from = refused_from
        self.ranges: dict[int, int] = {}
        self.num_asked = 0

    def register(self, address: int, num_bytes: int) -> bool:
        self.num_asked += 1
        if self.num_asked > self.refused_from:
            return False
        self.ranges[address] = num_bytes
        return True

    def unregister(self, address: int) -> None:
        del self.ranges[address]


@pytest.fixture
def make():
    """Makes a tier of `num_slots` blocks of 1 MiB in slabs of 8."""
    tiers = []

    def make_tier(num_slots: int, **knobs) -> HostTier:
        knobs = {"slab_bytes": 8 * MIB, **knobs}
        tiers.append(HostTier(MIB, Budget("host", num_slots * MIB), **knobs))
        return tiers[-1]

    yield make_tier
    for tier in tiers:
        tier.close()


def wait_for(condition) -> None:
    """Until it holds; the background may take a while."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_blocks_are_views_of_one_slab(make):
    tier = make(20)
    slots = [tier.allocate() for _ in range(20)]
    assert slots == list(range(20))
    tier.block(3).fill_(7)
    assert bool((tier.slab[3] == 7).all())
    assert tier.block(3).data_ptr() == tier.slab.data_ptr() + 3 * MIB
    assert tier.slab.data_ptr() % (2 * MIB) == 0


def test_memory_comes_slab_by_slab_ahead_of_its_use(make):
    """Slabs of 8 blocks: the second is got while the first is half used."""
    before = resident_bytes()
    tier = make(1000)
    assert (tier.committed_bytes, resident_bytes() - before < 4 * MIB) == (0, True)
    taken = [tier.allocate() for _ in range(4)]
    assert tier.committed_bytes == 8 * MIB
    wait_for(lambda: resident_bytes() - before >= 8 * MIB)
    taken.append(tier.allocate())
    assert tier.committed_bytes == 16 * MIB
    wait_for(lambda: resident_bytes() - before >= 16 * MIB)  # nobody wrote anything
    for _ in range(3):
        taken.append(tier.allocate())
    assert tier.committed_bytes == 16 * MIB
    assert resident_bytes() - before < 24 * MIB
    for slot in taken:  # freed slots keep their memory and are reused first
        tier.free(slot)
    assert [tier.allocate() for _ in range(8)] == taken
    assert tier.committed_bytes == 16 * MIB


def test_memory_is_never_more_than_the_budget(make):
    before = resident_bytes()
    tier = make(29)
    assert [tier.allocate() for _ in range(30)] == [*range(29), None]
    assert tier.budget.used_bytes == tier.budget.peak_bytes == 29 * MIB
    tier.slab.fill_(1)
    assert 29 * MIB <= resident_bytes() - before < 34 * MIB


def test_small_budgets_are_not_taken_ahead():
    """They may be shared: a slab is at most a sixteenth of the budget."""
    budget = Budget("host", 20 * MIB)
    one, other = HostTier(MIB, budget), HostTier(MIB, budget)
    for _ in range(10):
        assert one.allocate() is not None
        assert other.allocate() is not None
    assert one.allocate() is None
    one.close()
    assert other.allocate() == 10
    other.close()


def test_a_slot_is_handed_out_only_when_its_memory_is_there(make, monkeypatch):
    touched = []
    whole = host_module._touch

    def slow_touch(memory):
        time.sleep(0.02)
        whole(memory)
        touched.append(memory.data_ptr())

    monkeypatch.setattr(host_module, "_touch", slow_touch)
    tier = make(1000)
    for _ in range(40):
        slot = tier.allocate()
        slab = tier.block(slot - slot % 8).data_ptr()
        assert slab in touched
        tier.block(slot).fill_(slot)  # touching would set bytes back to zero
    for slot in range(40):
        assert bool((tier.block(slot) == slot).all())


def test_large_slabs_are_touched_in_pieces_by_several_threads(make, monkeypatch):
    pieces = []
    whole = host_module._touch
    monkeypatch.setattr(host_module, "PIECE_BYTES", 2 * MIB)
    monkeypatch.setattr(
        host_module, "_touch", lambda memory: (pieces.append(memory.numel()), whole(memory))
    )
    before = resident_bytes()
    tier = make(1000, slab_bytes=33 * MIB)
    tier.allocate()
    assert pieces == [2 * MIB] * 16 + [MIB]
    assert resident_bytes() - before >= 33 * MIB


def test_close_returns_memory_and_threads_even_while_a_view_is_alive(make):
    before, footprint = resident_bytes(), Footprint.now()
    tier = make(100)
    for _ in range(40):
        tier.block(tier.allocate()).fill_(1)
    view = tier.block(0)
    assert any("hf_tiered_cache-host" in thread.name for thread in threading.enumerate())
    tier.close()
    tier.close()
    assert resident_bytes() - before < 4 * MIB
    assert Footprint.now() == footprint
    assert tier.budget.used_bytes == 0
    assert not view.any()  # safe to read, what it showed is gone
    with pytest.raises(ClosedCacheError, match="the host tier is closed"):
        tier.block(0)


def test_a_dropped_tier_leaves_no_thread_no_memory_and_no_budget():
    before, footprint = resident_bytes(), Footprint.now()
    pinning = FakePinning()
    tier = HostTier(MIB, Budget("host", 400 * MIB), pinning=pinning, slab_bytes=8 * MIB)
    budget, alive = tier.budget, weakref.ref(tier)
    for _ in range(40):
        tier.block(tier.allocate()).fill_(1)
    del tier
    gc.collect()
    assert alive() is None
    assert Footprint.now() == footprint
    assert (budget.used_bytes, pinning.ranges) == (0, {})
    assert resident_bytes() - before < 4 * MIB


def test_closing_while_memory_is_being_got_waits_for_no_more_than_a_piece(make, monkeypatch):
    footprint = Footprint.now()
    monkeypatch.setattr(host_module, "PIECE_BYTES", MIB)
    tier = make(1000, slab_bytes=60 * MIB, pinning=FakePinning())
    tier.allocate()
    monkeypatch.setattr(host_module, "_touch", lambda _memory: time.sleep(0.05))
    while tier.committed_bytes == 60 * MIB:
        tier.allocate()
    start = time.monotonic()
    tier.close()
    assert time.monotonic() - start < 1  # 60 pieces take 3 seconds of work
    assert Footprint.now() == footprint
    assert tier._growth._pinning.ranges == {}


def test_a_failure_to_get_memory_is_told_and_no_slot_is_lost(make, monkeypatch):
    def fail(memory):
        raise MemoryError("no pages")

    monkeypatch.setattr(host_module, "_touch", fail)
    tier = make(10)
    with pytest.raises(OSError, match="cannot get memory for the host tier: MemoryError"):
        tier.allocate()
    assert tier.used_slots == 0


def test_slabs_are_pinned_whole_and_unlocked_at_close(make):
    pinning = FakePinning()
    tier = make(1000, pinning=pinning)
    for _ in range(12):
        tier.allocate()
    tier._growth.wait(16)
    assert list(pinning.ranges.values()) == [8 * MIB] * 2
    assert list(pinning.ranges) == [tier.block(0).data_ptr(), tier.block(8).data_ptr()]
    assert tier.where == "pinned"
    tier.close()
    assert pinning.ranges == {}


def test_memory_that_cannot_be_pinned_is_used_pageable_and_said_once(make, monkeypatch):
    said = []
    monkeypatch.setattr(host_module.logger, "warning_once", said.append)
    pinning = FakePinning(refused_from=1)
    tier = make(1000, pinning=pinning)
    for slot in range(30):
        assert tier.allocate() == slot
        tier.block(slot).fill_(slot)
    assert tier.where == "pageable: pinning failed"
    assert pinning.num_asked == 2  # once refused, not asked again
    assert len(said) == 1
    assert "8.0 MiB of host memory cannot be pinned" in said[0]
    tier.close()
    assert pinning.ranges == {}


def test_without_pinning_memory_is_pageable(make):
    tier = make(10)
    tier.allocate()
    assert tier.where == "pageable"


def test_cuda_registers_for_all_devices_and_tells_a_refusal(monkeypatch):
    calls = []

    class Runtime:
        """Of torch.cuda: 0 is success."""

        def cudaHostRegister(self, *arguments):  # noqa: N802
            calls.append(arguments)
            return 0 if len(calls) == 1 else 2

        def cudaHostUnregister(self, *arguments):  # noqa: N802
            calls.append(arguments)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    pinning = CudaPinning(torch.device("cuda", 0))
    assert pinning.register(4096, MIB)
    assert not pinning.register(8192, MIB)
    pinning.unregister(4096)
    flag = CUDA_HOST_REGISTER_PORTABLE
    assert calls == [(4096, MIB, flag), (8192, MIB, flag), (4096,)]


def test_poisoned_slots_read_as_nan(make):
    tier = make(2)
    slot = tier.allocate()
    tier.poison = True
    tier.free(slot)
    assert tier.slab[slot].view(torch.float32).isnan().all()


def test_a_tier_made_in_inference_mode_works_outside_of_it():
    with torch.inference_mode():
        tier = HostTier(4096, Budget("host", 4096 * 100))
        slot = tier.allocate()
    data = torch.full((4096,), 9, dtype=torch.uint8)
    tier.write([slot], [data]).wait()
    with torch.inference_mode():
        out = torch.zeros(4096, dtype=torch.uint8)
        tier.read([slot], [out]).wait()
        tier.write([slot], [out]).wait()
    assert torch.equal(tier.block(slot), data)
    tier.close()


def test_a_budget_no_address_space_can_hold_names_the_knob():
    with pytest.raises(ConfigError, match="lower host_bytes"):
        HostTier(MIB, Budget("host", 1 << 62))
