"""Packing in whole caches: other bytes on disk, the same bits everywhere else."""

import copy
import io
import pickle

import pytest
import torch
from test_generate_parity import SMALLEST, check_integrity, prompt, run, tiny_model
from toy_codecs import Mirror
from transformers import DynamicCache

from hf_tiered_cache import TieredCache
from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.tiers.codecs import Bf16TwelveBit

LEAST = SMALLEST[1]
pytestmark = pytest.mark.usefixtures("one_thread")


class Moody(Bf16TwelveBit, name="moody"):
    """Says of every third block that it cannot be encoded."""

    def __init__(self, layout):
        super().__init__(layout)
        self.core_arguments = None

    def encode(self, block, out):
        is_one = int(block[: self.layout.data_bytes].long().sum()) % 3 == 0
        return not is_one and super().encode(block, out)


PACKINGS = ["bf16_12bit", Mirror.name, Moody.name]


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(tiny_model("Llama")).to(torch.bfloat16)


def assert_is_packed(cache):
    disk = cache.stats().tiers[-1]
    assert disk.name == "disk"
    assert disk.blocks > 0
    assert cache.stats().counters.cold_reads > 0
    check_integrity(cache)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_bits_are_those_of_raw_blocks(make_cache, model, packing, how):
    blocks = {3: 3 * LEAST}.get(how.get("num_beams"), LEAST)
    tokens, bits = run(model, make_cache(model.config, 200, packing="none"), **how)
    cache = make_cache(model.config, blocks, packing=packing)
    packed_tokens, packed_bits = run(model, cache, **how)
    assert torch.equal(packed_tokens, tokens)
    assert torch.equal(packed_bits, bits)
    assert_is_packed(cache)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_padded_batch_in_chunks(make_cache, model, packing):
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    how = {"ids": ids, "mask": mask, "prefill_chunk_size": 11}
    _, bits = run(model, make_cache(model.config, 200, packing="none"), **how)
    cache = make_cache(model.config, SMALLEST[2], packing=packing)
    assert torch.equal(run(model, cache, **how)[1], bits)
    assert_is_packed(cache)


@pytest.mark.parametrize("packing", PACKINGS)
def test_forks_crops_and_saved_caches_go_on(make_cache, model, packing):
    def play(cache):
        run(model, cache)
        fork = copy.deepcopy(cache)
        fork.crop(-21)  # into a packed block, which fills again
        ids = torch.cat((prompt(), prompt()), 1)
        out = [run(model, fork, ids)[1]]
        saved = io.BytesIO()
        pickle.dump(cache, saved)
        again = pickle.loads(saved.getvalue())
        out.append(run(model, again, torch.cat((ids, ids), 1))[1])
        out += [layer.keys.clone() for layer in cache.layers]
        out += [layer.values.clone() for layer in fork.layers]
        for one in (fork, again):
            check_integrity(one)
            one.close()
        return out

    cache = make_cache(model.config, 3 * LEAST, packing=packing)
    found = play(cache)
    expected = play(make_cache(model.config, 400, packing="none"))
    assert all(map(torch.equal, found, expected))
    assert_is_packed(cache)


def test_three_tiers(make_cache, model):
    _, bits = run(model, make_cache(model.config, 200, packing="none"))
    cache = make_cache(model.config, LEAST, host_bytes=4 * 4096, packing="bf16_12bit")
    assert torch.equal(run(model, cache)[1], bits)
    assert [tier.name for tier in cache.stats().tiers] == ["device", "host", "disk"]
    assert_is_packed(cache)


