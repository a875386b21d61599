"""Flash attention in the place of another kernel, in whole models: here by hand and on the CPU."""

import pytest
import torch
from support import double_copy
from test_generate_parity import padded, prompt, run, tiny_model
from transformers import DynamicCache

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import flash, ops, reference


@pytest.fixture
def prefills(monkeypatch):
    """Numbers of queries that flash attention answered in place of the reference."""
    seen: list[int] = []
    whole = reference.attend_blocks

    def attend_blocks(state, query, view, call):
        if flash.not_supported_reasons(query, view.layout, call):
            whole(state, query, view, call)
        else:
            seen.append(query.shape[2])
            flash.attend_blocks(state, query, view, call)

    monkeypatch.setattr(reference, "attend_blocks", attend_blocks)
    with ops.use_kernel("reference"):
        yield seen


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "GPT2"])
def test_tokens_are_those_of_a_dynamic_cache(make_cache, prefills, family):
    model = tiny_model(family)
    expected, logits = run(model, DynamicCache())
    tokens, mine = run(model, make_cache(model.config, 64))
    assert torch.equal(tokens, expected)
    assert (mine - logits).abs().max() < 2e-4
    assert prefills == [37] * 3


@pytest.mark.parametrize("is_padded", [False, True])
def test_prefill_in_chunks_and_left_padded(make_cache, prefills, is_padded):
    model = tiny_model("Llama")
    ids, mask = padded() if is_padded else (prompt(2), None)
    expected, _ = run(model, DynamicCache(), ids, mask)
    try:
        model.set_attn_implementation("tiered")  # which brings no dense masks
        tokens, _ = run(model, make_cache(model.config, 64), ids, mask, prefill_chunk_size=18)
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(tokens, expected)
    assert prefills == [18] * 6, "the last chunk, of one query, is another kernel's"


def test_bfloat16_logits_are_about_as_close_to_float64_as_those_of_sdpa(make_cache, prefills):
    model = tiny_model("Llama")
    ids = prompt(8)
    with torch.no_grad():
        half = double_copy(model).bfloat16()
        exact = double_copy(half)(ids).logits
        dense = half(ids, past_key_values=DynamicCache()).logits
        mine = half(ids, past_key_values=make_cache(half.config, 600)).logits
    ours, theirs = ((logits - exact).norm() for logits in (mine, dense))
    assert ours <= 1.3 * theirs
    assert prefills == [37] * 3


def test_chunks_that_cut_a_group_would_be_told(make_cache, prefills):
    """A stream that is not aligned to groups cannot change bits in silence."""
    model = tiny_model("Llama")
    with pytest.raises(UnsupportedInputError, match=r"flash\.group_columns: 16 blocks"):
        run(model, make_cache(model.config, 12))
