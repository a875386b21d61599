"""Parity on the trained model that comes with the project: it really reads far back, so a cache
that lost or changed a token would change what it says."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_tiered_cache import TieredCache
from hf_tiered_cache.evaluation import standard_library

import corpora

ROOT = Path(__file__).parent.parent
CONTEXT = 3072
BLOCK_BYTES = 2 * 2 * 256 * 64 * 4  # two kv heads of 64, 256 tokens, float32
SMALLEST_BLOCKS = 4 + 2  # a filling block in each of four layers, and two of staging


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ROOT / "eval" / "tiny_lm").eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    """The first bytes of a source file the model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "eval" / "tiny_lm")
    text = standard_library.held_out_files()[0].read_text()
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :CONTEXT]


def generate(model, prompt, cache, **sampling):
    """24 new tokens and the logits of each, the prompt in chunks of 500."""
    torch.manual_seed(1)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        prefill_chunk_size=500,
        max_new_tokens=24,
        min_new_tokens=24,
        output_logits=True,
        return_dict_in_generate=True,
        **sampling,
    )


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 50}])
def test_tokens_are_those_of_dynamic_cache_and_bits_do_not_depend_on_the_budget(
    model, prompt, tmp_path, sampling
):
    expected = generate(model, prompt, DynamicCache(), **sampling)
    logits = []
    for blocks in (200, 24, SMALLEST_BLOCKS):
        with TieredCache(device_bytes=blocks * BLOCK_BYTES, disk_dir=tmp_path) as cache:
            got = generate(model, prompt, cache, **sampling)
            cold = cache.stats().cold_blocks
        assert torch.equal(got.sequences, expected.sequences), f"{blocks} blocks on the device"
        assert (cold == 0) == (blocks == 200)
        logits.append(torch.stack(got.logits))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_the_model_notices_when_the_middle_of_the_cache_is_gone(model):
    """Facts asked again 1.5K bytes later: hiding the middle half must cost bits, or parity on this
    model would prove nothing."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "eval" / "tiny_lm")
    losses = {"whole": 0.0, "holed": 0.0}
    for document, question in recall_documents():
        text = tokenizer(document, return_tensors="pt", add_special_tokens=False).input_ids
        answer = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
        past, asked = text.shape[1], answer.shape[1]
        for name in losses:
            cache = TieredCache(device_bytes="64MiB", disk_bytes=0)
            model(text, past_key_values=cache)
            mask = torch.ones((1, 1, asked, past + asked), dtype=torch.bool).tril(past)
            if name == "holed":
                mask[..., past // 4 : 3 * past // 4] = False
            logits = model(
                answer,
                attention_mask=mask,
                position_ids=torch.arange(past, past + asked)[None],
                past_key_values=cache,
            ).logits
            losses[name] += torch.nn.functional.cross_entropy(logits[0, :-1], answer[0, 1:]).item()
            cache.close()
    assert losses["holed"] > 1.5 * losses["whole"], losses


def recall_documents() -> Iterator[tuple[str, str]]:
    """(text, question with its answer) of facts that stand in the middle of 2.5K bytes."""
    rng = random.Random(0)
    filler = standard_library.read_files(standard_library.held_out_files()[:4])
    for _ in range(4):
        document = corpora.recall_document(rng, 2500, filler, distance_bytes=1250)
        yield document.text, document.question + document.answer
