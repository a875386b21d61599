"""`speculate`: the tokens of plain `generate`, several of them for each read of the cold blocks."""

import copy
import dis
import pickle

import pytest
import torch
from support import sharpen
from test_generate_parity import check_integrity, prompt, tiny_model
from test_longrope import ORIGINAL, longrope_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_tiered_cache import speculate, speculating
from hf_tiered_cache.errors import CacheInUseError, UnsupportedInputError
from hf_tiered_cache.integration import draft_length
from hf_tiered_cache.integration.draft_length import DraftLength
from hf_tiered_cache.integration.speculate import _Speculation, _Text, _why_plain

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", [{}, {"temperature": 1.7, "top_k": 12}, {"top_p": 0.8}])
def test_sampling_gives_the_text_of_plain_generate_under_the_same_seed(make_cache, seed, how):
    """Chosen by the same draws, so it is the same distribution for any draft."""
    model = tiny_model("Llama")
    torch.manual_seed(seed)
    expected = generate(model, DynamicCache(), do_sample=True, **how)
    after = torch.rand(3)
    for draft_tokens in (1, 6, None):
        cache = make_cache(model.config, FEW)
        torch.manual_seed(seed)
        how = {"do_sample": True, "draft_tokens": draft_tokens, **how}
        assert torch.equal(generate(model, cache, custom_generate=speculate, **how), expected)
        assert torch.equal(torch.rand(3), after), "as many draws as without"
        check_integrity(cache)


def test_guesses_are_drawn_with_the_numbers_of_the_choice(make_cache):
    """Where all is resident the draft is the model, and all that it guesses is right."""
    model = tiny_model("Llama")
    cache = make_cache(model.config, 400)
    torch.manual_seed(3)
    generate(model, cache, custom_generate=speculate, do_sample=True, draft_tokens=5)
    counts = cache.stats().speculation
    assert counts.drafted > 20 and counts.accepted >= counts.drafted - 5  # the end cuts some off


def test_nothing_is_guessed_where_nothing_is_cold(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config, 400)
    generate(model, cache, custom_generate=speculate)
    assert cache.stats().speculation.drafted == 0


