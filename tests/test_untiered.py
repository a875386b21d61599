"""What is not kept in blocks is counted and shown, and said where no budget can hold it."""

from functools import cache as once

import pytest
import torch
from families import tiny_model
from test_failed_forwards import PlannedError, hooked
from test_generate_parity import prompt
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_tiered_cache import UnsupportedInputError

INDEXED = ("deepseek_v32", "glm_moe_dsa")


@once
def indexed_model(kind: str):
    """A tiny model whose layers choose by an indexer what they attend."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
        **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    )
    return AutoModelForCausalLM.from_config(config).eval()


def model_of(kind: str):
    return indexed_model(kind) if kind in INDEXED else tiny_model(kind)


@torch.no_grad()
def forward(model, cache, ids=None):
    return model(prompt() if ids is None else ids, past_key_values=cache).logits


@pytest.fixture
def told(told_by):
    return told_by("integration.untiered")


def num_bytes(value) -> int:
    """Of all tensors in it that are no mere numbers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.dim() else 0
    values = value.values() if isinstance(value, dict) else value if type(value) is list else ()
    return sum(map(num_bytes, values))


@pytest.mark.parametrize("kind", ["Llama", "Gemma 3", "Qwen3-Next", "LFM2", *INDEXED])
def test_what_lies_in_no_block_is_counted_and_shown(make_cache, kind):
    model = model_of(kind)
    cache, dynamic = make_cache(model.config), DynamicCache(config=model.config)
    assert cache.stats().untiered_bytes == 0
    forward(model, cache), forward(model, dynamic)
    full = kind == "Llama"
    held = [
        num_bytes(vars(theirs))
        for mine, theirs in zip(cache.layers, dynamic.layers, strict=True)
        if type(mine) is type(theirs)
    ]
    stats = cache.stats()
    assert stats.untiered_bytes == sum(held)
    assert stats.untiered_layers == sum(size > 0 for size in held)
    assert stats.num_tokens == prompt().shape[1]
    assert stats.batch == 1
    assert ("beside the blocks, in no budget" in str(cache)) == (not full) == bool(sum(held))
    assert f"{prompt().shape[1]} tokens x 1 in" in str(cache)
    cache.reset()
    assert cache.stats().num_tokens == 0


def test_linear_states_beside_blocks_are_counted(make_cache):
    model = tiny_model("Falcon-H1")
    cache = make_cache(model.config)
    forward(model, cache)
    layers = cache.layers
    states = sum(num_bytes(one.conv_states) + num_bytes(one.recurrent_states) for one in layers)
    stats = cache.stats()
    assert stats.untiered_bytes == states > 0
    assert (stats.num_layers, stats.untiered_layers) == (len(layers), 0)


@pytest.mark.parametrize("kind", INDEXED)
def test_a_budget_that_cannot_be_kept_is_said_once(make_cache, told, kind):
    for _ in range(2):
        make_cache(model_of(kind).config)
    (message,) = told
    assert "2 layers" in message and "device_bytes" in message and "DynamicIndexedLayer" in message


@pytest.mark.parametrize("kind", ["Llama", "Gemma 3", "Qwen3-Next", "Falcon-H1"])
def test_nothing_is_said_where_budgets_hold(make_cache, told, kind):
    make_cache(model_of(kind).config)
    assert told == []


@pytest.mark.parametrize("kind", INDEXED)
def test_a_model_with_an_indexer_is_right_and_without_config_says_what_to_do(make_cache, kind):
    model = model_of(kind)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt())}
    cache = make_cache()
    with pytest.raises(UnsupportedInputError, match=r"TieredCache\(config=model.config\)"):
        model.generate(prompt(), past_key_values=cache, **how)
    assert cache.get_seq_length() == 0
    dynamic = DynamicCache(config=model.config)
    expected = model.generate(prompt(), past_key_values=dynamic, **how)
    cache = make_cache(model.config)
    assert torch.equal(model.generate(prompt(), past_key_values=cache, **how), expected)


@pytest.mark.parametrize("kind", INDEXED)
def test_an_indexer_goes_back_when_a_forward_fails(make_cache, kind):
    model = model_of(kind)
    cache, dynamic = make_cache(model.config), DynamicCache(config=model.config)
    for one in (cache, dynamic):
        forward(model, one)
    register = model.get_output_embeddings().register_forward_hook
    with hooked(register, PlannedError()), pytest.raises(PlannedError):
        forward(model, cache, prompt()[:, :5])
    for _ in range(2):
        got, expected = (forward(model, one, prompt()[:, :2]) for one in (cache, dynamic))
        torch.testing.assert_close(got, expected)
