"""A prefix from the store is the prefix that was computed, bit for bit."""

import copy
import pickle

import pytest
import torch
from support import sharpen
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tiered_cache import (
    BlockStore,
    ConfigError,
    TieredCache,
    TierIOError,
    UnsupportedInputError,
)
from hf_tiered_cache.integration.token_record import not_plain
from hf_tiered_cache.integration.weights import checksum

VOCAB = 100


def make_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB},
            **{"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0},
            **changes,
        }
    )
    return sharpen(LlamaForCausalLM(config)).to(dtype)


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompt(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (1, 256), generator=generator)[:, :num_tokens]


def new_cache(model, store, **knobs):
    return TieredCache(model.config, store=store, **{"block_tokens": 16, **knobs})


@torch.no_grad()
def forward(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def published(model, store, ids, **knobs):
    """A cache that computed `ids`, whose full blocks are in the store."""
    cache = new_cache(model, store, **knobs)
    forward(model, cache, ids)
    cache.publish()
    assert store.flush(10)
    return cache


def check(cache):
    for manager in cache._owned.pool.managers:
        manager.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_tokens", [4, 16, 64])
@pytest.mark.parametrize(
    "budgets",
    [{}, {"device_bytes": "384KiB", "staging_bytes": "64KiB"}, {"disk_bytes": 0}],
    ids=["roomy", "tight", "no disk"],
)
def test_restored_equals_recomputed_to_the_last_bit(dtype, block_tokens, budgets, store):
    model, ids = make_model(dtype), prompt(217)
    knobs = {"block_tokens": block_tokens, **budgets}
    num_found = 216 // block_tokens * block_tokens
    computed = published(model, store, ids[:, :num_found], **knobs)
    restored = new_cache(model, store, **knobs)
    assert restored.restore(ids, model) == num_found
    assert restored.get_seq_length() == num_found
    for part in (ids[:, num_found:], prompt(3, seed=1), prompt(70, seed=2)):
        assert torch.equal(forward(model, restored, part), forward(model, computed, part))
        check(restored)


def test_at_least_one_token_is_left_to_be_computed(model, store):
    published(model, store, prompt(64))
    for num_tokens, num_found in [(64, 48), (65, 64), (63, 48), (17, 16), (16, 0), (1, 0), (0, 0)]:
        assert new_cache(model, store).restore(prompt(num_tokens), model) == num_found


def test_only_a_common_prefix_is_found(model, store):
    published(model, store, prompt(100))
    other = prompt(100).clone()
    other[0, 40] = other[0, 40] % (VOCAB - 1) + 1
    cache = new_cache(model, store)
    assert cache.restore(other, model) == 32
    fresh = new_cache(model, store)
    forward(model, fresh, other[:, :32])
    rest = other[:, 32:]
    assert torch.allclose(forward(model, cache, rest), forward(model, fresh, rest), atol=1e-5)


def test_crop_into_a_restored_block_and_other_tokens_behind(model, store):
    computed = published(model, store, prompt(96))
    restored = new_cache(model, store)
    assert restored.restore(prompt(97), model) == 96
    for cache in (computed, restored):
        cache.crop(-21)
    for part in (prompt(30, seed=3), prompt(5, seed=4)):
        assert torch.equal(forward(model, restored, part), forward(model, computed, part))
        check(restored)


def test_deep_copies_share_what_was_restored(model, store):
    computed = published(model, store, prompt(96))
    restored = new_cache(model, store)
    restored.restore(prompt(97), model)
    forks = [copy.deepcopy(restored) for _ in range(2)]
    expected = forward(model, copy.deepcopy(computed), prompt(9, seed=5))
    for cache in (*forks, restored):
        assert torch.equal(forward(model, cache, prompt(9, seed=5)), expected)
        check(cache)


def test_rows_share_what_was_restored(model, store):
    published(model, store, prompt(96))
    cache = new_cache(model, store)
    ids = prompt(97).expand(3, -1)
    assert cache.restore(ids, model) == 96
    one = new_cache(model, store)
    one.restore(ids[0], model)
    one.batch_repeat_interleave(3)
    part = prompt(5, seed=6).expand(3, -1)
    assert torch.equal(forward(model, cache, part), forward(model, one, part))
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    forward(model, cache, part)
    check(cache)


def test_generate_computes_only_what_was_not_found(model, store):
    ids = prompt(150)
    cache = new_cache(model, store)
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    out = model.generate(ids, past_key_values=cache, **kwargs)
    assert cache.publish(out) == 169 // 16
    store.flush(10)
    fed = []

    def note(module, args, kwargs, output):
        fed.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_hook(note, with_kwargs=True)
    for chunk in (None, 24):
        cache = new_cache(model, store)
        assert cache.restore(ids, model) == 144
        fed.clear()
        again = model.generate(ids, past_key_values=cache, prefill_chunk_size=chunk, **kwargs)
        assert torch.equal(again, out)
        assert fed == [6] + [1] * 19
    more = torch.cat([out, prompt(10, seed=7)], 1)
    fed.clear()
    cache = new_cache(model, store)
    assert cache.restore(more, model) == 160
    model.generate(more, past_key_values=cache, **kwargs)
    assert fed[0] == 20
    hook.remove()


def test_another_process_would_find_it(model, store):
    published(model, store, prompt(64))
    with BlockStore(store.root) as other:
        assert new_cache(model, other).restore(prompt(64), model) == 48


def with_other_code(model):
    class LlamaForCausalLM(type(model)):
        """One that shifts its ids."""

    LlamaForCausalLM.__module__, LlamaForCausalLM.__qualname__ = __name__, "LlamaForCausalLM"
    model.__class__ = LlamaForCausalLM


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.layers[1].self_attn.k_proj.weight.data.add_(1e-3),
        lambda m: setattr(m.config, "rope_parameters", {"rope_type": "default", "rope_theta": 5e4}),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.model.norm.weight.data.mul_(1.1),
        lambda m: m.model.embed_tokens.weight.data[77].add_(1e-3),
        with_other_code,
    ],
    ids=["weights", "rope", "dtype", "norm", "row", "code"],
)
def test_another_model_finds_nothing(change, store):
    model = make_model()
    published(model, store, prompt(64))
    assert new_cache(model, store).restore(prompt(64), model) == 48  # the pair of the test below
    change(model)
    assert new_cache(model, store).restore(prompt(64), model) == 0


