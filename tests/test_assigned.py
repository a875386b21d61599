"""`layer.keys = tensor`, `layer.values = tensor`: they replace what a layer holds."""

import copy

import pytest
import torch
from families import tiny_model
from support import new_tokens
from test_failed_forwards import PlannedError, hooked, mixer
from test_generate_parity import check_integrity, prompt
from transformers import DynamicCache

from hf_tiered_cache import OutOfBlocksError, UnsupportedInputError

ORDERS = [("keys", "values"), ("values", "keys")]


def filled(cache, num_tokens: int = 40, batch: int = 1, layer: int = 0):
    """The cache and a DynamicCache with the same tokens in one layer."""
    oracle = DynamicCache()
    for before in range(layer + 1):
        tokens = new_tokens(batch, num_tokens)
        for one in (cache, oracle):
            one.update(*tokens, before)
    return cache, oracle


def assert_same(cache, oracle) -> None:
    for layer, expected in zip(cache.layers, oracle.layers, strict=True):
        assert torch.equal(layer.keys.clone(), expected.keys)
        assert torch.equal(layer.values.clone(), expected.values)
        assert layer.keys.dtype == expected.keys.dtype
        assert layer.get_seq_length() == expected.get_seq_length()
    check_integrity(cache)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("length", [1, 7, 40, 90])
def test_keys_and_values_of_any_length_are_assigned_in_either_order(make_cache, order, length):
    cache, oracle = filled(make_cache(device_blocks=12))
    new = dict(zip(("keys", "values"), new_tokens(1, length), strict=True))
    for one in (cache, oracle):
        for part in order:
            setattr(one.layers[0], part, new[part])
            assert torch.equal(getattr(one.layers[0], part).clone(), new[part])
    assert_same(cache, oracle)
    more = new_tokens(1, 6)
    for one in (cache, oracle):
        one.update(*more, 0)
        one.crop(-3)
    assert_same(cache, oracle)


def test_another_batch_and_another_dtype_may_be_assigned(make_cache):
    cache, oracle = filled(make_cache())
    keys, values = (states.to(torch.bfloat16) for states in new_tokens(3, 9))
    more = [states.to(torch.bfloat16) for states in new_tokens(3, 2)]
    for one in (cache, oracle):
        one.layers[0].keys, one.layers[0].values = keys, values
        one.update(*more, 0)
        one.reorder_cache(torch.tensor([2, 0, 0]))
    assert_same(cache, oracle)


def test_keys_alone_may_be_assigned_where_they_fit(make_cache):
    cache, oracle = filled(make_cache())
    for one in (cache, oracle):
        one.layers[0].keys = one.layers[0].keys * 2
    assert_same(cache, oracle)


def test_a_part_of_what_is_there_may_be_assigned(make_cache):
    cache, oracle = filled(make_cache(device_blocks=12))
    for one in (cache, oracle):
        layer = one.layers[0]
        layer.keys = layer.keys[:, :, :-3]
        layer.values = layer.values[:, :, :-3]
    assert_same(cache, oracle)
    for one in (cache, oracle):
        layer = one.layers[0]
        layer.keys, layer.values = layer.keys, layer.values
    assert_same(cache, oracle)


def test_handles_of_another_cache_may_be_assigned(make_cache):
    (cache, _), (other, oracle) = filled(make_cache()), filled(make_cache(), 13)
    cache.layers[0].keys, cache.layers[0].values = other.layers[0].keys, other.layers[0].values
    other.reset()
    assert_same(cache, oracle)


def test_a_layer_that_is_empty_may_be_assigned_to(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config)
    keys, values = new_tokens(1, 9)
    cache.layers[1].values = values
    with pytest.raises(UnsupportedInputError, match="its keys are missing"):
        cache.layers[1].update(*new_tokens(1, 1))
    cache.layers[1].keys = keys
    assert torch.equal(cache.layers[1].keys.clone(), keys)
    assert cache.get_seq_length(1) == 9


def test_a_handle_keeps_what_it_saw_before_an_assignment(make_cache):
    cache, oracle = filled(make_cache())
    handle, expected = cache.layers[0].keys, oracle.layers[0].keys
    cache.layers[0].keys = expected * 2
    assert torch.equal(handle.clone(), expected)
    del handle
    cache.crop(-1)
    check_integrity(cache)
    assert cache._owned.pool.managers[0].device_tier.used_slots <= 10


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_half_assigned_layer_refuses_all_but_reading_and_the_other_half(make_cache, part):
    cache, oracle = filled(make_cache(), layer=1)
    twin = copy.deepcopy(cache)
    new = dict(zip(("keys", "values"), new_tokens(1, 7), strict=True))
    setattr(cache.layers[1], part, new[part])
    fork = copy.deepcopy(cache)
    uses = {
        "update": lambda: cache.layers[1].update(*new_tokens(1, 1)),
        "crop": lambda: cache.crop(-1),
        "reorder": lambda: cache.reorder_cache(torch.tensor([0])),
        "repeat": lambda: cache.batch_repeat_interleave(2),
        "select": lambda: cache.batch_select_indices(torch.tensor([0])),
    }
    shapes = r"layer 1 was half assigned: its keys are \[1, 2, \d+, 8\].* values \[1, 2, \d+, 4\]"
    for use in uses.values():
        with pytest.raises(UnsupportedInputError, match=shapes):
            use()
    assert torch.equal(cache.layers[0].keys.clone(), oracle.layers[0].keys)
    assert cache.layers[1].keys.shape[2] == cache.get_seq_length(1) == (7 if part == "keys" else 40)
    other = "values" if part == "keys" else "keys"
    for one in (cache, fork):
        setattr(one.layers[1], other, new[other])
        one.layers[1].update(*new_tokens(1, 1))
    setattr(twin.layers[1], part, new[part])
    twin.reset()
    twin.update(*new_tokens(2, 3), 0)
    for one in (cache, fork, twin):
        check_integrity(one)


