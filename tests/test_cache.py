"""`TieredCache`: its knobs and refusals, its life from construction to the garbage collector."""

import copy
import dataclasses
import gc
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import torch
from support import Footprint, new_tokens, placement
from test_generate_parity import prompt, run, tiny_model
from transformers import DynamicCache, LlamaConfig, LogitsProcessorList

import hf_tiered_cache
from hf_tiered_cache import TieredCache, TieredCacheConfig
from hf_tiered_cache.blocks.demotion import DemotionPolicy
from hf_tiered_cache.errors import (
    BackwardError,
    ClosedCacheError,
    ConfigError,
    OutOfBlocksError,
    UnsupportedInputError,
)

BLOCK = 4096


def update(cache, num_tokens=3, layer=0, batch=1):
    """Give a layer new tokens; return them."""
    keys, values = new_tokens(batch, num_tokens)
    cache.update(keys, values, layer)
    return keys, values


def contents(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What every layer holds, densely."""
    return [
        (layer.keys.materialize().clone(), layer.values.materialize().clone())
        for layer in cache.layers
        if layer.is_initialized
    ]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def table(cache, layer=0):
    return cache.layers[layer]._table


def device(cache):
    return cache._owned.pool.managers[0].device_tier


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"device_bytes": "1MiB"}, ("device_bytes", 2**20)),
        ({"device_bytes": "1.5KB"}, ("device_bytes", 1500)),
        ({"device_bytes": 12345}, ("device_bytes", 12345)),
        ({"disk_bytes": "2TiB"}, ("disk_bytes", 2 * 2**40)),
        ({"disk_bytes": "1.5TB"}, ("disk_bytes", 1_500_000_000_000)),
        ({"device_bytes": "auto"}, ("device_bytes", "auto")),
        ({"disk_bytes": 0}, ("disk_bytes", 0)),
        ({"disk_io": "buffered"}, ("disk_io", "buffered")),
        ({"block_tokens": 16}, ("block_tokens", 16)),
    ],
)
def test_knobs_take_bytes_words_and_auto(knobs, expected):
    name, value = expected
    assert getattr(TieredCacheConfig(**knobs), name) == value


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"device_byts": 1}, "unknown argument 'device_byts'; did you mean device_bytes?"),
        ({"colour": "red"}, "unknown argument 'colour'; known: device_bytes"),
        ({"device_bytes": -1}, "device_bytes=-1"),
        ({"device_bytes": "-4GiB"}, "device_bytes='-4GiB'"),
        ({"device_bytes": "lots"}, "device_bytes='lots': expected int bytes"),
        ({"device_bytes": 1.5}, "device_bytes=1.5"),
        ({"device_bytes": True}, "device_bytes=True"),
        ({"disk_bytes": None}, "disk_bytes=None"),
        ({"staging_bytes": "much"}, "staging_bytes='much'"),
        ({"disk_io": "fast"}, "disk_io='fast': expected one of"),
        ({"block_tokens": 5}, "block_tokens=5: expected a power of two from 4 up"),
        ({"block_tokens": 2}, "block_tokens=2"),
        ({"block_tokens": "16"}, "block_tokens='16'"),
        (
            {"demotion": "by_size"},
            "unknown demotion policy 'by_size'; known: by_age",
        ),
        ({"extra_tiers": {"disk": "auto"}}, """extra_tiers['disk']="auto": expected int bytes"""),
        ({"extra_tiers": {"tape": -1}}, "extra_tiers['tape']=-1: expected int bytes >= 0"),
        ({"extra_tiers": {"tape": 1}}, "unknown tier 'tape'; known: device, disk, "),
        ({"extra_tiers": ["host"]}, "extra_tiers=['host']: expected a mapping"),
        ({"extra_tiers": {1: 2}}, "extra_tiers={1: 2}: expected a mapping"),
        ({"demotion": 3}, "demotion=3: expected a name"),
        ({"attend": "some"}, "unknown selection policy 'some'; known: all, "),
        ({"attend": None}, "attend=None: expected a name"),
    ],
)
def test_an_impossible_knob_is_named_with_what_is_expected(knobs, message):
    with pytest.raises(ConfigError) as error:
        TieredCache(**knobs)
    assert message in str(error.value)
    assert isinstance(error.value, ValueError)


def test_the_knobs_of_a_cache_are_the_fields_of_its_config():
    """Names, order, types and defaults; each told in the docstring."""
    parameters = inspect.signature(TieredCache.__init__).parameters
    names = [field.name for field in dataclasses.fields(TieredCacheConfig)]
    first = list(parameters).index(names[0])
    assert list(parameters)[first : first + len(names)] == names
    for field in dataclasses.fields(TieredCacheConfig):
        parameter = parameters[field.name]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is field.default
        assert parameter.annotation == field.type
    told = re.findall(r"^ {8}(\w+): ", TieredCache.__doc__, re.MULTILINE)
    assert told == ["config", *names, "store", "tiers"]


class NewestFirst(DemotionPolicy, name="newest_first"):
    """A policy of one's own."""

    def next_to_demote(self, waiting, may_store):
        queues = [*waiting.clean.values(), *(waiting.dirty.values() if may_store else ())]
        return next((next(reversed(queue)) for queue in queues if queue), None)

    def next_to_store(self, waiting):
        return next((next(reversed(queue)) for queue in waiting.dirty.values() if queue), None)


EVERY_KNOB = {
    "device_bytes": 2**20,
    "host_bytes": 2**20,
    "disk_bytes": 2**20,
    "disk_io": "buffered",
    "block_tokens": 8,
    "staging_bytes": 2**16,
    "cpu_share": 0.5,
    "extra_tiers": {"host": 2**20},
    "packing": "bf16_12bit",
    "demotion": f"{__name__}:NewestFirst",
    "attend": "resident_only",
}


def test_every_knob_reaches_the_config(tmp_path):
    knobs = {**EVERY_KNOB, "disk_dir": tmp_path}
    assert set(knobs) == {field.name for field in dataclasses.fields(TieredCacheConfig)}
    with TieredCache(**knobs) as cache:
        assert cache._owned.pool.config == TieredCacheConfig(**knobs)
    for name, value in knobs.items():
        with pytest.raises(ConfigError, match=f"give either tiers= or {name}, not both"):
            TieredCache(tiers=TieredCacheConfig(), **{name: value})


def test_a_policy_of_ones_own_decides_what_leaves_and_changes_no_bit(tmp_path):
    places = []
    for demotion in ("by_age", f"{__name__}:NewestFirst"):
        knobs = {"device_bytes": 8 * 4096, "block_tokens": 4, "disk_dir": tmp_path}
        with TieredCache(demotion=demotion, **knobs) as cache:
            keys, values = update(cache, num_tokens=50)
            (manager,) = cache._owned.pool.managers
            (table,) = manager.blocks.tables
            places.append([block.is_resident for block in table.blocks()])
            ((held_keys, held_values),) = contents(cache)
            assert torch.equal(held_keys, keys)
            assert torch.equal(held_values, values)
    assert places[0] != places[1]


def test_sizes_are_validated_where_they_are_given():
    with pytest.raises(ConfigError, match="config=dict"):
        TieredCache({"device_bytes": 1})
    with pytest.raises(ConfigError, match="set device_bytes"):
        TieredCache(offloading=True)
    with pytest.raises(ConfigError, match="DataParallel"):
        TieredCache(ddp_cache_data=[])


@pytest.mark.parametrize("knob", ["device_bytes", "host_bytes"])
@pytest.mark.parametrize("size", ["500TiB", 2**52])
def test_no_budget_is_larger_than_the_memory_it_is_taken_from(monkeypatch, tmp_path, knob, size):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"{knob}=.* is more than the .* of memory free"):
        TieredCache(disk_dir=tmp_path, **{knob: size})


