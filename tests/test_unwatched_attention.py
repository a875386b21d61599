"""Layers and attention driven by hand, outside of any model: a forward that fails in attention is
undone as well, in every layer."""

import errno
from typing import Any

import pytest
import torch
from support import new_tokens
from test_generate_parity import check_integrity
from tiers.faulty_file import FaultyFile, fails_with

from hf_tiered_cache import TierIOError, tiered_attention_forward
from hf_tiered_cache.blocks import assembly
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.tiers.disk import DiskTier

LAYERS = 3


class Attention(torch.nn.Module):
    """A module of one's own."""

    is_causal = True


@pytest.fixture(autouse=True)
def faulty_disks(monkeypatch):
    class FaultyDisk(DiskTier):
        def __init__(self, *args: Any, **knobs: Any) -> None:
            super().__init__(*args, open_file=FaultyFile, **knobs)

    monkeypatch.setattr(assembly, "DiskTier", FaultyDisk)


def step(cache, all_tokens, how) -> list[torch.Tensor]:
    outs = []
    for layer, (keys, values) in enumerate(all_tokens):
        query = torch.ones(1, 4, keys.shape[2], 8)
        handles = cache.update(keys, values, layer)
        outs.append(tiered_attention_forward(Attention(), query, *handles, None, **how)[0])
    return outs


def fail_reads(cache) -> dict:
    """Let every read of the disk fail from now on; clear what is returned to heal it."""
    (manager,) = cache._owned.pool.managers
    file = manager.tiers[-1]._file
    for call in range(file.num_calls["read"], file.num_calls["read"] + 1000):
        file.plan["read", call] = fails_with(errno.EIO)
    return file.plan


@pytest.mark.parametrize("how", [{}, {"output_attentions": True}], ids=["streamed", "dense"])
@pytest.mark.parametrize("failing", range(LAYERS))
def test_a_read_that_fails_in_attention_undoes_the_forward(make_cache, monkeypatch, failing, how):
    cache, twin = make_cache(device_blocks=16), make_cache(device_blocks=16)
    prompt, tokens = ([new_tokens(1, n) for _ in range(LAYERS)] for n in (90, 2))
    for one in (cache, twin):
        step(one, prompt, {})
    plan = {}
    update = cache.update

    def failing_update(keys, values, layer):
        handles = update(keys, values, layer)
        if layer == failing:
            plan["of the disk"] = fail_reads(cache)
        return handles

    monkeypatch.setattr(cache, "update", failing_update)
    with pytest.raises(TierIOError):
        step(cache, tokens, how)
    monkeypatch.undo()
    plan["of the disk"].clear()
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [90] * LAYERS
    for _ in range(2):
        got, expected = (step(one, tokens, how) for one in (cache, twin))
        assert all(map(torch.equal, got, expected))
    check_integrity(cache)


def test_ctrl_c_in_attention_undoes_the_forward(make_cache, monkeypatch):
    cache = make_cache()
    prompt, tokens = ([new_tokens(1, n) for _ in range(LAYERS)] for n in (30, 2))
    step(cache, prompt, {})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "paged_attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(cache, tokens, {})
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [30] * LAYERS
    check_integrity(cache)


def test_what_is_merely_refused_in_attention_undoes_nothing(make_cache):
    cache = make_cache()
    prompt = [new_tokens(1, 30) for _ in range(LAYERS)]
    step(cache, prompt, {})
    handles = cache.layers[0].keys, cache.layers[0].values
    with pytest.raises(RuntimeError):
        tiered_attention_forward(Attention(), torch.ones(1, 4, 1, 7), *handles, None)
    assert cache.get_seq_length() == 30