def test_every_byte_of_a_weight_counts():
    weights = torch.randn(700, 90)
    for tensor in (weights, weights.t(), weights.to(torch.bfloat16), weights[:, ::2]):
        known = checksum(tensor.clone(memory_format=torch.preserve_format))
        for place in [(0, 0), (-1, -1), (31, 37)]:
            other = tensor.clone(memory_format=torch.preserve_format)
            assert checksum(other) == known
            other[place] += 1
            assert checksum(other) != known


def test_another_salt_finds_nothing(model, tmp_path):
    with BlockStore(tmp_path, salt="one") as one, BlockStore(tmp_path, salt="two") as two:
        published(model, one, prompt(64))
        assert new_cache(model, two).restore(prompt(64), model) == 0
        assert new_cache(model, one).restore(prompt(64), model) == 48


def test_a_flipped_bit_is_an_error_and_then_a_miss(model, store):
    published(model, store, prompt(96))
    path = sorted(store.root.glob("v1/*/??/??/*.htc"))[2]
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    cache = new_cache(model, store)
    assert cache.restore(prompt(97), model) == 96
    with pytest.raises(TierIOError, match="is not what was stored"):
        forward(model, cache, prompt(97)[:, 96:])
    assert cache.get_seq_length() == 96
    check(cache)
    again = new_cache(model, store)
    assert again.restore(prompt(97), model) < 96
    assert not path.exists()
    assert len(list((store.root / "corrupt").iterdir())) == 1
    num_found = again.get_seq_length()
    forward(model, again, prompt(97)[:, num_found:])  # the rest is computed anew
    again.publish()
    store.flush(10)
    assert new_cache(model, store).restore(prompt(97), model) == 96


def test_what_has_no_name_is_not_published(model, store):
    ids = prompt(64)
    embedded = new_cache(model, store)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=embedded)
    padded = new_cache(model, store)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=padded)
    shifted = new_cache(model, store)
    with torch.no_grad():
        model(ids, position_ids=torch.arange(64)[None] + 1, past_key_values=shifted)
    assigned = new_cache(model, store)
    forward(model, assigned, ids)
    assigned.layers[0].keys = torch.zeros_like(assigned.layers[0].keys)
    appended = new_cache(model, store)
    forward(model, appended, ids)
    for layer in range(3):
        appended.update(torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16), layer)
    for cache in (embedded, padded, shifted, assigned, appended):
        assert cache.publish() == 0
    assert store.counters["bypassed"] == 5
    assert store.stats().blocks == 0