def test_tiers_is_all_knobs_at_once(tmp_path):
    tiers = TieredCacheConfig(
        device_bytes="1MiB", disk_bytes="2MiB", disk_dir=tmp_path, block_tokens=8
    )
    with TieredCache(tiers=tiers) as cache:
        update(cache)
        assert [tier.budget_bytes for tier in cache.stats().tiers] == [2**20, 2 * 2**20]
        assert cache.stats().block_tokens == 8


def test_auto_takes_a_share_of_what_is_free(tmp_path):
    with TieredCache(disk_dir=tmp_path) as cache:
        update(cache)
        device, disk = cache.stats().tiers
        assert 0 < device.budget_bytes < psutil.virtual_memory().total
        assert 0 < disk.budget_bytes <= shutil.disk_usage(tmp_path).total * 0.8
        assert (device.where, disk.where) == ("cpu", str(tmp_path))
        assert cache.stats().block_tokens == 2048  # 64 KiB of float32 keys of 8 channels


def test_a_disk_larger_than_the_free_space_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"disk_bytes=.* is more than the .* free in"):
        TieredCache(disk_bytes="900TiB", disk_dir=tmp_path)


def test_a_file_given_as_folder_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"disk_dir=.*cannot be made"):
        TieredCache(disk_dir=path)
    with pytest.raises(ConfigError, match=r"disk_dir=.*cannot be made"):
        TieredCache(disk_dir=path / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="is not writable"):
        TieredCache(disk_dir=tmp_path)