def test_a_draft_loads_nothing_and_leaves_nothing(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config, FEW)
    ids = prompt()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        dense = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        before = cache.counters()
        assert before.loads > 0
        with cache.drafting():
            for token in range(3):
                model(ids[:, token : token + 1], past_key_values=cache)
            after = cache.counters()
            assert cache.get_seq_length() == ids.shape[1] + 4
            assert not cache.stats().is_exact
        assert (after.loads, after.cold_reads) == (before.loads, before.cold_reads)
        assert cache.get_seq_length() == ids.shape[1] + 1
        for layer, (keys, values) in zip(cache.layers, dense, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        far = torch.cat([ids, ids], dim=1)  # many blocks
        with cache.drafting():
            model(far, past_key_values=cache)
            with pytest.raises(IndexError):
                model(ids + 97, past_key_values=cache)  # such tokens there are not
        for layer, (keys, values) in zip(cache.layers, dense, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    check_integrity(cache)


class Noting(BaseStreamer):
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value.tolist())

    def end(self):
        self.said.append("end")


class Counting(LogitsProcessor):
    """Keeps what it saw, and forbids what was said last: another answer wherever it is left out."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


class AtToken(StoppingCriteria):
    def __init__(self, token):
        self.token, self.seen = token, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.seen += 1
        return torch.tensor([input_ids.shape[1] > 50 and bool(input_ids[0, -1] == self.token)])


@pytest.mark.parametrize("context", [False, True], ids=["custom_generate", "speculating"])
def test_streamers_processors_and_criteria_see_what_they_see_without_it(make_cache, context):
    model = tiny_model("Llama")
    seen = []
    plain = generate(model, DynamicCache(), logits_processor=LogitsProcessorList([Counting()]))
    token = int(plain[0, -9])
    for cache in (DynamicCache(), make_cache(model.config, FEW)):
        parts = Noting(), Counting(), AtToken(token)
        how = {
            "streamer": parts[0],
            "logits_processor": LogitsProcessorList([parts[1]]),
            "stopping_criteria": StoppingCriteriaList([parts[2]]),
            "repetition_penalty": 1.3,
        }
        if isinstance(cache, DynamicCache) and type(cache) is DynamicCache:
            tokens = generate(model, cache, **how)
        elif context:
            with speculating(model, draft_tokens=6):
                tokens = generate(model, cache, **how)
            assert "generate" not in vars(model)
        else:
            tokens = generate(model, cache, custom_generate=speculate, draft_tokens=6, **how)
        seen.append((tokens.tolist(), parts[0].said, parts[1].seen, parts[2].seen))
    assert seen[0] == seen[1]
    assert cache.stats().speculation.accepted > 0


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 1.3}])
def test_what_is_returned_as_a_dict_is_what_plain_generate_returns(make_cache, how):
    model = tiny_model("Qwen2")
    how = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "eos_token_id": list(range(90, 97)),
        **how,
    }
    torch.manual_seed(1)
    expected = generate(model, DynamicCache(), **how)
    cache = make_cache(model.config, FEW)
    torch.manual_seed(1)
    got = generate(model, cache, custom_generate=speculate, draft_tokens=4, **how)
    assert type(got) is type(expected) and got.keys() == expected.keys()
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores) == len(got.logits)
    for name in ("scores", "logits"):
        for ours, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert got.past_key_values is cache
    assert cache.get_seq_length() == got.sequences.shape[1] - 1


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"num_beams": 2}, "beam search is asked for"),
        ({"num_return_sequences": 2, "do_sample": True}, "the batch has 2 sequences"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "attentions"),
    ],
)
def test_what_is_not_speculated_is_generated_plainly_and_says_so(make_cache, told_by, how, why):
    told = told_by("integration.speculate")
    model = tiny_model("Llama")
    how = {"max_new_tokens": 6, **how}
    torch.manual_seed(1)
    expected = generate(model, make_cache(model.config, 60), **how)
    torch.manual_seed(1)
    cache = make_cache(model.config, 60)
    got = generate(model, cache, custom_generate=speculate, **how)
    if not isinstance(got, torch.Tensor):
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)
    assert len(told) == 1 and why in told[0]
    assert cache.stats().speculation.passes == 0


def test_other_caches_generate_plainly_and_wrong_lengths_are_refused(told_by, make_cache):
    told = told_by("integration.speculate")
    model = tiny_model("Llama")
    got = generate(model, DynamicCache(), custom_generate=speculate)
    assert torch.equal(got, generate(model, DynamicCache()))
    assert "the cache is a DynamicCache" in told[0]
    with pytest.raises(UnsupportedInputError, match="draft_tokens=-1: expected 0 or more"):
        generate(model, make_cache(), custom_generate=speculate, draft_tokens=-1)


def test_a_prompt_in_chunks_a_second_turn_and_an_own_generate(make_cache):
    model = tiny_model("Llama")
    dynamic, cache = DynamicCache(), make_cache(model.config, FEW)
    ids = prompt()
    for turn in range(3):
        how = {"prefill_chunk_size": 16} if turn == 0 else {}
        expected = generate(model, dynamic, ids, **how)
        ids_again = generate(model, cache, ids, custom_generate=speculate, draft_tokens=3, **how)
        assert torch.equal(ids_again, expected)
        ids = torch.cat([expected, prompt()[:, :7]], dim=1)
    check_integrity(cache)


def test_what_followed_the_last_tokens_before_is_tried_and_checked_by_the_draft(
    make_cache, monkeypatch
):
    """Here by somebody who knows the text, but errs in every third token."""
    model = tiny_model("Llama")
    expected = generate(model, DynamicCache())
    cache = make_cache(model.config, 400)  # the draft is right

    def known(text, guesses, count):
        first = text.ids.shape[1] + len(guesses)
        said = expected[0, first : first + min(count, 3)].tolist()
        return [*said[:2], *(one + 1 for one in said[2:])]

    monkeypatch.setattr(_Text, "seen_before", known)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(cache._owned.selection.name))
    tokens = generate(model, cache, custom_generate=speculate, draft_tokens=8)
    handle.remove()
    assert torch.equal(tokens, expected)
    counts = cache.stats().speculation
    assert counts.accepted == counts.drafted > 30
    assert 0 < calls.count("resident_only") < counts.drafted / 2
    check_integrity(cache)


def test_the_latest_place_where_the_last_tokens_stood_is_looked_up():
    config = GenerationConfig()
    ids = torch.tensor([[7, 8, 9, 1, 2, 7, 8, 9, 3, 4, 5, 6, 7, 8]])
    text = _Text(ids, LogitsProcessorList(), StoppingCriteriaList(), config, None)
    assert text.seen_before([9], 3) == [3, 4, 5]
    assert text.seen_before([9], 0) == []
    assert text.seen_before([], 3) == []
    assert text.seen_before([9, 3], 20) == [4, 5, 6, 7, 8, 9, 3]


class Raising(Noting):
    """Ctrl-C while the `number`-th token is shown."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def put(self, value):
        super().put(value)
        if len(self.said) == self.number + 1:  # the prompt comes first
            raise KeyboardInterrupt


class RaisingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == prompt().shape[1] + 9:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("number", [5, 6, 8])
def test_no_guess_stays_where_a_streamer_or_a_processor_raises(make_cache, number):
    model = tiny_model("Llama")
    said = generate(model, DynamicCache())
    cache = make_cache(model.config, FEW)
    how = {"streamer": Raising(number), "custom_generate": speculate, "draft_tokens": 6}
    with pytest.raises(KeyboardInterrupt):
        generate(model, cache, **how)
    assert cache.get_seq_length() == prompt().shape[1] + number - 1
    how = {"logits_processor": [RaisingProcessor()], "custom_generate": speculate}
    with pytest.raises(KeyboardInterrupt):
        generate(model, cache, said[:, : prompt().shape[1] + number], draft_tokens=6, **how)
    assert cache.get_seq_length() < prompt().shape[1] + 9
    following = torch.cat([said[:, : prompt().shape[1] + 9], prompt()[:, :7]], dim=1)
    expected = generate(model, DynamicCache(), following, max_new_tokens=8)
    assert torch.equal(generate(model, cache, following, max_new_tokens=8), expected)
    check_integrity(cache)


def llama(**how):
    torch.manual_seed(0)
    how = {
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3, **how},
    }
    return sharpen(AutoModelForCausalLM.from_config(AutoConfig.for_model(**how)))