def test_tokens_that_were_cropped_away_are_not_published_under_other_names(model, store):
    cache = new_cache(model, store)
    forward(model, cache, prompt(40))
    cache.crop(-20)
    forward(model, cache, prompt(44, seed=8))
    assert cache.publish() == 4
    store.flush(10)
    ids = torch.cat([prompt(40)[:, :20], prompt(44, seed=8)], 1)
    assert new_cache(model, store).restore(ids, model) == 48
    assert new_cache(model, store).restore(prompt(40), model) == 16


def test_a_forward_that_failed_added_nothing(model, store):
    cache = new_cache(model, store)
    forward(model, cache, prompt(40))

    def fail(*args):
        raise RuntimeError("on purpose")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        forward(model, cache, prompt(30, seed=9))
    hook.remove()
    forward(model, cache, prompt(24, seed=10))
    assert cache.publish() == 4
    store.flush(10)
    ids = torch.cat([prompt(40), prompt(24, seed=10)], 1)
    assert new_cache(model, store).restore(ids, model) == 48


def test_a_cache_may_die_before_it_is_written(model, store):
    cache = new_cache(model, store)
    forward(model, cache, prompt(96))
    assert cache.publish() == 6
    cache.close()
    assert store.flush(10)
    assert store.stats().blocks == 6


def test_a_restored_cache_can_be_pickled(model, store):
    computed = published(model, store, prompt(64))
    cache = new_cache(model, store)
    cache.restore(prompt(65), model)
    loaded = pickle.loads(pickle.dumps(cache))
    part = prompt(3, seed=11)
    assert torch.equal(forward(model, loaded, part), forward(model, computed, part))


def test_wrong_use_is_said(model, store):
    with pytest.raises(ConfigError, match="has no store"):
        TieredCache(model.config).restore(prompt(5), model)
    with pytest.raises(ConfigError, match="expected a BlockStore"):
        TieredCache(model.config, store="~/kv")
    cache = new_cache(model, store)
    with pytest.raises(UnsupportedInputError, match="rows differ"):
        cache.restore(torch.tensor([[1, 2], [1, 3]]), model)
    with pytest.raises(UnsupportedInputError, match="expected ints"):
        cache.restore(torch.rand(2, 3), model)
    forward(model, cache, prompt(20))
    with pytest.raises(UnsupportedInputError, match="holds 20 tokens"):
        cache.restore(prompt(20), model)
    with pytest.raises(UnsupportedInputError, match="are not the tokens"):
        cache.publish(prompt(20, seed=12))


def perturbed(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64},
    **{"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0},
}


def add_hook(model):
    model.model.layers[0].register_forward_hook(lambda *given: given[-1] + 1.0)


def add_dropout(model):
    """In training mode, as an adapter that comes after `eval()`."""
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.5))


def with_unreadable_code(model):
    scope = {"Base": type(model), "__name__": "nowhere"}
    exec("class Mine(Base): pass", scope)
    model.__class__ = scope["Mine"]


def lose_a_weight(model):
    layer = model.model.layers[1].self_attn.k_proj
    layer.register_buffer("lost", torch.empty(3, device="meta"))


def replace_forward(model):
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda states: forward(states) * 2


NAMELESS = {
    "forward": replace_forward,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": LONGROPE,
    "hook": add_hook,
    "pre-hook": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "dropout": add_dropout,
    "code": with_unreadable_code,
    "weight": lose_a_weight,
    "rope_deltas": lambda model: setattr(model.model, "rope_deltas", None),
}


@pytest.mark.parametrize("why", NAMELESS)
def test_a_model_whose_blocks_have_no_name_goes_past_the_store(why, store):
    change = NAMELESS[why]
    if callable(change):
        model = make_model()
        change(model)
    else:
        model = make_model(max_position_embeddings=64, rope_parameters=change)
    cache = new_cache(model, store)
    forward(model, cache, prompt(100))
    assert cache.publish() == 0
    assert new_cache(model, store).restore(prompt(100), model) == 0
    assert store.counters["bypassed"] == 2