def test_a_folder_that_refuses_new_files_is_refused():
    with pytest.raises(ConfigError, match="disk_dir"):
        update(TieredCache(disk_dir="/proc/self", disk_bytes=4096, device_bytes="1MiB"))


def test_the_folder_comes_from_the_environment_and_is_made_private(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(tmp_path / "a" / "b"))
    with TieredCache(device_bytes="1MiB", disk_bytes="1MiB") as cache:
        update(cache)
        assert cache.stats().tiers[1].where == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_no_disk_means_no_folder(tmp_path):
    with TieredCache(device_bytes="1MiB", disk_bytes=0, disk_dir=tmp_path / "none") as cache:
        update(cache)
        assert [tier.name for tier in cache.stats().tiers] == ["device"]
    assert not (tmp_path / "none").exists()


def test_a_device_too_small_is_refused_at_the_first_token_by_the_number_that_works(make_cache):
    config = LlamaConfig(num_hidden_layers=5)
    cache = make_cache(config, device_blocks=6)
    with pytest.raises(OutOfBlocksError) as error:
        update(cache)
    assert f"smallest device_bytes that works is {7 * BLOCK} " in str(error.value)
    assert not cache.layers[0].is_initialized
    assert cache.get_seq_length() == 0
    enough = make_cache(config, device_blocks=7)
    for _ in range(9):
        for layer in range(5):
            update(enough, layer=layer)
    assert enough.stats().cold_blocks > 0


def test_the_budget_is_quoted_as_it_was_given(make_cache):
    with pytest.raises(OutOfBlocksError, match=r"device_bytes=100 B is too small"):
        update(make_cache(device_blocks=None, device_bytes=100))