@pytest.mark.parametrize("wrong", [None, torch.ones(2, 3, 4), torch.ones(1, 2, 3, 8).int(), 1.0])
def test_what_can_be_no_keys_is_refused_and_nothing_changes(make_cache, wrong):
    cache, oracle = filled(make_cache())
    with pytest.raises(UnsupportedInputError, match=r"keys of layer 0 = .*expected a floating"):
        cache.layers[0].keys = wrong
    assert_same(cache, oracle)


def test_what_finds_no_room_leaves_the_layer_as_it_was(make_cache):
    cache, oracle = filled(make_cache(device_blocks=14, disk_bytes=0))
    keys, values = new_tokens(1, 400)
    cache.layers[0].keys = keys
    with pytest.raises(OutOfBlocksError):
        cache.layers[0].values = values
    assert torch.equal(cache.layers[0].values.clone(), oracle.layers[0].values)
    cache.reset()
    check_integrity(cache)
    assert cache._owned.pool.managers[0].device_tier.used_slots == 0


def test_no_write_into_a_layers_keys_is_lost(make_cache):
    cache, oracle = filled(make_cache())
    with pytest.raises(UnsupportedInputError, match=r"layer.keys = copy"):
        cache.layers[0].keys.zero_()
    with pytest.raises(UnsupportedInputError, match="read-only"):
        cache.layers[0].keys[:, :, 2:] = 1
    assert_same(cache, oracle)


# --- in the life of a model ----------------------------------------------------------------------


def keep_every_other(cache, layer: int) -> None:
    """What compressing libraries do: fewer tokens, the same in keys and values."""
    one = cache.layers[layer]
    if not one.is_sliding:
        one.keys, one.values = one.keys[:, :, ::2].contiguous(), one.values[:, :, ::2].contiguous()


@torch.no_grad()
def logits(model, cache, ids):
    length = cache.get_seq_length()
    positions = torch.arange(length, length + ids.shape[1])[None]
    return model(ids, past_key_values=cache, position_ids=positions).logits


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_a_model_goes_on_with_what_was_assigned_between_forwards(make_cache, family):
    model = tiny_model(family)
    cache, oracle = make_cache(model.config, device_blocks=24), DynamicCache(config=model.config)
    for one in (cache, oracle):
        logits(model, one, prompt())
        for layer in range(len(one.layers)):
            keep_every_other(one, layer)
    for _ in range(3):
        got, expected = (logits(model, one, prompt()[:, :2]) for one in (cache, oracle))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_model_goes_on_with_what_was_assigned_within_a_forward(make_cache):
    """As hooks of attention modules do, after the layer has attended."""
    model = tiny_model("Llama")
    caches = make_cache(model.config, device_blocks=24), DynamicCache(config=model.config)
    for one in caches:
        hooks = [
            mixer(model, layer).register_forward_hook(
                lambda *_, one=one, layer=layer: keep_every_other(one, layer)
            )
            for layer in range(3)
        ]
        logits(model, one, prompt())
        for hook in hooks:
            hook.remove()
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == -(-prompt().shape[1] // 2)
    got, expected = (logits(model, one, prompt()[:, :2]) for one in caches)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_within", [False, True], ids=["between", "within"])
@pytest.mark.parametrize("family", ["Llama", "Gemma 3", "Falcon-H1"])
def test_a_forward_that_fails_gives_back_what_assignments_replaced(make_cache, family, is_within):
    model = tiny_model(family)
    cache = make_cache(model.config, device_blocks=32)
    logits(model, cache, prompt())
    keys_before = [layer.keys for layer in cache.layers]
    if not is_within:
        for layer in range(len(cache.layers)):
            keep_every_other(cache, layer)
    twin = copy.deepcopy(cache)
    with hooked(model.get_output_embeddings().register_forward_hook, PlannedError()):
        hooks = [
            mixer(model, layer).register_forward_hook(
                lambda *_, layer=layer: keep_every_other(cache, layer)
            )
            for layer in range(len(cache.layers))
            if is_within
        ]
        with pytest.raises(PlannedError):
            logits(model, cache, prompt()[:, :3])
        for hook in hooks:
            hook.remove()
    assert keys_before
    del keys_before
    for _ in range(2):
        got, expected = (logits(model, one, prompt()[:, :2]) for one in (cache, twin))
        assert torch.equal(got, expected)
    check_integrity(cache)
