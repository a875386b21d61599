"""The whole cache over a device that lags behind its CPU, in virtual time: what is loaded, stored,
attended and given back in an order that only the rules of the lanes hold together."""

from contextlib import ExitStack
from itertools import count
from unittest.mock import patch

import pytest
import torch
from test_generate_parity import SMALLEST, check_integrity, prompt, run, tiny_model
from tiers.late_lane import LateDevice, LateFlags, LateLane, RefusingPinning
from transformers import DynamicCache

from hf_tiered_cache.blocks import assembly, block_reader
from hf_tiered_cache.blocks.selection import ALL
from hf_tiered_cache.blocks.staging import StagingRing
from hf_tiered_cache.devices import CpuDevice, Device
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.devices.share import InPlaceShare
from hf_tiered_cache.errors import TierIOError, io_error
from hf_tiered_cache.observe.metrics import LaneCounters
from hf_tiered_cache.tiers import DiskTier
from hf_tiered_cache.transfers import Transfer

BLOCK = 4096
RING = 2 * BLOCK
LEAST = SMALLEST[1]


class Late:
    """Caches inside the `with` take the CPU for a device that is late: `with Late(seed=3): ...`."""

    def __init__(self, seed: int = 0, pinned_ranges: int = 10**6, has_cpu_lane: bool = False):
        self.device = LateDevice(seed)
        self.lane = LateLane(self.device)
        self.pinning = RefusingPinning(pinned_ranges)
        self.flags = LateFlags(self.device)
        self.in_place = InPlaceAttention(self.flags) if has_cpu_lane else None

    def __enter__(self) -> "Late":
        class LateCpu(CpuDevice):
            copy_lane, pinning, in_place = self.lane, self.pinning, self.in_place

        self._stack = ExitStack()
        self._stack.enter_context(patch.dict(Device.registry, cpu=LateCpu))
        self._stack.enter_context(self.device.computing())
        self._stack.enter_context(self.lane.serving())
        if self.in_place is not None:
            self._stack.callback(self.in_place.close)
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()


SIZES = {
    "host": {"host_bytes": 1000 * BLOCK, "disk_bytes": 0},
    "disk": {"host_bytes": 0, "disk_bytes": 1000 * BLOCK},
    "host and disk": {"host_bytes": 5 * BLOCK, "disk_bytes": 1000 * BLOCK},
}


def generate(make_cache, model, device_blocks=LEAST, **knobs):
    """(tokens, logits, cache) through whatever device there is."""
    cache = make_cache(model.config, device_blocks, staging_bytes=RING, **knobs)
    tokens, logits = run(model, cache)
    check_integrity(cache)
    return tokens, logits, cache