@pytest.mark.parametrize("num_tokens", [5, 200])
def test_layers_of_two_shapes_work_on_the_device_that_the_error_names(make_cache, num_tokens):
    """Also where the first layer's prompt filled the device before the second shape was seen."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, num_tokens, dim, generator=generator) for dim in (8, 16)]
    config = LlamaConfig(num_hidden_layers=2)

    def fill(cache: TieredCache) -> None:
        for layer, tensor in enumerate(states):
            cache.update(tensor, tensor, layer)
        for token in range(9):
            for layer, tensor in enumerate(states):
                part = tensor[:, :, token % num_tokens][:, :, None]
                cache.update(part, part, layer)

    size = 100
    for _ in range(3):  # too small for one shape, for both, big enough
        cache = make_cache(config, device_blocks=None, device_bytes=size)
        try:
            fill(cache)
        except OutOfBlocksError as error:
            named = int(re.search(r"device_bytes that works is (\d+) ", str(error))[1])
            assert named > size
            size = named
    for layer, tensor in zip(cache.layers, states, strict=True):
        assert layer.get_seq_length() == num_tokens + 9
        assert torch.equal(layer.keys.materialize()[:, :, :num_tokens], tensor)
    assert cache.stats().tiers[0].peak_bytes <= size
    assert cache.stats().cold_blocks > 0 or num_tokens == 5
    for manager in cache._owned.pool.managers:
        manager.check_integrity()


@pytest.mark.parametrize("device_blocks", [0, 1])
def test_a_device_that_holds_no_working_set_at_all_says_so(make_cache, device_blocks):
    cache = make_cache(device_blocks=device_blocks)
    with pytest.raises(OutOfBlocksError, match=f"smallest device_bytes that works is {3 * BLOCK}"):
        update(cache)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 2, 1, 8), torch.float32, r"got \(2, 2, 8, 4\)"),
        ((1, 3, 1, 8), torch.float32, r"got \(1, 3, 8, 4\)"),
        ((1, 2, 1, 6), torch.float32, r"got \(1, 2, 6, 4\)"),
        ((1, 2, 1, 8), torch.float16, "in torch.float16"),
        ((1, 2, 1, 8), torch.int64, "floating-point"),
        ((2, 1, 8), torch.float32, r"\[batch, kv_heads, tokens, head_dim\]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_before_anything_changed(
    make_cache, shape, dtype, message
):
    cache = make_cache()
    update(cache, 6)
    before = contents(cache)
    keys = torch.zeros(shape, dtype=dtype)
    values = torch.zeros((*shape[:-1], 4), dtype=dtype)
    with pytest.raises(UnsupportedInputError, match=message):
        cache.update(keys, values, 0)
    with pytest.raises(UnsupportedInputError):
        cache.update(new_tokens(1, 2)[0], new_tokens(1, 3)[1], 0)
    with pytest.raises(UnsupportedInputError, match="meta"):
        cache.update(*(tensor.to("meta") for tensor in new_tokens(1, 1)), 0)
    assert same(contents(cache), before)
    update(cache)


@pytest.mark.parametrize("layer", [-1, "0", None, 0.0])
def test_a_layer_number_must_be_one(make_cache, layer):
    cache = make_cache()
    with pytest.raises(UnsupportedInputError, match=f"layer_idx={layer!r}"):
        update(cache, layer=layer)
    assert len(cache) == 0


def test_integers_of_other_libraries_are_layer_numbers(make_cache):
    cache = make_cache()
    update(cache, layer=torch.tensor(0))
    assert cache.get_seq_length() == 3


def test_a_layer_beyond_the_config_is_another_models(make_cache):
    cache = make_cache(LlamaConfig(num_hidden_layers=2))
    with pytest.raises(UnsupportedInputError, match="layer 2 of a cache made for 2 layers"):
        update(cache, layer=2)


def test_a_layer_updated_twice_in_one_forward_is_out_of_order(make_cache):
    cache = make_cache()
    for layer in range(3):
        update(cache, 4, layer)
    before = contents(cache)
    with pytest.raises(
        UnsupportedInputError, match="out of order: layer 1 holds 4 tokens"
    ) as error:
        update(cache, 1, layer=1)
    assert "expected fewer" in str(error.value)
    assert same(contents(cache), before)
    for layer in range(3):
        update(cache, 1, layer)


def test_layers_that_lag_behind_are_legal(make_cache):
    """An early exit leaves later layers shorter; a cross layer brings its own length at once."""
    cache = make_cache()
    for _ in range(3):
        for layer in range(2):
            update(cache, 2, layer)
    update(cache, 50, layer=2)
    update(cache, 1, layer=3)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6, 50, 1]


def test_a_layer_without_room_takes_back_what_the_layers_before_it_took(make_cache):
    cache = make_cache(device_blocks=3 + 2, disk_bytes=10 * BLOCK)
    for layer in range(3):
        update(cache, 12, layer)
    before = contents(cache)
    update(cache, 8, layer=0)
    update(cache, 8, layer=1)
    with pytest.raises(OutOfBlocksError):
        update(cache, 8, layer=2)
    assert same(contents(cache), before)
    for manager in cache._owned.pool.managers:
        manager.check_integrity()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tiered"])
def test_a_cache_belongs_to_the_model_that_attended_it_first(make_cache, implementation):
    first, second = tiny_model("Llama"), copy.deepcopy(tiny_model("Llama"))
    second.config.name_or_path = "the/second"
    second.set_attn_implementation(implementation)
    cache = make_cache(first.config)
    with torch.no_grad():
        first(prompt(), past_key_values=cache)
        before = contents(cache)
        if implementation == "eager":  # not reached: it computes densely, and cannot be told apart
            second(prompt()[:, :1], past_key_values=cache)
            return
        with pytest.raises(UnsupportedInputError, match=r"one TieredCache per model") as error:
            second(prompt()[:, :3], past_key_values=cache)
        assert "the/second" in str(error.value)
        assert same(contents(cache), before)
        first(prompt()[:, :1], past_key_values=cache)
        with pytest.raises(UnsupportedInputError):
            second(prompt()[:, :3], past_key_values=copy.deepcopy(cache))
        cache.reset()
        second(prompt(), past_key_values=cache)


def own_configs(model: torch.nn.Module) -> None:
    """Every layer with a config object of its own, as pruning and editing leave it."""
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)


def wrapped(model: torch.nn.Module) -> None:
    """Calls go through another module, as adapters do."""
    for layer in model.model.layers:
        layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj)


def edited(model: torch.nn.Module) -> None:
    """A layer made anew, with the same weights."""
    layers = model.model.layers
    layers[1] = copy.deepcopy(layers[1])


@pytest.mark.parametrize("moment", ["before", "between"])
@pytest.mark.parametrize("change", [own_configs, wrapped, edited])
def test_a_model_whose_parts_were_changed_is_the_same_model(make_cache, change, moment):
    model = copy.deepcopy(tiny_model("Llama"))
    expected, _ = run(model, DynamicCache())
    cache = make_cache(model.config)
    if moment == "before":
        change(model)
    with torch.no_grad():
        model(prompt()[:, :9], past_key_values=cache)
        if moment == "between":
            change(model)
    assert torch.equal(run(model, cache)[0], expected)


def test_a_cache_outlives_the_model_that_filled_it(make_cache):
    first = copy.deepcopy(tiny_model("Llama"))
    cache = make_cache(first.config)
    with torch.no_grad():
        first(prompt(), past_key_values=cache)
        del first
        gc.collect()
        copy.deepcopy(tiny_model("Llama"))(prompt()[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == prompt().shape[1] + 1


def test_crop_takes_a_count_to_remove_as_a_negative_number(make_cache):
    cache = make_cache()
    keys, values = update(cache, 11)
    with pytest.raises(UnsupportedInputError, match=r"crop\(3\)"):
        cache.crop(3)
    cache.crop(0)
    assert cache.get_seq_length() == 11
    cache.crop(-5)
    assert same(contents(cache), [(keys[:, :, :6], values[:, :, :6])])
    cache.crop(-99)
    assert cache.get_seq_length() == 0
    update(cache, 2)
    assert cache.get_seq_length() == 2


def test_reset_frees_everything_and_takes_another_batch(make_cache):
    cache = make_cache()
    for layer in range(2):
        update(cache, 20, layer)
    cache.reset()
    assert device(cache).used_slots == 0
    assert cache.get_seq_length() == 0
    expected = update(cache, 5, batch=3)
    assert same(contents(cache), [expected])


def test_rows_are_selected_repeated_and_reordered(make_cache):
    cache = make_cache()
    keys, values = update(cache, 6, batch=3)
    cache.reorder_cache(torch.tensor([2, 0, 0], dtype=torch.int32))
    assert same(contents(cache), [(keys[[2, 0, 0]], values[[2, 0, 0]])])
    cache.batch_repeat_interleave(2)
    assert torch.equal(contents(cache)[0][0], keys[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices((5, 0))
    assert torch.equal(contents(cache)[0][0], keys[[0, 2]])
    cache.batch_select_indices(torch.tensor([True, False]))
    assert torch.equal(contents(cache)[0][0], keys[[0]])
    with pytest.raises(UnsupportedInputError, match=r"rows \[3\] of a batch of 1"):
        cache.reorder_cache(torch.tensor([3]))
    with pytest.raises(UnsupportedInputError, match="at least one"):
        cache.batch_select_indices(torch.tensor([], dtype=torch.long))


def test_a_deep_copy_shares_full_blocks_and_diverges(make_cache):
    cache = make_cache()
    for layer in range(2):
        update(cache, 10, layer)
    before = contents(cache)
    used = device(cache).used_slots
    fork = copy.deepcopy(cache)
    assert device(cache).used_slots == used == 6
    assert same(contents(fork), before)
    for layer in range(2):
        update(fork, 3, layer)
    assert device(cache).used_slots == 6 + 2 * 2  # a copy of each filling block, and one more each
    for layer in range(2):
        update(cache, 1, layer)
    assert device(cache).used_slots == 10
    assert same([(k[:, :, :10], v[:, :, :10]) for k, v in contents(fork)], before)
    assert same([(k[:, :, :10], v[:, :, :10]) for k, v in contents(cache)], before)
    fork.close()
    assert not cache.is_closed
    update(cache, 1)


def test_a_copy_lives_on_when_the_original_is_gone(make_cache, tmp_path):
    before = Footprint.now()
    cache = TieredCache(
        device_bytes=5 * BLOCK, disk_bytes="1MiB", disk_dir=tmp_path, block_tokens=4
    )
    expected = update(cache, 30)
    fork = copy.deepcopy(cache)
    del cache
    gc.collect()
    assert same(contents(fork), [expected])
    del fork, expected
    assert Footprint.now() == before


def test_printing_tells_what_lies_where(make_cache):
    cache = make_cache(device_blocks=6)
    assert repr(cache) == "TieredCache(0 tokens, 0 layers)"
    update(cache, 50)
    contents(cache)
    stats = cache.stats()
    assert (stats.num_tokens, stats.batch, stats.num_layers) == (50, 1, 1)
    assert (stats.block_tokens, stats.block_bytes) == (4, BLOCK)
    assert stats.cold_blocks == placement(table(cache)).count("d") > 5
    assert stats.tiers[0].peak_bytes == stats.tiers[0].budget_bytes == 6 * BLOCK
    assert stats.tiers[1].blocks == stats.counters.stores
    assert 0 < stats.hit_share < 1
    text = str(cache)
    for word in ("50 tokens", "device", "disk", "24.0 KiB", "8.0 MiB", "hit share", "loads"):
        assert word in text
    cache.close()
    assert str(cache) == "TieredCache(closed, 1 layers)"


def test_stats_are_plain_data_and_a_table_for_notebooks(make_cache, tmp_path):
    with make_cache(device_blocks=12) as cache:
        cache.update(*new_tokens(1, 40), 0)
        stats = cache.stats()
        found = json.loads(json.dumps(stats.to_dict()))
        assert found["num_tokens"] == 40 and found["hit_share"] == stats.hit_share
        assert found["tiers"][0]["used_bytes"] == stats.tiers[0].used_bytes
        assert found["counters"]["stores"] == stats.counters.stores > 0
        html = cache._repr_html_()
        assert html.count("<meter") == len(stats.tiers) and "40 tokens" in html
        assert str(tmp_path) in html and "<b>TieredCache(40 tokens" in html
    assert cache._repr_html_() == "<b>TieredCache(closed, 1 layers)</b>"


def test_stats_of_an_empty_cache(make_cache):
    stats = make_cache().stats()
    assert (stats.num_tokens, stats.batch, stats.hit_share) == (0, 0, 1.0)
    assert "0 tokens" in str(stats)


def test_a_closed_cache_refuses_by_name(make_cache):
    with make_cache() as cache:
        update(cache, 9)
    assert cache.is_closed
    cache.close()
    with pytest.raises(ClosedCacheError, match="make a new TieredCache"):
        update(cache)
    with pytest.raises(ClosedCacheError):
        update(cache, layer=1)
    with pytest.raises(ClosedCacheError):
        copy.deepcopy(cache)
    with pytest.raises(ClosedCacheError):
        cache.layers[0].keys.materialize()


def test_windowed_layers_keep_transformers_own_classes(make_cache):
    from transformers import Gemma2Config

    cache = make_cache(Gemma2Config(num_hidden_layers=4, sliding_window=8))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "TieredLayer"] * 2
    assert cache.is_sliding == [True, False, True, False]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tiered"])
def test_a_forward_with_gradients_works_and_a_backward_is_refused(make_cache, implementation):
    model = copy.deepcopy(tiny_model("Llama"))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = model(prompt()).logits
    out = model(prompt(), past_key_values=make_cache(model.config))
    assert torch.allclose(out.logits, expected, atol=1e-4)
    assert out.logits.requires_grad
    with pytest.raises(BackwardError, match=r"torch\.no_grad\(\)"):
        out.logits.sum().backward()


def test_garbage_collection_gives_thread_file_and_memory_back(tmp_path):
    before = Footprint.now()
    cache = TieredCache(
        device_bytes=5 * BLOCK, disk_bytes="1MiB", disk_dir=tmp_path, block_tokens=4
    )
    update(cache, 60)
    contents(cache)
    assert Footprint.now() != before
    del cache
    assert Footprint.now() == before
    assert list(tmp_path.iterdir()) == []


def test_a_cache_in_a_reference_cycle_is_collected_too(tmp_path):
    before = Footprint.now()
    cache = TieredCache(
        device_bytes=5 * BLOCK, disk_bytes="1MiB", disk_dir=tmp_path, block_tokens=4
    )
    update(cache, 60)
    cache.myself = cache
    cache.handles = cache.layers[0].keys
    del cache
    assert Footprint.now() == before


class Interrupting:
    """A logits processor that raises after a few tokens."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, input_ids, scores):
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return scores


