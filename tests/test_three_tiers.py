"""A `TieredCache` over device, host memory and disk where all three are had without a GPU."""

import gc

import pytest
import torch
from support import Footprint
from test_generate_parity import SMALLEST, check_integrity, prompt, run, tiny_model
from transformers import DynamicCache

from hf_tiered_cache import TieredCache, TieredCacheConfig
from hf_tiered_cache.blocks.block_reader import Reading
from hf_tiered_cache.config import Budgets
from hf_tiered_cache.errors import ConfigError, OutOfBlocksError

BLOCK = 4096
LEAST = SMALLEST[1]


def tiers_of(cache) -> list[str]:
    (manager,) = cache._owned.pool.managers
    return [tier.name for tier in manager.tiers]


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("4MiB", 4 * 2**20), (12345, 12345), (0, 0), ("auto", "auto")]
)
def test_host_bytes_are_a_size(size, num_bytes):
    assert TieredCacheConfig(host_bytes=size).host_bytes == num_bytes


@pytest.mark.parametrize("size", [-1, "lots", 1.5, None, True])
def test_what_is_no_size_is_refused_by_the_name_of_the_knob(size):
    with pytest.raises(ConfigError, match=rf"host_bytes={size!r}: expected int bytes"):
        TieredCacheConfig(host_bytes=size)


def test_a_misspelt_knob_is_recognized():
    with pytest.raises(ConfigError, match="did you mean host_bytes"):
        TieredCache(hst_bytes=1)


def test_more_host_bytes_than_memory_are_refused_before_anything_is_allocated(tmp_path):
    with pytest.raises(ConfigError, match=r"host_bytes=.* of memory free: lower host_bytes"):
        TieredCache(host_bytes="900TiB", disk_dir=tmp_path)


def test_auto_is_no_host_tier_where_the_device_is_the_cpu(make_cache):
    budgets = Budgets.resolve(TieredCacheConfig(disk_bytes=0))
    assert budgets.host_is_auto
    assert budgets.host_bytes > 0  # for other devices
    model = tiny_model("Llama")
    for host_bytes in ("auto", 0, BLOCK - 1):
        cache = make_cache(model.config, LEAST, host_bytes=host_bytes)
        run(model, cache)
        assert tiers_of(cache) == ["device", "disk"]
        assert [tier.name for tier in cache.stats().tiers] == ["device", "disk"]


def test_a_size_makes_a_host_tier_between_device_and_disk(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config, LEAST, host_bytes=7 * BLOCK)
    run(model, cache)
    assert tiers_of(cache) == ["device", "host", "disk"]
    device, host, disk = cache.stats().tiers
    assert (host.name, host.where, host.is_auto) == ("host", "pageable", False)
    assert (host.blocks, host.used_bytes, host.budget_bytes) == (7, 7 * BLOCK, 7 * BLOCK)
    assert device.peak_bytes <= LEAST * BLOCK
    assert disk.blocks > 0
    lines = str(cache).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["tier", "device", "host", "disk"]
    assert "pageable" in lines[4]


def test_host_without_disk(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config, LEAST, host_bytes=100 * BLOCK, disk_bytes=0)
    tokens, _ = run(model, cache)
    assert tiers_of(cache) == ["device", "host"]
    assert torch.equal(tokens, run(model, DynamicCache())[0])
    small = make_cache(model.config, LEAST, host_bytes=5 * BLOCK, disk_bytes=0)
    with pytest.raises(OutOfBlocksError, match="raise host_bytes or device_bytes or allow disk"):
        run(model, small)


