"""Every model family says with a `TieredCache` what it says with transformers' own cache.

The models and the ways they generate are in `families.py`; docs/model_families.md shows the result.
"""

import families
import pytest
import torch
import transformers
from families import BY_NAME, MODES, NEW, PROMPT, TOLERANCE, expect, observe, spread
from transformers import DynamicCache, EncoderDecoderCache

LOST = 20  # of the oldest tokens


def is_close(logits: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((logits - expected).abs().max() < tolerance * expected.abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BY_NAME)
def test_tokens_are_those_of_a_dynamic_cache(name, mode):
    expected = expect(name, mode)
    is_refused = mode in BY_NAME[name].refuses
    assert bool(expected.refusal) == is_refused, expected.refusal
    if is_refused:
        pytest.skip(f"transformers does not do this: {expected.refusal}")
    assert len(set(expected.tokens[0, -NEW:].tolist())) > 2, "a model that repeats itself"
    observed = observe(name, mode)
    assert torch.equal(observed.tokens, expected.tokens)
    if not is_close(observed.logits, expected.logits):
        # Which sums are rounded how depends on the processor: our error may be twice theirs.
        assert is_close(observed.logits, expected.logits, 3 * spread(name, mode))
    assert (observed.cold_reads > 0) == (observed.num_tiered > 0)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_comparison_would_notice_lost_tokens(name):
    """Without the oldest keys and values the model says something else, far beyond TOLERANCE."""
    family, expected = BY_NAME[name], expect(name, "greedy")
    past = DynamicCache(config=families.tiny_model(name).config)
    inputs = families.make_inputs(family, "plain")
    families.generate(name, past, inputs, max_new_tokens=1)
    for layer in past.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys[:, :, :LOST] = 0
            layer.values[:, :, :LOST] = 0
    prefix = "decoder_" if family.has_encoder else ""
    tokens = expected.tokens[:, : PROMPT + 1]
    inputs |= {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": torch.ones_like(tokens)}
    _, logits = families.generate(name, past, inputs, max_new_tokens=1)
    assert not is_close(logits[:, 0], expected.logits[:, 1], 100 * TOLERANCE)


@pytest.mark.parametrize("name", BY_NAME)
def test_attention_goes_the_way_the_registry_says(name):
    family = BY_NAME[name]
    modes = [mode for mode in MODES if not MODES[mode].is_special and mode not in family.refuses]
    for observed in (observe(name, mode) for mode in modes):
        assert observed.why == family.why
        assert bool(observed.ways) == (observed.num_tiered > 0)


def test_whisper_transcribes_by_its_own_generate(make_cache):
    model = families.tiny_model("Whisper")
    inputs = families.make_inputs(BY_NAME["Whisper"], "plain")
    how = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(
        **how, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())
    )
    past = make_cache(model.config, 18)
    tokens = model.generate(**how, past_key_values=EncoderDecoderCache(past, DynamicCache()))
    assert torch.equal(tokens, expected)
    assert past.stats().counters.cold_reads > 0


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("has_config", [True, False])
def test_mllama_keeps_an_image_in_its_cross_attention_layer(make_cache, has_config, num_beams):
    model = families.tiny_model("Mllama")
    eyes = model.config.vision_config
    generator = torch.Generator().manual_seed(7)
    inputs = {
        "pixel_values": torch.randn(
            (1, 1, 1, 3, eyes.image_size, eyes.image_size), generator=generator
        ),
        "aspect_ratio_ids": torch.ones((1, 1), dtype=torch.long),
        "aspect_ratio_mask": torch.ones((1, 1, 1), dtype=torch.long),
        "cross_attention_mask": torch.ones((1, PROMPT, 1, 1), dtype=torch.long),
        **families.make_inputs(BY_NAME["Mllama"], "plain"),
    }
    dense = DynamicCache(config=model.config)
    expected, logits = families.generate("Mllama", dense, inputs, num_beams=num_beams)
    past = make_cache(model.config if has_config else None, 18 * num_beams)
    tokens, tiered_logits = families.generate("Mllama", past, inputs, num_beams=num_beams)
    assert torch.equal(tokens, expected)
    assert is_close(tiered_logits, logits)
    lengths = [layer.get_seq_length() for layer in past.layers]
    assert lengths == [layer.get_seq_length() for layer in dense.layers]
    assert 0 < lengths[2] < lengths[0]
    assert past.stats().counters.cold_reads > 0


def test_the_document_shows_what_was_observed():
    written = families.DOCUMENT.read_text()
    if f"transformers\n{transformers.__version__};" not in written:
        pytest.skip(f"{families.DOCUMENT.name} was written with another version of transformers")
    assert written == families.table(), "run `python tests/families.py --write`"
