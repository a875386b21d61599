"""`generate` with a `TieredCache` says what it says with a `DynamicCache`, whatever the budgets.

Tiny random models, sharpened until attention decides the tokens; `test_the_oracle_would_notice`
proves that they would say something else if cold blocks were lost.
"""

from functools import cache
from statistics import fmean, stdev

import pytest
import torch
import transformers
from support import double_copy, sharpen
from transformers import DynamicCache

from hf_tiered_cache.errors import OutOfBlocksError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 16},
    "Mistral": {**GROUPED, "sliding_window": None},
    "Phi3": GROUPED,
    "Mixtral": {**GROUPED, "num_local_experts": 2, "sliding_window": None},
    "GPTNeoX": SIZES,
    "GPT2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "vocab_size": 97,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
}
LAYERS = 3
PROMPT, NEW = 37, 12
SMALLEST = {1: LAYERS + 2, 2: 2 * LAYERS + 4}  # device blocks, by batch


@cache
def tiny_model(family: str) -> torch.nn.Module:
    """A random model of the family whose tokens depend on its attention."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    config._attn_implementation = "sdpa"
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    return sharpen(getattr(transformers, name)(config), factor=1.5)


def prompt(batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, PROMPT), generator=torch.Generator().manual_seed(5))


def run(model, cache, ids=None, mask=None, **how):
    """(tokens, logits of every new token) of one `generate`."""
    ids = prompt() if ids is None else ids
    torch.manual_seed(11)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **how},
    )
    return out.sequences, torch.stack(out.logits, 1)


def check_integrity(cache) -> None:
    for manager in cache._owned.pool.managers:
        manager.check_integrity()


@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_dynamic_cache_and_bits_do_not_depend_on_budgets(
    make_cache, family, how
):
    model = tiny_model(family)
    knobs = {"do_sample": True, "temperature": 0.9} if how == "sampled" else {}
    expected, reference = run(model, DynamicCache(), **knobs)
    assert len(set(expected[0, PROMPT:].tolist())) > 2, "a model that repeats itself proves nothing"
    by_size: dict[int | None, torch.Tensor] = {}
    least, some, all_blocks = SMALLEST[1], SMALLEST[1] + 7, 64
    budgets = {4: [least, some, all_blocks], 16: [least, all_blocks], None: [None]}
    if how == "sampled":
        budgets = {4: [least, all_blocks]}
    for block_tokens, sizes in budgets.items():
        for device_blocks in sizes:
            one = make_cache(model.config, device_blocks, block_tokens=block_tokens)
            tokens, logits = run(model, one, **knobs)
            assert torch.equal(tokens, expected), (block_tokens, device_blocks)
            assert (logits - reference).abs().max() < 2e-4
            assert torch.equal(logits, by_size.setdefault(block_tokens, logits))
            check_integrity(one)
            if block_tokens == 4:
                is_cold = one.stats().counters.cold_reads > 0
                assert is_cold == (device_blocks < all_blocks)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_the_oracle_would_notice_lost_blocks(make_cache, family):
    """Were the cold blocks left out, other tokens would come."""
    model = tiny_model(family)
    expected, _ = run(model, DynamicCache())
    tokens, _ = run(model, make_cache(model.config, SMALLEST[1], attend="resident_only"))
    assert not torch.equal(tokens, expected)


def test_logits_are_as_close_to_float64_as_those_of_sdpa(make_cache):
    """The rest of the model errs too, so a prompt's error scatters around sdpa's: how far the mean
    may lie above it follows from that scatter. Attention alone is compared in tests/kernels."""
    prompts = 12
    log_ratios = {}
    for family in ("Llama", "Qwen3", "Phi3", "GPTNeoX", "GPT2"):
        model = tiny_model(family)
        tokens, dense = run(model, DynamicCache(), prompt(prompts))
        _, tiered = run(model, make_cache(model.config, prompts * SMALLEST[1]), prompt(prompts))
        with torch.no_grad():
            exact = double_copy(model)(tokens).logits[:, PROMPT - 1 : -1]
        mine, theirs = ((it - exact).square().mean((1, 2)).sqrt() for it in (tiered, dense))
        log_ratios[family] = (mine / theirs).log().tolist()
    for family, ratios in log_ratios.items():
        assert excess(ratios) < 4, (family, ratios)
    assert excess([ratio for ratios in log_ratios.values() for ratio in ratios]) < 3, log_ratios


def excess(log_ratios: list[float]) -> float:
    """By how many standard errors the mean lies above 0."""
    return fmean(log_ratios) / (stdev(log_ratios) / len(log_ratios) ** 0.5)


def padded(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose second row has 11 pads on its left."""
    ids = prompt(batch)
    mask = torch.ones_like(ids)
    ids[1, :11], mask[1, :11] = 0, 0
    return ids, mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tiered"])
def test_left_padded_batches(make_cache, implementation):
    model = tiny_model("Llama")
    ids, mask = padded()
    expected, _ = run(model, DynamicCache(), ids, mask)
    try:
        model.set_attn_implementation(implementation)
        first, second = (make_cache(model.config, n) for n in (SMALLEST[2], 64))
        tokens, logits = run(model, first, ids, mask)
        assert torch.equal(tokens, expected)
        _, other = run(model, second, ids, mask)
        assert torch.equal(logits, other)
    finally:
        model.set_attn_implementation("sdpa")


