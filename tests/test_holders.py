"""What holds a cache's keys and values keeps them: a handle, a layer, a copy. The last one to go
gives everything back, at once."""

import copy
import gc

import pytest
import torch
from support import Footprint, new_tokens
from transformers import DynamicCache

from hf_tiered_cache import ClosedCacheError, TieredCache


@pytest.fixture
def make(tmp_path):
    """Makes a cache that nobody else holds, of blocks of 4 tokens, few of them on the device."""

    def new(config=None) -> TieredCache:
        return TieredCache(
            config, device_bytes=12 * 4096, disk_bytes="4MiB", disk_dir=tmp_path, block_tokens=4
        )

    return new


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Reference counts alone must close what a test made."""
    before = Footprint.now()
    gc.disable()
    yield
    after = Footprint.now(collect=False)
    gc.enable()
    assert after == before


def fill(cache: TieredCache, num_tokens: int = 40, layer: int = 0):
    """Bring tokens, most of which go to disk; return (keys, values), dense."""
    tokens = new_tokens(1, num_tokens)
    cache.update(*tokens, layer)
    return tokens


def test_a_handle_outlives_its_cache(make):
    cache = make()
    dense = fill(cache)
    handles = cache.layers[0].keys, cache.layers[0].values
    del cache
    for handle, expected in zip(handles, dense, strict=True):
        assert torch.equal(handle.clone(), expected)


def test_a_handle_that_was_detached_outlives_its_cache(make):
    cache = make()
    keys, _ = fill(cache)
    handle = cache.layers[0].keys
    cache.crop(-20)
    del cache
    assert torch.equal(handle.clone(), keys)


def test_a_view_of_a_handle_needs_no_cache(make):
    cache = make()
    keys, _ = fill(cache)
    view = cache.layers[0].keys[:, :, 3:]
    del cache
    assert torch.equal(view.clone(), keys[:, :, 3:])


def test_layers_outlive_their_cache_and_go_on(make):
    cache = make()
    keys, values = fill(cache)
    (layer,) = cache.layers
    del cache
    more, more_values = new_tokens(1, 3)
    got, _ = layer.update(more, more_values)
    assert torch.equal(got.clone(), torch.cat([keys, more], 2))
    assert torch.equal(layer.values.clone(), torch.cat([values, more_values], 2))


def test_a_shallow_copy_is_the_same_cache_and_outlives_the_other_name(make):
    cache, oracle = make(), DynamicCache()
    keys, values = fill(cache)
    oracle.update(keys, values, 0)
    twin, oracle_twin = copy.copy(cache), copy.copy(oracle)
    assert (twin.layers is cache.layers) == (oracle_twin.layers is oracle.layers)
    more = new_tokens(1, 2)
    cache.update(*more, 0)
    oracle.update(*more, 0)
    assert twin.get_seq_length() == oracle_twin.get_seq_length() == 42
    del cache
    twin.update(*more, 0)
    oracle_twin.update(*more, 0)
    assert torch.equal(twin.layers[0].keys.clone(), oracle_twin.layers[0].keys)


def test_to_close_a_cache_closes_its_shallow_copies_and_handles(make):
    cache = make()
    fill(cache)
    twin, handle = copy.copy(cache), cache.layers[0].keys
    cache.close()
    assert twin.is_closed
    for use in (handle.clone, lambda: fill(twin), lambda: copy.deepcopy(twin)):
        with pytest.raises(ClosedCacheError):
            use()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_layer_goes_its_own_way_as_a_dynamic_one(make, copied):
    cache, oracle = make(), DynamicCache()
    keys, values = fill(cache)
    oracle.update(keys, values, 0)
    layer, oracle_layer = copied(cache.layers[0]), copied(oracle.layers[0])
    mine, theirs = new_tokens(1, 3), new_tokens(1, 5)
    cache.update(*mine, 0)
    oracle.update(*mine, 0)
    layer.update(*theirs)
    oracle_layer.update(*theirs)
    del cache.layers[:]
    for got, expected in ((layer, oracle_layer),):
        assert torch.equal(got.keys.clone(), expected.keys)
        assert torch.equal(got.values.clone(), expected.values)
    del cache
    assert torch.equal(layer.keys.clone(), oracle_layer.keys)


def test_the_handle_of_a_fork_outlives_it_and_the_original_goes_on(make):
    cache = make()
    keys, _ = fill(cache, 11)
    fork = copy.deepcopy(cache)
    more, _ = fill(fork, 2)
    handle = fork.layers[0].keys
    del fork
    assert torch.equal(handle.clone(), torch.cat([keys, more], 2))
    manager = cache._owned.pool.managers[0]
    held = manager.device_tier.used_slots
    del handle
    fill(cache, 1)
    assert manager.device_tier.used_slots < held
    manager.check_integrity()


def test_a_cache_dropped_in_the_middle_of_a_forward_of_its_own_leaves_nothing(make):
    cache = make()
    fill(cache)
    fill(cache, layer=1)
    fill(cache, 2)  # the second forward, which is not watched, stays open
    del cache
