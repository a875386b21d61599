"""A device or a host that says no: a clear error, or a slower way, and a usable process."""

import gc

import pytest
import torch
from gpu.models import generate, least_bytes, model_on, prompt_on
from transformers import DynamicCache

from hf_tiered_cache import TieredCacheError
from hf_tiered_cache.devices.pinning import CudaPinning

HOST = {"host_bytes": "64MiB", "disk_bytes": 0}


def check_usable(make_cache, gpu: torch.device) -> None:
    """A new cache in the same process does what it should."""
    model, ids = model_on(gpu, "Llama"), prompt_on(gpu)
    expected, _ = generate(model, DynamicCache(), ids)
    cache = make_cache(model.config, None, device_bytes="2MiB", **HOST)
    tokens, _ = generate(model, cache, ids)
    assert torch.equal(tokens, expected)


def test_a_budget_larger_than_the_device_is_refused(make_cache, gpu):
    too_much = 2 * torch.cuda.get_device_properties(gpu).total_memory
    before = torch.cuda.memory_allocated(gpu)
    cache = make_cache(None, None, device_bytes=too_much, **HOST)
    with pytest.raises((torch.OutOfMemoryError, TieredCacheError), match=r"device_bytes|memory"):
        cache.update(*torch.randn(2, 1, 2, 8, 8, device=gpu).unbind(0), 0)
    cache.close()
    assert torch.cuda.memory_allocated(gpu) <= before + (1 << 20)
    check_usable(make_cache, gpu)


def test_a_device_that_is_full_is_told_and_nothing_is_lost(make_cache, gpu):
    """Memory runs out while a model computes, not in the cache: it goes on afterwards."""
    model, ids = model_on(gpu, "Llama"), prompt_on(gpu)
    expected, _ = generate(model, DynamicCache(), ids)
    cache = make_cache(model.config, None, device_bytes="2MiB", **HOST)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: torch.empty(1 << 50, dtype=torch.uint8, device=gpu)
    )
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        model(ids[:, 70:90], past_key_values=cache)
    hook.remove()
    for layer in cache.layers:
        if layer.get_seq_length() > 70:  # the failed forward came this far
            layer.crop(70 - layer.get_seq_length())
    tokens, _ = generate(model, cache, ids)
    assert torch.equal(tokens, expected)
    check_usable(make_cache, gpu)


def test_memory_that_cannot_be_pinned_is_used_all_the_same(make_cache, gpu, monkeypatch):
    monkeypatch.setattr(CudaPinning, "register", lambda *_: False)
    model, ids = model_on(gpu, "Llama"), prompt_on(gpu)
    expected, _ = generate(model, DynamicCache(), ids)
    knobs = {**HOST, "device_bytes": least_bytes(make_cache, model, ids, **HOST)}
    cache = make_cache(model.config, None, **knobs)
    tokens, _ = generate(model, cache, ids)
    assert torch.equal(tokens, expected)
    (host,) = [tier for tier in cache.stats().tiers if tier.name == "host"]
    assert "pinning failed" in host.where


def test_pinning_that_raises_is_told(make_cache, gpu, monkeypatch):
    def refuse(*_: object) -> bool:
        raise RuntimeError("planted: no more locked memory")

    model, ids = model_on(gpu, "Llama"), prompt_on(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(CudaPinning, "register", refuse)
        cache = make_cache(model.config, None, device_bytes="1MiB", **HOST)
        with pytest.raises(TieredCacheError, match="planted: no more locked memory"):
            generate(model, cache, ids.repeat(1, 20))
        cache.close()
    check_usable(make_cache, gpu)


def test_closing_returns_the_memory_of_the_device(make_cache, gpu):
    """Its slab, which is as large as the budget from the first tokens on, whoever refers to the
    cache; a handle on keys that somebody still holds cannot be read any more, and keeps nothing."""
    gc.collect()  # slabs of caches in cycles of garbage would go meanwhile
    before = torch.cuda.memory_allocated(gpu)
    cache = make_cache(None, None, device_bytes="256MiB", **HOST)
    keys, _ = cache.update(*torch.randn(2, 1, 2, 8, 8, device=gpu).unbind(0), 0)
    assert torch.cuda.memory_allocated(gpu) >= before + (256 << 20)
    cache.close()
    assert keys.shape == (1, 2, 8, 8)
    assert torch.cuda.memory_allocated(gpu) <= before + (1 << 20)