UNUSUAL = {
    "Gemma2": {"sliding_window": 8, "attn_logit_softcapping": 2.0, "head_dim": 16},  # windows, caps
    "GptOss": {"sliding_window": 8, "head_dim": 16, "num_local_experts": 4},  # windows, sinks
}


@pytest.mark.parametrize("implementation", ["eager", "tiered"])
@pytest.mark.parametrize("family", UNUSUAL)
def test_windows_soft_caps_and_sinks(make_cache, family, implementation):
    torch.manual_seed(0)
    sizes = {**GROUPED, **UNUSUAL[family], "num_hidden_layers": 4}
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = "eager"
    model = sharpen(getattr(transformers, f"{family}ForCausalLM")(config), factor=1.5)
    for ids, mask in ((prompt(2), None), padded()):
        model.set_attn_implementation("eager")
        expected, _ = run(model, DynamicCache(config=config), ids, mask)
        model.set_attn_implementation(implementation)
        small, large = (make_cache(config, n) for n in (2 * 2 + 4, 64))
        tokens, logits = run(model, small, ids, mask)
        assert torch.equal(tokens, expected)
        assert small.stats().counters.cold_reads > 0
        if implementation == "tiered":
            assert torch.equal(logits, run(model, large, ids, mask)[1])


@pytest.mark.parametrize("implementation", ["sdpa", "tiered"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_chunked_prefill(make_cache, implementation, is_padded):
    model = tiny_model("Llama")
    ids, mask = padded() if is_padded else (prompt(2), None)
    expected, _ = run(model, DynamicCache(), ids, mask)
    try:
        model.set_attn_implementation(implementation)
        for device_blocks in (SMALLEST[2], 64):
            one = make_cache(model.config, device_blocks)
            tokens, _ = run(model, one, ids, mask, prefill_chunk_size=9)
            assert torch.equal(tokens, expected)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("device_blocks", [4 * LAYERS + 8, 200])
def test_beam_search(make_cache, device_blocks):
    model = tiny_model("Llama")
    how = {"num_beams": 4, "num_return_sequences": 2}
    expected, _ = run(model, DynamicCache(), **how)
    one = make_cache(model.config, device_blocks)
    tokens, _ = run(model, one, **how)
    assert torch.equal(tokens, expected)
    check_integrity(one)


def test_beams_hold_the_keys_of_their_own_histories(make_cache):
    """Tokens of tiny models do not notice a reordering that does nothing: compare the contents."""
    model = tiny_model("Llama")
    dense, tiered = DynamicCache(), make_cache(model.config, 4 * LAYERS + 8)
    run(model, dense, num_beams=4)
    run(model, tiered, num_beams=4)
    for mine, theirs in zip(tiered.layers, dense.layers, strict=True):
        torch.testing.assert_close(mine.keys.materialize(), theirs.keys, rtol=0, atol=2e-5)
        torch.testing.assert_close(mine.values.materialize(), theirs.values, rtol=0, atol=2e-5)


def test_prompt_lookup_crops_across_block_borders(make_cache):
    model = tiny_model("Llama")
    ids = prompt()[:, :10].repeat(1, 4)
    expected, _ = run(model, DynamicCache(), ids)
    for device_blocks in (SMALLEST[1], 64):
        one = make_cache(model.config, device_blocks)
        tokens, _ = run(model, one, ids, prompt_lookup_num_tokens=6)
        assert torch.equal(tokens, expected)
        check_integrity(one)


def test_several_turns_continue_from_the_cache(make_cache):
    model = tiny_model("Llama")
    dense, tiered = DynamicCache(), make_cache(model.config, SMALLEST[1])
    ids = {"dense": prompt(), "tiered": prompt()}
    for _ in range(3):
        for name, one in (("dense", dense), ("tiered", tiered)):
            tokens, _ = run(model, one, ids[name])
            ids[name] = torch.cat([tokens, prompt()[:, :5]], 1)
    assert torch.equal(ids["dense"], ids["tiered"])
    assert tiered.get_seq_length() == dense.get_seq_length()


def test_without_a_config_and_with_a_bfloat16_model(make_cache):
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    tokens, _ = run(model, make_cache(None, SMALLEST[1]))
    assert torch.equal(tokens, expected)
    half = double_copy(model).bfloat16()
    first, second = make_cache(half.config, SMALLEST[1]), make_cache(half.config, 64)
    assert torch.equal(run(half, first)[1], run(half, second)[1])


def test_a_generate_that_runs_out_of_room_can_go_on_with_more(make_cache):
    """The forward that failed left every layer as it was before it."""
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    one = make_cache(model.config, SMALLEST[1], disk_bytes=31 * 4096)
    with pytest.raises(OutOfBlocksError, match="raise disk_bytes or device_bytes"):
        run(model, one)
    lengths = {layer.get_seq_length() for layer in one.layers}
    assert len(lengths) == 1
    (held,) = lengths
    assert PROMPT < held < PROMPT + NEW
    check_integrity(one)
    dense = DynamicCache()
    with torch.no_grad():
        model(expected[:, :held], past_key_values=dense)
    torch.testing.assert_close(
        one.layers[2].values.materialize(), dense.layers[2].values, rtol=0, atol=2e-5
    )