def keys_and_values(num_tokens, seed=0, dtype=torch.bfloat16):
    noise = torch.Generator().manual_seed(seed)
    shape = (1, 2, num_tokens, 64)
    return [torch.randn(shape, generator=noise).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_packs_bfloat16_and_stats_say_what_it_saves(make_cache, dtype):
    cache = make_cache(None, None, device_bytes="1MiB", block_tokens=128, packing="auto")
    keys, values = keys_and_values(4096, dtype=dtype)
    cache.update(keys, values, 0)
    assert torch.equal(cache.layers[0].keys.clone(), keys)
    disk = cache.stats().tiers[-1]
    assert disk.raw_bytes == disk.blocks * cache.stats().block_bytes
    if dtype == torch.float32:
        assert disk.packed_bytes == disk.raw_bytes
        assert "packed" not in str(cache)
        return
    assert disk.packed_bytes == disk.blocks * 52 * 1024  # of 64
    assert f"disk packed: {disk.blocks * 64 / 1024:.1f} MiB of blocks in" in str(cache)
    assert "(x1.23)" in str(cache)
    count = cache.stats().counters
    assert count.stored_bytes == count.stores * 52 * 1024
    assert count.loaded_bytes == count.loads * 52 * 1024


def test_values_that_cannot_be_packed_are_stored_all_the_same(make_cache):
    noise = torch.Generator().manual_seed(0)
    shape = (1, 2, 2048, 64)
    keys, values = (
        torch.randint(-(2**15), 2**15, shape, generator=noise).short().view(torch.bfloat16)
        for _ in range(2)
    )
    good, _ = keys_and_values(2048)
    keys[:, :, :1024] = good[:, :, :1024]  # the first blocks go half, the keys
    cache = make_cache(None, None, device_bytes="512KiB", block_tokens=128, packing="bf16_12bit")
    cache.update(keys, values, 0)
    for found, given in ((cache.layers[0].keys, keys), (cache.layers[0].values, values)):
        assert torch.equal(found.clone().view(torch.int16), given.view(torch.int16))
    assert cache.stats().tiers[-1].packed_bytes > cache.stats().tiers[-1].raw_bytes
    check_integrity(cache)


def test_no_room_for_what_cannot_be_packed_loses_nothing(make_cache):
    noise = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**15), 2**15, (1, 2, 1024, 64), generator=noise).short()
    keys = keys.view(torch.bfloat16)
    knobs = {"device_bytes": "512KiB", "disk_bytes": "200KiB", "block_tokens": 128}
    cache = make_cache(None, None, packing="bf16_12bit", **knobs)

    def fill():
        while True:
            part = keys[:, :, cache.get_seq_length() % 1024 :][:, :, :64]
            cache.update(part, part, 0)

    with pytest.raises(TierIOError, match=r"cannot be packed.*raise disk_bytes"):
        fill()
    held = cache.get_seq_length()
    assert held >= 4 * 128  # what the device holds
    expected = keys.repeat(1, 1, 4, 1)[:, :, :held]
    for _ in range(2):
        assert torch.equal(
            cache.layers[0].keys.clone().view(torch.int16), expected.view(torch.int16)
        )
    check_integrity(cache)


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        ("zap", r"unknown codec 'zap'; known: .*bf16_12bit"),
        ("halves", r"packing='halves' is approximate"),
        (12, r"packing=12: expected a name"),
        ("nowhere:Codec", r"codec 'nowhere:Codec'"),
    ],
)
def test_what_cannot_be_asked_for(make_cache, packing, message):
    with pytest.raises(ConfigError, match=message):
        make_cache(packing=packing)


def test_a_codec_that_does_not_know_the_blocks_is_an_error_where_it_was_asked_for(make_cache):
    cache = make_cache(packing="bf16_12bit")
    with pytest.raises(ConfigError, match=r"packing='bf16_12bit': it packs bfloat16"):
        cache.update(*keys_and_values(4, dtype=torch.float16), 0)
    cache = make_cache()
    cache.update(*keys_and_values(4, dtype=torch.float16), 0)


def test_tokens_are_those_of_a_dynamic_cache(make_cache, model):
    expected, _ = run(model, DynamicCache())
    assert torch.equal(run(model, make_cache(model.config, LEAST, packing=Moody.name))[0], expected)


def test_the_knob_is_a_field_of_the_config(tmp_path):
    with TieredCache(packing="auto", disk_dir=tmp_path) as cache:
        assert cache._owned.pool.config.asked() == ["disk_dir", "packing"]
