"""`reuse`: the tokens of `generate` are what they were, and what is found is not computed again."""

import contextlib

import pytest
import torch
from test_restore import VOCAB, make_model, new_cache, prompt, published
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_tiered_cache import BlockStore, ConfigError, TieredCache, TierIOError, reuse

GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


@contextlib.contextmanager
def fed(model):
    """How many tokens each forward was given."""
    lengths = []

    def note(module, args, kwargs, output):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "chunked": {"prefill_chunk_size": 24},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_without_a_store(way, model, store):
    ids, kwargs = prompt(150), {**GREEDY, **WAYS[way]}

    def generated():
        torch.manual_seed(1)
        return model.generate(ids, **kwargs)

    expected = generated()
    with reuse(model, store, block_tokens=16):
        assert torch.equal(generated(), expected)
        assert store.flush(10)
        with fed(model) as lengths:
            assert torch.equal(generated(), expected)
    assert lengths[0] == 6 + (3 if way == "prompt lookup" else 0)  # and the drafts
    assert store.counters["found"] == 9
    assert store.counters["bypassed"] == 0
    assert torch.equal(generated(), expected)  # detached


def test_assisted_decoding(model, store):
    assistant = make_model(num_hidden_layers=1)
    kwargs = {**GREEDY, "assistant_model": assistant}
    expected = model.generate(prompt(150), **kwargs)
    with reuse(model, store, block_tokens=16):
        for _ in range(2):
            with fed(model) as lengths:
                assert torch.equal(model.generate(prompt(150), **kwargs), expected)
            store.flush(10)
    assert lengths[0] < 6 + 20


def test_assisted_decoding_with_a_restored_cache_and_no_hook(model, store):
    """transformers 5.17 to 5.23 give the whole prompt to a model whose cache holds a part of it."""
    published(model, store, prompt(150))
    kwargs = {**GREEDY, "prompt_lookup_num_tokens": 3}
    expected = model.generate(prompt(150), **kwargs)
    cache = new_cache(model, store)
    assert cache.restore(prompt(150), model) == 144
    assert torch.equal(model.generate(prompt(150), past_key_values=cache, **kwargs), expected)
    assert cache.get_seq_length() == 161


def test_rejected_drafts_are_not_published(model, store):
    ids = prompt(60)
    with reuse(model, store, block_tokens=4):
        out = model.generate(ids, prompt_lookup_num_tokens=5, max_new_tokens=40, do_sample=False)
    store.flush(10)
    assert store.stats().blocks == (out.shape[1] - 1) // 4
    cache = new_cache(model, store, block_tokens=4)
    assert cache.restore(out, model) == (out.shape[1] - 1) // 4 * 4


def test_several_turns_feed_only_what_is_new(model, store):
    history = prompt(100)
    for seed in range(1, 4):
        with reuse(model, store, block_tokens=16), fed(model) as lengths:
            out = model.generate(history, **GREEDY)
        assert torch.equal(out, model.generate(history, **GREEDY))
        store.flush(10)
        if seed > 1:
            assert lengths[0] <= 30 + 16
        history = torch.cat([out, prompt(30, seed=seed)], 1)


def test_rows_that_differ_are_computed_and_published(model, store):
    ids = torch.cat([prompt(80), prompt(80, seed=1)])
    expected = model.generate(ids, **GREEDY)
    with reuse(model, store, block_tokens=16):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        assert store.flush(10)
        assert store.counters["bypassed"] == 1
        with fed(model) as lengths:
            out = model.generate(ids[1:], **GREEDY)
    assert torch.equal(out, expected[1:])
    assert lengths[0] == 16


BYPASSED = {
    "a cache of another kind": lambda _: {"past_key_values": DynamicCache()},
    "a cache without a store": lambda _: {"past_key_values": TieredCache()},
    "no cache": lambda _: {"use_cache": False},
    "static": lambda _: {"cache_implementation": "static"},
    "padding": lambda _: {"attention_mask": torch.tensor([[0] * 3 + [1] * 77])},
}


@pytest.mark.parametrize("why", BYPASSED)
def test_what_reuse_cannot_do_right_goes_past_it_and_is_counted(why, model, store):
    ids = prompt(80)
    make = BYPASSED[why]
    expected = model.generate(ids, **GREEDY, **make(None))
    with reuse(model, store, block_tokens=16):
        for _ in range(2):
            assert torch.equal(model.generate(ids, **GREEDY, **make(None)), expected)
    store.flush(10)
    assert store.counters["bypassed"] >= 2
    assert store.stats().blocks == 0


