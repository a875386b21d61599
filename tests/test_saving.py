"""Saving caches, layers and handles, and going on with them, here and in another process."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import tiny_model
from support import new_tokens
from test_generate_parity import check_integrity, prompt
from transformers import DynamicCache, EncoderDecoderCache

from hf_tiered_cache import ClosedCacheError, TieredCache, UnsupportedInputError
from hf_tiered_cache.integration.cache_layers import TieredLayer

HERE = Path(__file__).parent
FAMILIES = ["Llama", "Gemma 3", "Qwen3-Next", "Falcon-H1"]


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def through_torch(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {"pickle": through_pickle, "torch.save": through_torch}


def generated(model, cache, new=8):
    """Greedy tokens behind the cache's."""
    ids = torch.cat([prompt(), torch.tensor([[5, 7]])], 1)
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": new, "do_sample": False, "attention_mask": mask}
    return model.generate(ids, past_key_values=cache, **how)[0].tolist()


@torch.no_grad()
def prefilled(model, cache):
    model(prompt(), past_key_values=cache)
    return cache


def contents(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@pytest.mark.parametrize(
    ("family", "way"), [*((one, "pickle") for one in FAMILIES), ("Gemma 3", "torch.save")]
)
def test_a_saved_cache_goes_on_as_the_one_that_was_saved(make_cache, way, family):
    model = tiny_model(family)
    cache = prefilled(model, make_cache(model.config, device_blocks=24))
    expected = generated(model, prefilled(model, DynamicCache(config=model.config)))
    with WAYS[way](cache) as loaded:
        assert type(loaded) is TieredCache
        assert loaded.stats().block_tokens == 4
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
        assert loaded.stats().tiers[0].budget_bytes == cache.stats().tiers[0].budget_bytes
        assert generated(model, loaded) == expected
        check_integrity(loaded)
        assert cache.get_seq_length() == prompt().shape[1]
    assert generated(model, cache) == expected


LOAD = """
import pickle, sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests", f"{sys.argv[1]}/eval"]
from families import tiny_model
from test_saving import FAMILIES, generated
for family in FAMILIES:
    with open(f"{sys.argv[2]}/{family}", "rb") as file:
        cache = pickle.load(file)
    print(generated(tiny_model(family), cache))
"""


def test_another_process_goes_on_with_what_was_saved(make_cache, tmp_path):
    expected = []
    for family in FAMILIES:
        model = tiny_model(family)
        cache = prefilled(model, make_cache(model.config, device_blocks=24))
        with open(tmp_path / family, "wb") as file:
            pickle.dump(cache, file)
        expected.append(generated(model, prefilled(model, DynamicCache(config=model.config))))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, HERE.parent, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert [line for line in done.stdout.splitlines() if line[0] == "["] == list(map(str, expected))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_cache_without_config_and_one_of_two_parts_are_saved_too(make_cache, way):
    cache = make_cache(device_blocks=12)
    for layer in range(2):
        cache.update(*new_tokens(2, 13), layer)
    both = EncoderDecoderCache(cache, DynamicCache())
    for loaded in (way(cache), way(both).self_attention_cache):
        assert all(
            torch.equal(a, b)
            for mine, theirs in zip(contents(loaded), contents(cache), strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        loaded.update(*new_tokens(2, 1), 0)
        loaded.close()
    with way(make_cache()) as empty:
        empty.update(*new_tokens(1, 1), 0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_layer_is_saved_by_itself_or_with_its_neighbours(make_cache, way):
    cache = make_cache()
    for layer in range(2):
        cache.update(*new_tokens(1, 9), layer)
    first, second = way(cache.layers)
    assert first._owned is second._owned
    assert [type(first), type(second)] == [TieredLayer, TieredLayer]
    assert torch.equal(first.keys.clone(), cache.layers[0].keys.clone())
    (alone,) = way(cache.layers[1:])
    alone.update(*new_tokens(1, 2))
    assert alone.get_seq_length() == 11
    assert cache.get_seq_length(1) == 9


def test_a_half_assigned_layer_is_still_half_assigned_when_it_is_loaded(make_cache):
    cache = make_cache()
    cache.update(*new_tokens(1, 9), 0)
    keys, values = new_tokens(1, 5)
    cache.layers[0].keys = keys
    with through_pickle(cache) as loaded:
        with pytest.raises(UnsupportedInputError, match="half assigned"):
            loaded.update(*new_tokens(1, 1), 0)
        loaded.layers[0].values = values
        assert torch.equal(loaded.layers[0].keys.clone(), keys)


def test_a_closed_cache_is_not_saved(make_cache):
    cache = make_cache()
    cache.update(*new_tokens(1, 9), 0)
    cache.close()
    with pytest.raises(ClosedCacheError):
        pickle.dumps(cache)


# --- handles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*WAYS.values(), copy.deepcopy], ids=[*WAYS, "deepcopy"])
@pytest.mark.parametrize("part", [lambda keys: keys, lambda keys: keys[:, :, 2:]])
def test_a_handle_is_saved_as_the_dense_tensor(make_cache, way, part):
    cache = make_cache(device_blocks=12)
    keys, values = new_tokens(1, 50)
    cache.update(keys, values, 0)
    loaded = way({"keys": part(cache.layers[0].keys)})["keys"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, part(keys))
    loaded.zero_()
    assert torch.equal(cache.layers[0].keys.clone(), keys)


def test_safetensors_take_a_copy_of_a_handle(make_cache):
    cache = make_cache()
    keys, values = new_tokens(1, 9)
    cache.update(keys, values, 0)
    with pytest.raises(UnsupportedInputError, match=r"\.clone\(\)"):
        safetensors.torch.save({"keys": cache.layers[0].keys})
    saved = safetensors.torch.save({"keys": cache.layers[0].keys.clone()})
    assert torch.equal(safetensors.torch.load(saved)["keys"], keys)


def send(queue, thing) -> None:
    """In another process: what was read, through a queue."""
    layer = thing.layers[0] if isinstance(thing, TieredCache) else thing
    queue.put(layer.keys.tolist() if hasattr(layer, "keys") else layer.tolist())


@pytest.mark.parametrize("what", ["cache", "layer", "handle"])
def test_processes_send_each_other_what_they_hold(make_cache, what):
    cache = make_cache(device_blocks=12)
    keys, values = new_tokens(1, 30)
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    context = torch.multiprocessing.get_context("fork")
    to_child, from_child = context.Queue(), context.SimpleQueue()
    child = context.Process(target=lambda: send(from_child, to_child.get()))
    child.start()
    to_child.put({"cache": cache, "layer": layer, "handle": layer.keys}[what])
    assert torch.equal(torch.tensor(from_child.get()), keys)
    child.join(20)
    assert child.exitcode == 0
