"""Compiled, checkpointed, dispatched by accelerate, asked for weights: the same tokens or a clear
error, and the cache object left alone."""

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from support import sharpen
from test_generate_parity import (
    FAMILIES,
    SMALLEST,
    check_integrity,
    prompt,
    run,
    tiny_model,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tiered_cache import BackwardError


@pytest.fixture
def model():
    """A model of this test's own, which it may change."""
    return copy.deepcopy(tiny_model("Llama"))


def test_a_compiled_model_answers_as_the_plain_one(make_cache):
    config = LlamaConfig(**{**FAMILIES["Llama"], "num_hidden_layers": 1})  # tracing takes long
    model = sharpen(LlamaForCausalLM(config))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    dense, tiered = DynamicCache(config=config), make_cache(config, 3)
    ids = prompt()
    with torch.no_grad():
        for part in (slice(0, 29), slice(29, 30), slice(30, 37)):
            expected = model(ids[:, part], past_key_values=dense).logits
            logits = compiled(ids[:, part], past_key_values=tiered).logits
            assert (logits - expected).abs().max() < 2e-4
    assert tiered.stats().counters.cold_reads > 0
    check_integrity(tiered)
    torch._dynamo.reset()


def test_generate_does_not_compile_around_the_cache(make_cache, model):
    """transformers compiles for caches of fixed shape only; ours says that it is none."""
    cache = make_cache(model.config, SMALLEST[1])
    assert not cache.is_compileable
    tokens, _ = run(model, cache)
    assert torch.equal(tokens, run(model, DynamicCache())[0])
    assert not hasattr(model, "_compiled_call")


def test_gradient_checkpointing_changes_nothing_in_inference(make_cache, model):
    expected, _ = run(model, DynamicCache())
    model.gradient_checkpointing_enable()
    tokens, _ = run(model, make_cache(model.config, SMALLEST[1]))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_training_through_the_cache_is_refused_or_goes_without_it(make_cache, model, checkpoints):
    """With checkpointing transformers takes the cache away from the layers; else we refuse."""
    if checkpoints:
        model.gradient_checkpointing_enable()
    model.train()
    cache = make_cache(model.config, 64)
    ids = prompt()
    loss = model(ids, labels=ids, past_key_values=cache, use_cache=True).loss
    if not checkpoints:
        with pytest.raises(BackwardError, match="use_cache=False"):
            loss.backward()
        return
    loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert torch.equal(gradient, model.model.layers[0].self_attn.k_proj.weight.grad)
    assert cache.get_seq_length() == 0


@pytest.mark.slow  # torch compiles C++ for it
def test_flex_attention_keeps_its_name_and_the_tokens(make_cache, model):
    """Its block masks are no tensors: prefill goes to torch's own function, densely."""
    model.set_attn_implementation("flex_attention")
    try:
        expected, _ = run(model, DynamicCache())
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch cannot compile flex attention here: {error}")
    cache = make_cache(model.config, SMALLEST[1])
    tokens, _ = run(model, cache)
    assert torch.equal(tokens, expected)
    assert cache.stats().counters.cold_reads > 0


def test_eager_attention_gives_its_weights(make_cache, model):
    model.set_attn_implementation("eager")
    how = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 5}
    ids = prompt()
    dense, tiered = (
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            **how,
        )
        for cache in (DynamicCache(), make_cache(model.config, SMALLEST[1]))
    )
    assert torch.equal(tiered.sequences, dense.sequences)
    for mine, theirs in zip(tiered.attentions, dense.attentions, strict=True):
        for layer, expected in zip(mine, theirs, strict=True):
            assert torch.allclose(layer, expected, atol=1e-5)


def test_attention_functions_of_others_are_left_alone(make_cache):
    """Such as those of hub kernels, which transformers registers by the names of repositories."""

    def theirs(*args, **kwargs):
        raise AssertionError("not called here")

    ALL_ATTENTION_FUNCTIONS.register("kernels-community/theirs", theirs)
    try:
        make_cache()
        assert ALL_ATTENTION_FUNCTIONS["kernels-community/theirs"] is theirs
    finally:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping["kernels-community/theirs"]


def dispatched_by_map(model, folder):
    """Some layers on the CPU, some kept on disk and brought in by hooks."""
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    dispatch_model(
        model,
        device_map,
        main_device="cpu",
        offload_dir=str(folder),
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,
    )


OFFLOADS = {
    "weights on disk": lambda model, folder: disk_offload(
        model, str(folder), execution_device="cpu"
    ),
    "weights on the CPU": lambda model, _: cpu_offload(model, execution_device="cpu"),
    "device_map": dispatched_by_map,
}


@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 13}], ids=str)
def test_a_model_with_offloaded_weights_leaves_the_cache_alone(
    make_cache, model, tmp_path, monkeypatch, name, how
):
    expected, _ = run(model, DynamicCache(), **how)
    OFFLOADS[name](model, tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters()) or name == "weights on the CPU"
    cache = make_cache(model.config, SMALLEST[1] * how.get("num_beams", 1))
    seen = []
    update = partial(type(cache).update, cache)

    def spy(*args, **kwargs):
        seen.append(cache)
        return update(*args, **kwargs)

    monkeypatch.setattr(cache, "update", spy)
    tokens, _ = run(model, cache, **how)
    assert torch.equal(tokens, expected)
    assert seen, "the model went on with another object"
    assert cache.stats().counters.cold_reads > 0
    check_integrity(cache)
