"""A tier behind a lane: who still reads a slot is waited for before it is given to another."""

import pytest
import torch
from tiers.late_lane import LateDevice, LateLane, RefusingPinning

from hf_tiered_cache.tiers import Budget, HostTier
from hf_tiered_cache.tiers.device_side import BounceRing, behind_lane
from hf_tiered_cache.transfers import Transfer

BLOCK = 4096


class Outside(LateLane):
    """Takes all memory but the tier's for the device's."""

    def carries(self, block: torch.Tensor) -> bool:
        return True


@pytest.mark.parametrize("verb", ["read", "load"])
def test_freeing_a_slot_waits_for_its_load_whoever_else_reads_it(verb):
    """The CPU, which ends at once, was told to read what is being loaded."""
    lane = Outside(LateDevice(speed=0.0))
    ring = BounceRing(HostTier(BLOCK, Budget("bounce", 2 * BLOCK)), 2)
    tier = behind_lane(
        HostTier(BLOCK, Budget("host", 4 * BLOCK), pinning=RefusingPinning()), lane, ring
    )
    slot = tier.allocate()
    tier.tier.block(slot).fill_(7)
    memory = HostTier(BLOCK, Budget("device", BLOCK))
    target = memory.allocate()
    out = memory.block(target).zero_()
    if verb == "read":
        tier.read([slot], [out])
    else:
        tier.load([slot], memory, [target])
    reader = Transfer()
    reader.end_part()
    tier.hold_slots([slot], reader)
    tier.free(slot)
    assert (out == 7).all(), "the slot was given back while it was loaded"
    tier.close()
    memory.close()