def test_two_models_that_are_offloaded_are_two(store):
    accelerate = pytest.importorskip("accelerate")
    one, other = make_model(), perturbed(make_model())
    expected = forward(other, TieredCache(other.config, block_tokens=16), prompt(100))
    for model in (one, other):
        accelerate.cpu_offload(model, execution_device="cpu")
    published(one, store, prompt(100))
    assert store.stats().blocks == 6
    assert new_cache(other, store).restore(prompt(100), other) == 0
    cache = new_cache(one, store)
    assert cache.restore(prompt(100), one) == 96
    forward(one, cache, prompt(100)[:, 96:])
    published(other, store, prompt(100))
    cache = new_cache(other, store)
    assert cache.restore(prompt(100), other) == 96
    rest = forward(other, cache, prompt(100)[:, 96:])
    assert torch.allclose(rest, expected[:, 96:], atol=1e-4)


def test_what_is_offloaded_to_disk_goes_past_the_store(store, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    places.update({f"model.layers.{number}": "disk" for number in range(3)})
    folder = str(tmp_path / "weights")
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )
    cache = new_cache(model, store)
    forward(model, cache, prompt(40))
    assert cache.publish() == 0
    assert store.counters["bypassed"] == 1


def scale(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)


def scale_data(model):
    model.model.layers[0].mlp.down_proj.weight.data *= 2


@pytest.mark.parametrize("num_new", [64, 1])
@pytest.mark.parametrize("change", [scale, scale_data, add_hook, perturbed])
def test_a_model_that_changes_between_two_forwards_has_no_name(change, num_new, store):
    if change is scale_data and num_new == 1:
        pytest.skip("known by samples of the weights only, which are not taken for one token")
    model = make_model()
    cache = new_cache(model, store)
    forward(model, cache, prompt(47))
    change(model)
    for first in range(47, 47 + 64, num_new):
        forward(model, cache, prompt(111)[:, first : first + num_new])
    assert cache.publish() == 0
    assert store.counters["bypassed"] == 1


def test_without_the_autocast_of_what_is_held_it_has_no_name(model, store):
    cache = new_cache(model, store)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward(model, cache, prompt(47))
    forward(model, cache, prompt(48)[:, 47:])
    assert cache.publish() == 0


def test_a_model_that_moved_and_is_the_same_goes_on(store):
    model = make_model()
    cache = new_cache(model, store)
    forward(model, cache, prompt(47))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    forward(model, cache, prompt(48)[:, 47:])
    assert cache.publish() == 3


LAYER_CHANGES = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(1),
    "crop": lambda layer: layer.crop(-1),
}


@pytest.mark.parametrize("how", LAYER_CHANGES)
def test_layers_that_are_changed_one_by_one_have_no_name(how, model, store):
    cache = new_cache(model, store)
    forward(model, cache, torch.cat([prompt(64), prompt(64, seed=1)]))
    for layer in cache.layers:
        LAYER_CHANGES[how](layer)
    if how == "crop":
        for number in range(3):
            cache.layers[number].update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16))
    assert cache.publish() == 0
    assert store.counters["bypassed"] == 1
    cache.reset()
    forward(model, cache, prompt(64))
    assert cache.publish() == 4


@pytest.mark.parametrize(
    "given",
    [
        {"pixel_values": [torch.rand(3, 4, 4)]},
        {"images": ("a.png",)},
        {"style": "loud"},
        {"extra": {"scale": 2.0}},
        {"cache_position": torch.arange(1, 65)},
        {"cache_position": 3},
    ],
    ids=lambda given: next(iter(given)),
)
def test_arguments_that_nobody_knows_have_no_name(given, model, store):
    ids = prompt(64)
    assert not_plain({"input_ids": ids, "cache_position": torch.arange(64), "top": 3}, 0) == ""
    assert not_plain({"input_ids": ids, **given}, 0)


def test_a_sharded_model_goes_past_the_store(store, monkeypatch):
    model = make_model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    forward(model, cache := new_cache(model, store), prompt(32))
    assert cache.publish() == 2  # every process has the whole
    store.flush(10)
    model._device_mesh = object()
    assert new_cache(model, store).restore(prompt(33), model) == 0
    assert store.counters["bypassed"] == 1
