"""Models of LongRoPE: transformers drops the given cache where they cross their original length."""

from functools import cache as once

import pytest
import torch
from families import tiny_model
from support import sharpen
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

ORIGINAL = 24


@once
def longrope_model(kind: str):
    torch.manual_seed(0)
    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0},
        **{"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 7.0]},
        "original_max_position_embeddings": ORIGINAL,
    }
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96},
        **{"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1},
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
    )
    return sharpen(AutoModelForCausalLM.from_config(config), factor=1.5)


@pytest.fixture
def told(told_by):
    return told_by("integration.forwards")


def generated(model, cache, num_tokens: int, new: int = 8):
    ids = torch.randint(2, 97, (1, num_tokens), generator=torch.Generator().manual_seed(5))
    how = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, past_key_values=cache, **how)


def test_a_cache_that_is_dropped_on_the_way_is_told_once(make_cache, told):
    model = longrope_model("phi3")
    for _ in range(2):
        cache = make_cache(model.config)
        got = generated(model, cache, ORIGINAL - 4)
        assert cache.get_seq_length() == ORIGINAL  # left behind
    assert torch.equal(got, generated(model, DynamicCache(config=model.config), ORIGINAL - 4))
    (message,) = told
    assert f"original_max_position_embeddings={ORIGINAL}" in message and "TieredCache()" in message


def test_a_cache_that_is_dropped_before_it_holds_anything_is_told(make_cache, told):
    model = longrope_model("phi3")
    cache = make_cache(model.config)
    generated(model, cache, ORIGINAL + 4)
    assert cache.get_seq_length() == 0
    assert len(told) == 1


def test_the_remedy_works(make_cache, told):
    model = longrope_model("phi3")
    cache = make_cache()
    got = generated(model, cache, ORIGINAL + 4)
    assert cache.get_seq_length() == ORIGINAL + 11
    assert told == []
    assert torch.equal(got, generated(model, DynamicCache(config=model.config), ORIGINAL + 4))


def test_who_stays_below_or_uses_no_cache_is_told_nothing(make_cache, told):
    model = longrope_model("phi3")
    cache = make_cache(model.config)
    generated(model, cache, ORIGINAL - 12)
    model(torch.full((1, ORIGINAL + 3), 5))
    generated(tiny_model("Llama"), make_cache(), ORIGINAL - 4)
    generated(model, None, ORIGINAL - 4)
    assert told == []
