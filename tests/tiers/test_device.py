"""The device tier: one slab, physical where touched, given back on close."""

import os

import pytest
import torch

from hf_tiered_cache.errors import ClosedCacheError, ConfigError
from hf_tiered_cache.tiers import Budget, DeviceTier

MIB = 1024 * 1024
GIB = 1024 * MIB


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_slab_covers_the_budget_and_blocks_are_views_of_it():
    tier = DeviceTier(8192, Budget("device", 10 * 8192 + 5))
    assert tier.slab.shape == (10, 8192)
    assert tier.slab.dtype is torch.uint8
    slots = [tier.allocate() for _ in range(3)]
    tier.block(slots[2])[7] = 42
    assert tier.slab[2, 7] == 42
    assert tier.block(1).data_ptr() == tier.slab.data_ptr() + 8192
    tier.close()


def test_blocks_are_aligned_for_direct_io_and_huge_pages():
    tier = DeviceTier(12288, Budget("device", MIB))
    assert tier.slab.data_ptr() % (2 * MIB) == 0
    assert all(tier.slab[row].data_ptr() % 4096 == 0 for row in range(tier.slab.shape[0]))
    tier.close()


def test_memory_grows_by_what_is_touched_not_by_the_budget():
    before = resident_bytes()
    tier = DeviceTier(MIB, Budget("device", 64 * GIB))
    assert resident_bytes() - before < 8 * MIB
    for _ in range(64):
        tier.block(tier.allocate()).fill_(1)
    grown = resident_bytes() - before
    assert 64 * MIB <= grown < 72 * MIB
    for slot in range(64):  # freed slots keep their memory and are reused first
        tier.free(slot)
    for _ in range(64):
        tier.block(tier.allocate()).fill_(2)
    assert resident_bytes() - before < 72 * MIB
    assert tier.budget.peak_bytes == 64 * MIB
    tier.close()
    assert resident_bytes() - before < 8 * MIB


def test_close_returns_the_memory_even_while_a_view_is_alive():
    before = resident_bytes()
    tier = DeviceTier(MIB, Budget("device", GIB))
    view = tier.block(tier.allocate())
    for _ in range(63):
        tier.block(tier.allocate()).fill_(1)
    view.fill_(1)
    tier.close()
    assert resident_bytes() - before < 8 * MIB
    assert not view.any()  # the view is safe to read, what it showed is gone
    with pytest.raises(ClosedCacheError):
        _ = tier.slab
    with pytest.raises(ClosedCacheError):
        tier.block(0)


def test_a_dropped_tier_leaves_its_memory_to_the_views_that_are_alive():
    tier = DeviceTier(MIB, Budget("device", GIB))
    view = tier.block(tier.allocate())
    view.fill_(7)
    del tier
    assert bool((view == 7).all())


def test_poisoned_slots_read_as_nan():
    tier = DeviceTier(4096, Budget("device", 2 * 4096))
    slots = [tier.allocate(), tier.allocate()]
    tier.slab.zero_()
    tier.free(slots[1])
    assert not tier.slab.any()  # off by default
    tier.poison = True
    tier.free(slots[0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert tier.slab[0].view(dtype).isnan().all()
    assert not tier.slab[1].any()
    tier.close()


def test_transfers_are_done_when_they_return():
    tier = DeviceTier(4096, Budget("device", 4096))
    slot = tier.allocate()
    block = torch.full((4096,), 9, dtype=torch.uint8)
    assert tier.write([slot], [block]).is_ready()
    assert tier.read([slot], [torch.empty_like(block)]).is_ready()
    tier.close()


def test_a_budget_no_address_space_can_hold_names_the_knob():
    budget = Budget("device", 1 << 62)
    with pytest.raises(ConfigError, match="lower device_bytes"):
        DeviceTier(MIB, budget)
    assert budget.used_bytes == 0


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_the_slab_is_one_allocation_of_the_budget():
    device = torch.accelerator.current_accelerator()
    budget = Budget("device", 10 * 4096 + 1)
    tier = DeviceTier(4096, budget, device)
    assert tier.slab.device.type == device.type
    assert budget.used_bytes == tier.committed_bytes == 10 * 4096
    slots = [tier.allocate() for _ in range(10)]
    assert tier.allocate() is None
    data = torch.randint(0, 256, (10, 4096), dtype=torch.uint8)
    out = torch.zeros_like(data)
    tier.write(slots, list(data)).wait()
    tier.read(slots, list(out)).wait()
    assert torch.equal(out, data)
    tier.close()
    assert budget.used_bytes == 0


def test_on_another_device_the_whole_budget_is_taken_at_once():
    """The `meta` device has no bytes, but it goes the way of every device that is not the CPU."""
    budget = Budget("device", 10 * 4096 + 1)
    tier = DeviceTier(4096, budget, "meta")
    assert tier.slab.shape == (10, 4096)
    assert budget.used_bytes == tier.committed_bytes == 10 * 4096
    assert (tier.used_slots, tier.num_free()) == (0, 10)
    assert [tier.allocate() for _ in range(11)] == [*range(10), None]
    tier.close()
    assert budget.used_bytes == 0


def test_a_device_with_less_memory_than_the_budget_is_told_by_the_name_of_the_knob(monkeypatch):
    def refuse(*_args, **_knobs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    budget = Budget("device", 100 * 8192)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ConfigError, match=r"device_bytes: no .* are free on meta; lower it"):
        DeviceTier(8192, budget, "meta")
    assert budget.used_bytes == 0
