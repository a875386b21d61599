"""`speculate`: the tokens of plain `generate`, with several of them for each read of cold blocks."""

import pytest
import torch
from test_generate_parity import check_integrity, prompt, tiny_model
from transformers import (
    DynamicCache,
)

from hf_tiered_cache import speculate

NEW_TOKENS = 40
FEW = 24  # device blocks: most of a prompt is cold


def generate(model, cache, ids=None, **kwargs):
    ids = prompt() if ids is None else ids
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "GPTNeoX", "Phi3", "Mixtral"])
@pytest.mark.parametrize("draft_tokens", [1, 5, None])
def test_greedy_tokens_are_those_of_a_dynamic_cache(make_cache, family, draft_tokens):
    model = tiny_model(family)
    expected = generate(model, DynamicCache())
    cache = make_cache(model.config, FEW)
    tokens = generate(model, cache, custom_generate=speculate, draft_tokens=draft_tokens)
    assert torch.equal(tokens, expected)
    assert cache.get_seq_length() == tokens.shape[1] - 1
    counts = cache.stats().speculation
    assert counts.tokens == NEW_TOKENS - 1  # the first one comes of the prompt
    assert counts.passes + counts.accepted == counts.tokens
    assert cache.stats().cold_blocks > 0
    check_integrity(cache)