def test_an_interrupted_generate_leaves_a_usable_cache_and_then_nothing(tmp_path):
    model = tiny_model("Llama")
    before = Footprint.now()
    cache = TieredCache(
        device_bytes=5 * BLOCK, disk_bytes="1MiB", disk_dir=tmp_path, block_tokens=4
    )
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            prompt(),
            attention_mask=torch.ones_like(prompt()),
            past_key_values=cache,
            max_new_tokens=20,
            logits_processor=LogitsProcessorList([Interrupting(5)]),
        )
    assert cache.get_seq_length() == prompt().shape[1] + 4
    for manager in cache._owned.pool.managers:
        manager.check_integrity()
    assert len(contents(cache)) == 3
    del cache, manager
    assert Footprint.now() == before


KILLED = """
import os, signal, sys
import torch
from hf_tiered_cache import TieredCache
cache = TieredCache(device_bytes=20480, disk_bytes="1MiB", disk_dir=sys.argv[1], block_tokens=4)
cache.update(torch.ones(1, 2, 90, 8), torch.ones(1, 2, 90, 8), 0)
assert cache.stats().counters.stores > 0
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.path.dirname(os.path.dirname(hf_tiered_cache.__file__)),
        },
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_forks_decode_in_two_threads(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config, device_blocks=40)
    with torch.no_grad():
        model(prompt()[:, :-1], past_key_values=cache)
        alone = model(prompt(), past_key_values=DynamicCache()).logits[:, -1]
    results = {}

    def decode(name: int, fork: TieredCache) -> None:
        with torch.no_grad():
            results[name] = model(prompt()[:, -1:], past_key_values=fork).logits[:, -1]

    forks = [copy.deepcopy(cache) for _ in range(2)]
    threads = [
        threading.Thread(target=decode, args=(name, fork)) for name, fork in enumerate(forks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[0], alone, atol=1e-4)


def test_layers_of_two_shapes_share_the_budgets(make_cache):
    cache = make_cache(device_blocks=40, disk_bytes="1MiB")
    wide = torch.randn(1, 2, 60, 16)
    for start in range(0, 60, 6):
        update(cache, 6, layer=0)
        piece = wide[:, :, start : start + 6]
        cache.update(piece, piece, 1)
    stats = cache.stats()
    assert stats.tiers[0].used_bytes <= stats.tiers[0].peak_bytes <= 40 * BLOCK
    assert len(cache._owned.pool.managers) == 2
    assert torch.equal(cache.layers[1].values.materialize(), wide)
    for manager in cache._owned.pool.managers:
        manager.check_integrity()
