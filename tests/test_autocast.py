"""Keys and values of several dtypes, as autocast brings them, are held as `DynamicCache` does."""

from contextlib import nullcontext

import pytest
import torch
from test_generate_parity import check_integrity, run, tiny_model
from transformers import DynamicCache

from hf_tiered_cache import OutOfBlocksError, UnsupportedInputError


def autocast(dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


@torch.no_grad()
def forwards(model, cache, dtypes) -> list[torch.Tensor]:
    """The logits of a forward of 9 tokens under each autocast, behind those before it."""
    generator = torch.Generator().manual_seed(5)
    logits = []
    for dtype in dtypes:
        ids = torch.randint(2, 97, (1, 9), generator=generator)
        with autocast(dtype):
            logits.append(model(ids, past_key_values=cache).logits)
    return logits


BRAIN = torch.bfloat16
WAYS = {
    "all of it": [BRAIN, BRAIN, BRAIN],
    "prompt": [BRAIN, None, None],
    "answer": [None, BRAIN, BRAIN],
    "in between": [None, BRAIN, None],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX"])
@pytest.mark.parametrize("device_blocks", [24, 64])
def test_autocast_may_come_and_go(make_cache, family, way, device_blocks):
    """The same dtypes, and logits nearer to `DynamicCache`'s than those are to float32's. Blocks of
    two dtypes share a device."""
    model, dtypes = tiny_model(family), WAYS[way]
    dynamic, tiered = DynamicCache(config=model.config), make_cache(model.config, device_blocks)
    expected, got = forwards(model, dynamic, dtypes), forwards(model, tiered, dtypes)
    exact = forwards(model, DynamicCache(config=model.config), [None] * 3)
    for mine, theirs, full in zip(got, expected, exact, strict=True):
        assert mine.dtype == theirs.dtype
        noise = (theirs - full).abs().max()
        assert (mine - theirs).abs().max() <= 2 * noise + 1e-4
    for mine, theirs in zip(tiered.layers, dynamic.layers, strict=True):
        assert (mine.keys.dtype, mine.values.dtype) == (theirs.keys.dtype, theirs.values.dtype)
    # The first layer's do not depend on attention.
    assert torch.equal(tiered.layers[0].keys.materialize(), dynamic.layers[0].keys)
    assert torch.equal(tiered.layers[0].values.materialize(), dynamic.layers[0].values)
    check_integrity(tiered)


def test_generate_under_autocast(make_cache):
    model = tiny_model("Llama")
    with autocast(BRAIN):
        tokens, _ = run(model, DynamicCache(config=model.config))
        assert torch.equal(run(model, make_cache(model.config, 6))[0], tokens)


def test_a_layer_becomes_wider_without_loss_and_never_by_a_mistake(make_cache):
    cache, dynamic = make_cache(None, 24), DynamicCache()
    states = [torch.randn(1, 2, 21, 8, dtype=BRAIN) for _ in range(2)]
    for one in (cache, dynamic):
        one.update(*states, 0)
    before = cache.layers[0].keys
    for wrong in [(2, 2, 1, 8), (1, 3, 1, 8), (1, 2, 1, 4)]:
        with pytest.raises(UnsupportedInputError, match="layer 0 holds"):
            cache.update(torch.zeros(wrong), torch.zeros(wrong), 0)
    assert cache.layers[0].dtype == BRAIN
    wide = torch.randn(1, 2, 3, 8)
    for one in (cache, dynamic):
        one.update(wide, wide.to(BRAIN), 0)
    with pytest.raises(UnsupportedInputError, match=r"torch.float32 .* in torch.bfloat16"):
        cache.update(wide.to(BRAIN), wide.to(BRAIN), 0)
    for one in (cache, dynamic):
        one.update(wide.to(BRAIN), wide, 0)
    assert torch.equal(cache.layers[0].keys.materialize(), dynamic.layers[0].keys)
    assert torch.equal(cache.layers[0].values.materialize(), dynamic.layers[0].values.float())
    assert torch.equal(before.materialize(), states[0])
    cache.crop(-6)
    assert torch.equal(cache.layers[0].keys.materialize(), states[0].float())
    check_integrity(cache)


@pytest.mark.parametrize("device_blocks", range(3, 12))
def test_on_a_full_device_a_layer_becomes_wider_or_stays_as_it_was(make_cache, device_blocks):
    cache = make_cache(None, device_blocks)
    generator = torch.Generator().manual_seed(1)
    narrow = torch.randn(1, 2, 150, 8, generator=generator).to(BRAIN)
    wide = torch.randn(1, 2, 3, 8, generator=generator)
    cache.update(narrow, narrow, 0)
    try:
        cache.update(wide, wide, 0)
        expected = torch.cat([narrow.float(), wide], 2)
    except OutOfBlocksError:
        expected = narrow
    for states in (cache.layers[0].keys, cache.layers[0].values):
        assert states.dtype == expected.dtype
        assert torch.equal(states.materialize(), expected)
    check_integrity(cache)
