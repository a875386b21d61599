"""`PagedStates`: looks like the dense tensor, holds none of its bytes, outlives every change."""

import gc

import pytest
import torch
from support import BLOCK_TOKENS, new_tokens, placement
from transformers.utils import logging

from hf_tiered_cache import TieredCache
from hf_tiered_cache.errors import BackwardError, ClosedCacheError
from hf_tiered_cache.integration.paged_states import PagedStates

BLOCK = 4096


@pytest.fixture
def make_cache(tmp_path):
    """A cache of blocks of 4 tokens over `device_blocks` blocks of memory and a disk."""
    caches = []

    def make(device_blocks: int = 64) -> TieredCache:
        cache = TieredCache(
            device_bytes=device_blocks * BLOCK,
            disk_bytes="4MiB",
            disk_dir=tmp_path,
            block_tokens=BLOCK_TOKENS,
        )
        caches.append(cache)
        return cache

    yield make
    for cache in caches:
        cache.close()


def filled(cache: TieredCache, num_tokens: int, batch: int = 2, layer: int = 0):
    """Update one layer; return (its handles, the dense tensors they stand for)."""
    keys, values = new_tokens(batch, num_tokens)
    return cache.update(keys, values, layer), (keys, values)


def test_a_handle_reports_what_the_dense_tensor_would(make_cache):
    (keys, values), (dense_keys, dense_values) = filled(make_cache(), 9)
    for handle, dense in ((keys, dense_keys), (values, dense_values)):
        assert isinstance(handle, PagedStates)
        assert isinstance(handle, torch.Tensor)
        assert handle.shape == dense.shape
        assert handle.stride() == torch.empty(dense.shape).stride()
        assert (handle.dtype, handle.device) == (dense.dtype, dense.device)
        assert handle.numel() == dense.numel()
        assert not handle.requires_grad
    assert repr(keys) == "PagedStates(keys, [2, 2, 9, 8], torch.float32, device=cpu)"


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x[:, :, 3:7].clone(),
        lambda x: x.transpose(1, 2).reshape(2, 9, -1),
        lambda x: torch.cat([x, x], dim=-2),
        lambda x: x.repeat_interleave(2, dim=1),
        lambda x: x @ x.mT,
        lambda x: x.to(torch.float64),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda x: torch.softmax(x, -1),
    ],
)
def test_any_torch_operation_sees_the_dense_tensor(make_cache, operation):
    (keys, _), (dense, _) = filled(make_cache(), 9)
    result = operation(keys)
    assert not isinstance(result, PagedStates)
    assert torch.equal(result, operation(dense))


def test_asking_for_a_contiguous_handle_builds_nothing(make_cache):
    (keys, _), _ = filled(make_cache(), 9)
    assert keys.contiguous() is keys


def test_materialising_is_told_once_with_the_fix(make_cache, monkeypatch):
    messages = []
    logger = logging.get_logger("hf_tiered_cache.integration.paged_states")
    monkeypatch.setattr(logger, "warning", lambda message, *_, **__: messages.append(message))
    type(logger).warning_once.cache_clear()  # other tests may have been told
    (keys, values), _ = filled(make_cache(), 9)
    for _ in range(3):
        _ = keys.sinh(), values.cosh()
    (message,) = messages
    assert "not bounded by the cache's budgets" in message
    assert "model.set_attn_implementation(" in message


@pytest.mark.parametrize("device_blocks", [64, 6])
def test_a_handle_keeps_what_it_saw(make_cache, device_blocks):
    cache = make_cache(device_blocks)
    handles, dense = [], []

    def remember(batch=1, num_tokens=0):
        if num_tokens:
            pair, (keys, values) = filled(cache, num_tokens, batch)
            past = dense[-1] if dense and dense[-1][0].shape[0] == batch else None
            if past is not None and past[0].shape[2] == cache.get_seq_length() - num_tokens:
                keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        else:
            pair = cache.layers[0].keys, cache.layers[0].values
            keys, values = (handle.materialize().clone() for handle in pair)
        handles.append(pair)
        dense.append((keys, values))

    def all_as_they_were():
        for pair, expected in zip(handles, dense, strict=True):
            for handle, tensor in zip(pair, expected, strict=True):
                assert torch.equal(handle.materialize(), tensor)
        for manager in cache._owned.pool.managers:
            manager.check_integrity()

    remember(num_tokens=6)
    remember(num_tokens=1)
    remember(num_tokens=9)
    all_as_they_were()
    cache.crop(-11)
    remember()
    remember(num_tokens=3)
    all_as_they_were()
    if device_blocks > 6:
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        remember()
        remember(batch=2, num_tokens=2)
        all_as_they_were()
    cache.reset()
    all_as_they_were()
    if device_blocks > 6:
        remember(batch=3, num_tokens=5)
        all_as_they_were()


def test_handles_over_cold_blocks_read_them_from_disk(make_cache):
    cache = make_cache(device_blocks=6)
    (early, _), (dense, _) = filled(cache, 7, batch=1)
    (late, _), (more, _) = filled(cache, 60, batch=1)
    table = cache.layers[0]._table
    assert placement(table).startswith("d" * 10)
    assert torch.equal(early.materialize(), dense)
    assert torch.equal(late.materialize(), torch.cat([dense, more], 2))


@pytest.mark.parametrize("detach", [False, True])
def test_handles_die_without_leaking_blocks(make_cache, detach):
    cache = make_cache()
    handles, _ = filled(cache, 15)
    manager = cache._owned.pool.managers[0]
    if detach:
        cache.crop(-13)
        filled(cache, 1)
        assert manager.device_tier.used_slots == 8 + 2  # the handle's eight and a copy per row
    del handles
    gc.collect()
    cache.crop(-1)
    manager.check_integrity()
    assert manager.device_tier.used_slots == (2 if detach else 8)
    cache.reset()
    manager.check_integrity()
    assert manager.device_tier.used_slots == 0


def test_a_detached_handle_holds_no_block_behind_its_tokens(make_cache):
    cache = make_cache()
    handles, (dense, _) = filled(cache, 3, batch=1)
    filled(cache, 40, batch=1)
    cache.reset()
    manager = cache._owned.pool.managers[0]
    manager.check_integrity()
    assert manager.device_tier.used_slots == 1
    assert torch.equal(handles[0].materialize(), dense)


def test_the_handle_of_a_cache_that_is_gone_raises(make_cache):
    cache = make_cache()
    (keys, _), _ = filled(cache, 5)
    cache.close()
    with pytest.raises(ClosedCacheError):
        keys.materialize()


def test_detached_keys_and_values_refuse_the_way_back(make_cache):
    cache = make_cache()
    keys, values = (tensor.requires_grad_() for tensor in new_tokens(1, 5))
    got_keys, got_values = cache.update(keys, values, 0)
    assert got_keys.requires_grad
    loss = (got_keys * 2).sum() + got_values.sum()
    with pytest.raises(BackwardError, match="use_cache=False"):
        loss.backward()
    with torch.no_grad():
        (plain, _) = cache.update(keys, values, 0)
    assert not plain.requires_grad