@pytest.mark.parametrize("pinned", ["all", "none", "one slab"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_device_that_lags_behind_computes_the_same_bits(make_cache, family, sizes, pinned):
    model = tiny_model(family)
    expected, _ = run(model, DynamicCache())
    _, bits = run(model, make_cache(model.config, 64))
    ranges = {"all": 10**6, "none": 0, "one slab": 1}[pinned]
    for seed in range(2):
        with Late(seed, ranges) as late:
            tokens, logits, cache = generate(make_cache, model, **SIZES[sizes], cpu_share=0)
            assert torch.equal(tokens, expected)
            assert torch.equal(logits, bits)
            assert cache.stats().counters.cold_reads > 0
            assert late.lane.num_loads > 0
            assert late.lane.num_stores > 0
            assert late.device.num_overtakings > 0
            cache.close()
            assert not late.pinning.pinned


def test_beams_share_and_copy_blocks_on_a_device_that_lags_behind(make_cache):
    model = tiny_model("Llama")
    how = {"num_beams": 3, "num_return_sequences": 2}
    expected, _ = run(model, DynamicCache(), **how)
    with Late():
        cache = make_cache(model.config, 3 * LEAST, **SIZES["host and disk"], staging_bytes=RING)
        tokens, _ = run(model, cache, **how)
        assert torch.equal(tokens, expected)
        check_integrity(cache)
        cache.close()


@pytest.mark.parametrize("cpu_share", [0.4, 1.0, "auto"])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_cpu_attends_its_share_beside_the_device(make_cache, sizes, cpu_share):
    model = tiny_model("Llama")
    expected, reference = run(model, DynamicCache())
    with Late(has_cpu_lane=True) as late:
        knobs = {**SIZES[sizes], "cpu_share": cpu_share}
        tokens, logits, cache = generate(make_cache, model, **knobs)
        assert torch.equal(tokens, expected)
        assert (logits - reference).abs().max() < 2e-4
        stats = cache.stats()
        copy, cpu = stats.lanes
        assert (copy.name, cpu.name) == ("copy lane", "in-place attention")
        assert copy.share + cpu.share == 1
        if sizes == "host" and cpu_share != "auto":
            assert cpu.moved_bytes > 0
            assert cpu.busy_seconds > 0
            assert stats.counters.in_place_reads > 0
            if cpu_share == 1.0:  # the prompt alone went over the link
                assert copy.moved_bytes < cpu.moved_bytes
        assert "copy lane" in str(stats)
        assert f"{cpu}" in str(cache)
        cache.close()
        assert late.lane.num_loads > 0


@pytest.mark.parametrize("waited_for", ["in-place attention", "copy lane"])
def test_the_shares_follow_the_waits(make_cache, monkeypatch, waited_for):
    """A device that waits for one lane gives it less, and what was staged stays, but for the blocks
    that the CPU attends from then on."""
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    monkeypatch.setattr(block_reader, "READINGS_PER_CORRECTION", 2)
    monkeypatch.setattr(StagingRing, "clear", lambda _: pytest.fail("the ring was given up"))
    monkeypatch.setattr(InPlaceShare, "measured", lambda *_: InPlaceShare(0.6, False, most=0.8))
    with Late(has_cpu_lane=True) as late:
        waits = count()
        if waited_for == "in-place attention":
            monkeypatch.setattr(late.flags, "wait_seconds", lambda: next(waits))
        else:
            measure = lambda: LaneCounters(wait_seconds=next(waits))  # noqa: E731
            monkeypatch.setattr(late.lane, "measure", measure)
        tokens, _, cache = generate(make_cache, model, **SIZES["host"])
        assert torch.equal(tokens, expected)
        (manager,) = cache._owned.pool.managers
        split = manager.split
        assert not split.is_fixed
        assert split.cpu_share == (0 if waited_for == "in-place attention" else 0.8)
        reader = manager._reader
        reader._correct_split()
        staged = set(manager._stream._staged)
        for table in manager.blocks.tables:
            selected = reader.select(ALL, table, table.num_blocks)
            for part in reader.plan(table, selected, has_gaps=False, beside=True).below:
                assert not staged & set(table.blocks(part.first, part.last))
        cache.close()


def test_what_became_the_cpus_as_the_host_filled_keeps_no_staging_slots(make_cache, monkeypatch):
    """With a share that is fixed as well: the border moves with every block that comes down."""
    monkeypatch.setattr(block_reader, "READINGS_PER_CORRECTION", 1)
    with Late(has_cpu_lane=True):
        _, _, cache = generate(make_cache, tiny_model("Llama"), **SIZES["host"], cpu_share=0.5)
        (manager,) = cache._owned.pool.managers
        staged = set(manager._stream._staged)
        for table in manager.blocks.tables:
            selected = manager._reader.select(ALL, table, table.num_blocks)
            for part in manager._reader.plan(table, selected, has_gaps=False, beside=True).below:
                assert not staged & set(table.blocks(part.first, part.last))
        cache.close()


def test_the_cpu_is_probed_beside_a_copy_on_more_than_a_cache_holds(make_cache, monkeypatch):
    probed = []

    def probe(self, blocks):
        probed.append((blocks.numel(), late.lane.occupied_bytes))
        return 1e9

    monkeypatch.setattr(InPlaceAttention, "probe", probe)
    assert assembly.PROBE_BYTES >= 1 << 30
    with Late(has_cpu_lane=True) as late:
        _, _, cache = generate(make_cache, tiny_model("Llama"), **SIZES["host"])
        assert probed == [(1000 * BLOCK, 4 * 1000 * BLOCK)], "as much as the budget allows"
        cache.close()


@pytest.mark.parametrize("host_blocks", [0, 1])
def test_what_passes_between_device_and_disk_has_a_small_budget_of_its_own(make_cache, host_blocks):
    model = tiny_model("Llama")
    knobs = {"host_bytes": host_blocks * BLOCK, "disk_bytes": 1000 * BLOCK}
    with Late():
        _, _, cache = generate(make_cache, model, **knobs)
        tiers = {tier.name: tier for tier in cache.stats().tiers}
        assert ("host" in tiers) == bool(host_blocks)
        assert tiers["bounce"].used_bytes == tiers["bounce"].budget_bytes == RING
        assert "bounce" in str(cache.stats())
        cache.close()
        assert cache._owned.pool._bounce.used_bytes == 0


def test_a_failed_read_on_the_way_to_the_device_is_told_and_leaves_the_cache_usable(
    make_cache, monkeypatch
):
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    with Late():
        cache = make_cache(model.config, LEAST, **SIZES["disk"], staging_bytes=RING)
        model(prompt()[:, :-1], past_key_values=cache)
        broken = failing_transfer()
        with monkeypatch.context() as patched:
            patched.setattr(DiskTier, "read", lambda *_: broken)
            with pytest.raises(TierIOError, match="the disk is gone"):
                model(prompt()[:, -1:], past_key_values=cache)
        cache.reset()
        tokens, _ = run(model, cache)
        assert torch.equal(tokens, expected)
        check_integrity(cache)
        cache.close()


def failing_transfer() -> Transfer:
    transfer = Transfer()
    transfer.end_part(io_error(5, "the disk is gone"))
    return transfer
