"""Bars and times of a generation are taken from the forwards that really happened."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tiered_cache import TieredCache
from hf_tiered_cache.integration import progress
from hf_tiered_cache.integration.progress import generation_progress


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def test_a_chunked_prompt_of_50_and_6_new_tokens_are_counted_as_50_and_5(model):
    prompt = torch.randint(0, 50, (1, 50))
    with generation_progress(model, prompt_tokens=50, new_tokens=6) as timing:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=TieredCache(device_bytes="64MiB", disk_bytes=0),
            prefill_chunk_size=16,
            max_new_tokens=6,
            min_new_tokens=6,
        )
    assert (timing.prefill_tokens, timing.decode_tokens) == (50, 5)
    assert timing.prefill_rate > 0
    assert timing.decode_rate > 0


def test_bars_tell_what_the_cache_does(model, monkeypatch, capsys):
    monkeypatch.setattr(progress, "POSTFIX_SECONDS", 0.0)
    # Bars are drawn again after 0.1 s, which a fast machine does not take.
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0, miniters=1))
    prompt = torch.randint(0, 50, (1, 20))
    with (
        TieredCache(device_bytes="64MiB", disk_bytes=0) as cache,
        generation_progress(model, prompt_tokens=20, new_tokens=4),
    ):
        model.generate(prompt, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    assert "hit 100%, device " in capsys.readouterr().err


def test_the_hook_is_gone_after_an_exception(model):
    with (
        pytest.raises(KeyboardInterrupt),
        generation_progress(model, prompt_tokens=1, new_tokens=1),
    ):
        raise KeyboardInterrupt
    assert len(model._forward_hooks) == 0