def test_texts_whose_rotary_positions_may_change_are_generated_plainly(make_cache, told_by):
    told = told_by("integration.speculate")
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    for why, make in (
        (f"cross original_max_position_embeddings={ORIGINAL}", lambda: longrope_model("phi3")),
        (
            "dynamic rotary positions may pass 24",
            lambda: llama(model_type="llama", max_position_embeddings=24, rope_parameters=dynamic),
        ),
    ):
        ids = prompt()[:, : ORIGINAL - 9]
        expected = generate(make(), DynamicCache(), ids, max_new_tokens=20)
        model = make()
        cache = make_cache(model.config, 12)
        how = {"custom_generate": speculate, "draft_tokens": 4}
        told.clear()
        assert torch.equal(generate(model, cache, ids, max_new_tokens=20, **how), expected)
        assert why in told[0] and cache.stats().speculation.passes == 0
        cache = make_cache(model.config, 12)
        generate(make(), cache, ids, max_new_tokens=9, **how)  # up to it
        assert cache.stats().speculation.passes > 0
    model = longrope_model("phi3")
    cache = make_cache(None, 12)
    got = generate(model, cache, **how)  # all of it beyond
    assert torch.equal(got, generate(model, DynamicCache(config=model.config)))
    assert cache.stats().speculation.passes > 0


def test_a_model_that_leaves_the_cache_is_an_error(make_cache, monkeypatch):
    model = tiny_model("Llama")
    prepare = model.prepare_inputs_for_generation

    def leaving(ids, **kwargs):
        inputs = prepare(ids, **kwargs)
        if ids.shape[1] > prompt().shape[1]:
            inputs["past_key_values"] = None
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", leaving)
    with pytest.raises(UnsupportedInputError, match="left the given cache behind"):
        generate(model, make_cache(model.config, FEW), custom_generate=speculate, draft_tokens=3)


def test_token_types_and_synced_ranks_are_generated_plainly(make_cache, told_by):
    told = told_by("integration.speculate")
    model = tiny_model("GPT2")
    types = torch.arange(prompt().shape[1])[None] % 7
    expected = generate(model, DynamicCache(), token_type_ids=types)
    how = {"custom_generate": speculate, "draft_tokens": 5}
    got = generate(model, make_cache(model.config), token_type_ids=types, **how)
    assert torch.equal(got, expected) and "token_type_ids" in told[0]
    given = model, prompt(), LogitsProcessorList(), StoppingCriteriaList()
    config = GenerationConfig(do_sample=False, max_length=99)
    mode = config.get_generation_mode()
    for synced in (True, False):
        kwargs = {"past_key_values": make_cache(model.config), "synced_gpus": synced}
        assert ("synced_gpus" in _why_plain(*given[:2], config, mode, kwargs)) == synced