@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_tokens_are_those_of_a_dynamic_cache_and_bits_do_not_depend_on_budgets(
    make_cache, family, how
):
    model = tiny_model(family)
    knobs = {
        "greedy": {},
        "sampled": {"do_sample": True, "temperature": 0.9},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
    }[how]
    least = 3 * LEAST if how == "beams" else LEAST
    expected, reference = run(model, DynamicCache(), **knobs)
    logits = None
    for device, host, disk, cpu_share in [
        (least, 1, 1000, 0),
        (least, 4, 1000, "auto"),
        (least, 11, 1000, 1),
        (least, 11, 1000, 0.5),
        (least + 5, 6, 1000, 0),
        (least, 1000, 0, 0),
        (least, 1000, 0, "auto"),
        (least, 1000, 0, 0.3),
        (least, 0, 1000, 1),
        (1000, 4, 1000, 1),
    ]:
        sizes = {"host_bytes": host * BLOCK, "disk_bytes": disk * BLOCK}
        cache = make_cache(model.config, device, **sizes, cpu_share=cpu_share)
        tokens, got = run(model, cache, **knobs)
        assert torch.equal(tokens, expected), (device, host, disk, cpu_share)
        assert (got - reference).abs().max() < 2e-4
        logits = got if logits is None else logits
        assert torch.equal(got, logits), (device, host, disk, cpu_share)
        check_integrity(cache)
        counters = cache.stats().counters
        is_cold = device < 1000
        # A chunk of one block is too few to be shared by a third.
        assert (counters.in_place_reads > 0) == (is_cold and host > 1 and cpu_share != 0)
        if how != "beams":  # where rows of a column differ, what is cold is staged
            assert (counters.cold_reads > 0) == (is_cold and (disk > 0 or cpu_share in (0, 0.3)))
        if is_cold and host and disk and how != "beams":  # those share much of what they hold
            assert all(tier.blocks for tier in cache.stats().tiers)
        cache.close()


def test_a_batch_that_is_left_padded_and_continued(make_cache):
    model = tiny_model("Llama")
    ids = prompt(2)
    mask = torch.ones_like(ids)
    ids[1, :11], mask[1, :11] = 0, 0
    expected, _ = run(model, DynamicCache(), ids, mask)
    first = make_cache(model.config, SMALLEST[2], host_bytes=5 * BLOCK)
    tokens, _ = run(model, first, ids, mask)
    assert torch.equal(tokens, expected)
    check_integrity(first)


def test_prompt_lookup_crops_across_rungs(make_cache):
    model = tiny_model("Llama")
    ids = prompt()[:, :10].repeat(1, 4)
    expected, _ = run(model, DynamicCache(), ids)
    cache = make_cache(model.config, LEAST, host_bytes=4 * BLOCK)
    tokens, _ = run(model, cache, ids, prompt_lookup_num_tokens=6)
    assert torch.equal(tokens, expected)
    check_integrity(cache)


def test_the_oracle_would_notice_blocks_lost_on_the_host(make_cache, monkeypatch):
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    whole = Reading.chunks

    def without_host(self):
        on_host = {i for i, b in enumerate(self._table.rows[0]) if b.copy_below(-1) == 1}
        return iter([c for c in whole(self) if c.first not in on_host])

    monkeypatch.setattr(Reading, "chunks", without_host)
    tokens, _ = run(model, make_cache(model.config, LEAST, host_bytes=7 * BLOCK))
    assert not torch.equal(tokens, expected)


def test_managers_of_a_cache_share_the_host_and_a_late_one_finds_the_disk(make_cache):
    """Layers of another shape come when the host is full: their blocks go past it."""
    cache = make_cache(None, 16, host_bytes=6 * BLOCK)
    held = []
    for heads in (2, 3):
        held.append((torch.randn(1, heads, 84, 8), torch.randn(1, heads, 84, 4)))
    for tokens in (slice(0, 4), slice(4, 84)):
        for layer, (keys, values) in enumerate(held):
            cache.update(keys[:, :, tokens], values[:, :, tokens], layer)
    first, second = cache._owned.pool.managers
    assert (first.tiers[1].used_slots, second.tiers[1].used_slots) == (6, 0)
    assert second.tiers[2].used_slots > 0
    assert cache.stats().tiers[1].used_bytes <= 6 * BLOCK
    check_integrity(cache)
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        assert torch.equal(layer.keys.materialize(), keys)
        assert torch.equal(layer.values.materialize(), values)


@pytest.mark.parametrize("way", ["close", "with", "drop"])
def test_nothing_is_left_of_a_cache(tmp_path, way):
    before = Footprint.now()
    model = tiny_model("Llama")
    cache = TieredCache(
        model.config,
        device_bytes=LEAST * BLOCK,
        host_bytes=7 * BLOCK,
        disk_bytes="8MiB",
        disk_dir=tmp_path,
        block_tokens=4,
    )
    run(model, cache)
    budgets = [tier.budget for tier in cache._owned.pool.managers[0].tiers]
    if way == "close":
        cache.close()
    elif way == "with":
        with cache:
            pass
    del cache
    gc.collect()
    assert Footprint.now() == before
    assert [budget.used_bytes for budget in budgets] == [0, 0, 0]