def test_embeddings_go_past_it(model, store):
    embeds = model.get_input_embeddings()(prompt(40)).detach()
    expected = model.generate(inputs_embeds=embeds, **GREEDY)
    with reuse(model, store, block_tokens=16):
        assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected)
    assert store.counters["bypassed"] > 0
    store.flush(10)
    assert store.stats().blocks == 0


def test_other_layers_than_full_attention_go_past_it(store):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8},
    )
    model = MistralForCausalLM(config).eval()
    expected = model.generate(prompt(40), **GREEDY)
    with reuse(model, store, block_tokens=16):
        assert torch.equal(model.generate(prompt(40), **GREEDY), expected)
    assert store.counters["bypassed"] == 1


def damage(store):
    """Flip a bit in the bytes of every block but the first two."""
    for path in sorted(store.root.glob("v1/*/??/??/*.htc")):
        data = bytearray(path.read_bytes())
        if int.from_bytes(data[132:136], "little") >= 2:
            data[-5000] ^= 1
            path.write_bytes(data)


class Words(BaseStreamer):
    def __init__(self):
        self.put_so_far = []

    def put(self, value):
        self.put_so_far.append(value.flatten().tolist())

    def end(self):
        self.put_so_far.append("end")


def test_damaged_blocks_are_computed_anew(model, store):
    published(model, store, prompt(150))
    damage(store)
    expected = model.generate(prompt(150), **GREEDY)
    words = Words()
    with reuse(model, store, block_tokens=16):
        assert torch.equal(model.generate(prompt(150), streamer=words, **GREEDY), expected)
        assert words.put_so_far[0] == prompt(150)[0].tolist()
        assert [one[0] for one in words.put_so_far[1:-1]] == expected[0, 150:].tolist()
        assert store.counters["recomputed"] >= 1
        assert store.flush(10)
        found = store.counters["found"]
        assert torch.equal(model.generate(prompt(150), **GREEDY), expected)
        assert store.counters["found"] == found + 9


def test_a_load_failure_may_be_raised(model, tmp_path):
    with BlockStore(tmp_path, on_load_failure="raise") as store:
        published(model, store, prompt(150))
        damage(store)
        with reuse(model, store, block_tokens=16):
            with pytest.raises(TierIOError, match="is not what was stored"):
                model.generate(prompt(150), **GREEDY)
            model.generate(prompt(150), **GREEDY)


def test_reuse_is_attached_to_one_model_once(model, store):
    before = model.generate
    attached = reuse(model, store)
    with pytest.raises(ConfigError, match="already"):
        reuse(model, store)
    attached.detach()
    attached.detach()
    assert model.generate == before
    assert "generate" not in vars(model)
    with pytest.raises(ConfigError, match="expected a model"):
        reuse(torch.nn.Linear(2, 2), store)
    with pytest.raises(ConfigError, match="expected a BlockStore"):
        reuse(model, "~/kv")
    with pytest.raises(ConfigError, match="block_tokens"):
        reuse(model, store, block_tokens=3)


def test_a_stale_detach_leaves_the_next_reuse_alone(model, store):
    first = reuse(model, store)
    first.detach()
    second = reuse(model, store)
    first.detach()
    assert "generate" in vars(model)
    second.detach()
    assert "generate" not in vars(model)


def test_arguments_of_the_model_that_nobody_knows_go_past_it(model, store):
    class Given(LlamaForCausalLM):
        def forward(self, input_ids=None, style=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    other = make_model()
    other.__class__ = Given
    ids = prompt(80)
    with reuse(other, store, block_tokens=16):
        for _ in range(2):
            other.generate(ids, style=["loud"], **GREEDY)
            store.flush(10)
        assert store.counters["bypassed"] >= 2
        assert store.stats().blocks == 0
        bypassed = store.counters["bypassed"]
        other.generate(ids, eos_token_id=[5000], stop_strings=None, **GREEDY)
        assert store.counters["bypassed"] == bypassed


def test_the_first_forward_of_generate_looks_at_the_weights_anew(store):
    model = make_model()
    cache = new_cache(model, store)
    with reuse(model, store, block_tokens=16):
        said = model.generate(prompt(60), past_key_values=cache, **GREEDY)
        model.model.layers[0].mlp.down_proj.weight.data *= 2
        more = torch.cat([said, prompt(3, seed=1)], 1)
        model.generate(more, past_key_values=cache, **GREEDY)
    assert store.counters["bypassed"] > 0