def test_guesses_take_back_the_draws_of_the_devices_own_generator(make_cache, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda *a, **k: asked.append((a, k)))
    text = type("Text", (), {})()
    text.config = GenerationConfig(do_sample=True)
    text.ids = torch.empty(1, 1, device="meta")  # some device other than the CPU
    _Speculation(None, text, 1, {"past_key_values": make_cache()})._same_draws()
    assert asked == [(([torch.device("meta")],), {"device_type": "meta"})]


def test_windows_are_cut_again_behind_it(make_cache):
    model = llama(model_type="mistral", sliding_window=9, max_position_embeddings=512)
    cache, dynamic = make_cache(model.config, FEW), DynamicCache(config=model.config)
    ids = generate(model, cache, custom_generate=speculate, draft_tokens=5)
    assert torch.equal(ids, generate(model, dynamic))
    for _ in range(2):
        assert not cache.is_recording_past(0)
        assert {layer.keys.shape[-2] for layer in cache.layers} == {8}
        ids = torch.cat([ids, prompt()[:, :7]], dim=1)
        expected = generate(model, dynamic, ids)
        ids = generate(model, cache, ids)
        assert torch.equal(ids, expected)


def test_what_is_guessed_is_neither_copied_nor_saved(make_cache, tmp_path):
    model, cache = tiny_model("Llama"), make_cache()
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        with cache.drafting():
            model(prompt()[:, :3], past_key_values=cache)
            for act in (
                lambda: copy.deepcopy(cache),
                lambda: pickle.dumps(cache),
                lambda: cache.save_pretrained(tmp_path / "it", model, prompt()),
            ):
                with pytest.raises(CacheInUseError, match="while the cache is drafting"):
                    act()
        assert cache.stats().is_exact
        assert copy.deepcopy(cache).get_seq_length() == prompt().shape[1]
        with cache.attending("resident_only"):
            assert copy.deepcopy(cache).get_seq_length()  # nobody drafts
            model(prompt()[:, :3], past_key_values=cache)
    for held in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert not held.stats().is_exact and "approximate" in str(held)
        held.reset()
        assert held.stats().is_exact


@pytest.mark.parametrize("how", ["drafting", "attending"])
def test_nothing_can_interrupt_between_the_selection_and_the_block(make_cache, how):
    """Python lets Ctrl-C in behind calls and at jumps: neither follows the last store."""
    cache = make_cache()
    block = cache.drafting() if how == "drafting" else cache.attending("resident_only")
    names = [one.opname for one in dis.get_instructions(type(block).__enter__)]
    behind = names[len(names) - names[::-1].index("STORE_ATTR") :]
    assert not any("CALL" in name or "JUMP" in name or "RESUME" in name for name in behind)
    with block:
        assert cache._owned.selection.name == "resident_only"
    assert cache._owned.selection.name == "all"


def simulate(acceptance: float, draft: float, base: float, row: float, tokens: int = 2000):
    """(tokens per second, guesses chosen) of a text whose costs are these."""
    chosen, length = [], DraftLength()
    random = torch.Generator().manual_seed(0)
    seconds, done = 0.0, 0
    while done < tokens:
        guesses = length.choose()
        right = 0
        while right < guesses and float(torch.rand(1, generator=random)) < acceptance:
            right += 1
        times = guesses * draft, base + guesses * row
        length.note(guesses, right, *times)
        seconds += sum(times)
        done += 1 + right
        chosen.append(guesses)
    return done / seconds, chosen


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("draft", [0.005, 0.1, 0.9])
@pytest.mark.parametrize("row", [0.0, 0.1, 1.0])
def test_the_length_is_near_the_best_one_and_never_worse_than_none(acceptance, draft, row):
    """A pass takes 1 second; what else there is in parts of it."""
    rate, chosen = simulate(acceptance, draft, 1.0, row)
    chance = min(acceptance, 0.999)
    best = max(
        (1 - chance ** (g + 1)) / (1 - chance) / (1 + g * (row + draft))
        for g in range(draft_length.MOST + 1)
    )
    assert rate >= 0.95, "plain decode is 1 token a second"
    assert rate >= 0.85 * best, (rate, best, chosen[-5:])
