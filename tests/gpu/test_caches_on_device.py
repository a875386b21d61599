"""`generate` on each device says what it says with a `DynamicCache`, wherever the blocks lie."""

import pytest
import torch
from gpu.models import BLOCK_BYTES, PROMPT, generate, least_bytes, model_on, prompt_on
from support import double_copy
from test_generate_parity import FAMILIES, check_integrity
from transformers import DynamicCache

# Where what does not fit on the device goes.
PLACES = {
    "host": {"host_bytes": "64MiB", "disk_bytes": 0},
    "disk": {"host_bytes": 0, "disk_bytes": "64MiB"},
    "host and disk": {"host_bytes": 20 * BLOCK_BYTES, "disk_bytes": "64MiB"},
}
EVERYTHING = {"device_bytes": "64MiB", "host_bytes": 0, "disk_bytes": 0}


def cold_reads(cache) -> int:
    return cache.stats().counters.cold_reads


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_dynamic_cache_and_bits_those_of_any_budget(
    make_cache, device, copy_lane, family
):
    if device.type == "cpu" and family not in ("Llama", "GPT2"):
        pytest.skip("tests/test_generate_parity.py has it")
    model, ids = model_on(device, family), prompt_on(device)
    expected, reference = generate(model, DynamicCache(), ids)
    assert len(set(expected[0, PROMPT:].tolist())) > 2, "a model that repeats itself proves nothing"
    tokens, whole = generate(model, make_cache(model.config, None, **EVERYTHING), ids)
    assert torch.equal(tokens, expected)
    assert (whole - reference).abs().max() < 5e-4
    least = least_bytes(make_cache, model, ids, **PLACES["host"], **copy_lane)
    for place in PLACES:
        for device_bytes in (least, least + 40 * BLOCK_BYTES):
            knobs = {**PLACES[place], **copy_lane, "device_bytes": device_bytes}
            cache = make_cache(model.config, None, **knobs)
            tokens, logits = generate(model, cache, ids)
            assert torch.equal(tokens, expected), (place, device_bytes)
            assert torch.equal(logits, whole), (place, device_bytes)
            assert cold_reads(cache) > 0
            check_integrity(cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 64, 33])
def test_bits_of_16_bit_models_are_those_of_any_budget(make_cache, device, copy_lane, dtype, chunk):
    """Prefill in chunks of many queries and decode both stream here."""
    if device.type == "cpu" and (dtype, chunk) != (torch.bfloat16, 64):
        pytest.skip("once is enough where it is the same code")
    model, ids = model_on(device, "Llama", dtype), prompt_on(device, 300)
    how = {} if chunk is None else {"prefill_chunk_size": chunk}
    _, whole = generate(model, make_cache(model.config, None, **EVERYTHING), ids, **how)
    least = least_bytes(make_cache, model, ids, **PLACES["host"], **copy_lane)
    for place in PLACES:
        knobs = {**PLACES[place], **copy_lane, "device_bytes": least}
        cache = make_cache(model.config, None, **knobs)
        _, logits = generate(model, cache, ids, **how)
        assert torch.equal(logits, whole), place
        assert cold_reads(cache) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_are_about_as_close_to_float64_as_those_of_sdpa(make_cache, device, dtype):
    """Partials of 16-bit prefill are rounded once more; the rest of the model errs as much."""
    ratios, batch = [], 6 if device.type == "cuda" else 2
    for family in ("Llama", "Qwen3", "GPT2"):
        model, ids = model_on(device, family, dtype), prompt_on(device, batch=batch)
        knobs = {**PLACES["host"], "device_bytes": "64MiB"}
        tokens, dense = generate(model, DynamicCache(), ids)
        with torch.no_grad():
            exact = double_copy(model)(tokens.to(device)).logits[:, PROMPT - 1 : -1].cpu()
        tiered_tokens, tiered = generate(model, make_cache(model.config, None, **knobs), ids)
        agree = (tokens == tiered_tokens).cumprod(1).bool()[:, PROMPT - 1 : -1]
        mine, theirs = (
            (logits.double() - exact)[agree].square().mean().sqrt() for logits in (tiered, dense)
        )
        ratios.append(float(mine / theirs))
    assert max(ratios) < 1.3, ratios


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, "auto"])
def test_the_cpu_may_attend_any_share_of_the_host_blocks(make_cache, device, share):
    model, ids = model_on(device, "Llama"), prompt_on(device)
    expected, reference = generate(model, DynamicCache(), ids)
    least = least_bytes(make_cache, model, ids, **PLACES["host"], cpu_share=share)
    for place in PLACES:
        knobs = {**PLACES[place], "device_bytes": least, "cpu_share": share}
        cache = make_cache(model.config, None, **knobs)
        tokens, logits = generate(model, cache, ids)
        assert torch.equal(tokens, expected), place
        assert (logits - reference).abs().max() < 5e-4
        check_integrity(cache)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=str)
def test_beams_and_speculation(make_cache, device, how):
    model, ids = model_on(device, "Llama"), prompt_on(device)[:, :20].repeat(1, 4)
    how = {"output_logits": False, **how}
    tokens = []
    for cache in (
        DynamicCache(),
        make_cache(model.config, None, device_bytes="2MiB", host_bytes="64MiB"),
    ):
        ones = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=ones, past_key_values=cache, max_new_tokens=12, **how
        )
        tokens.append(out.cpu())
    assert torch.equal(*tokens)


def test_a_left_padded_batch(make_cache, device, copy_lane):
    model, ids = model_on(device, "Llama"), prompt_on(device, batch=2)
    mask = torch.ones_like(ids)
    ids[1, :71], mask[1, :71] = 0, 0
    how = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=DynamicCache(), **how)
    least = least_bytes(make_cache, model, ids, **PLACES["host"], **copy_lane)
    for device_bytes in (least, "64MiB"):
        knobs = {**PLACES["host"], **copy_lane, "device_bytes": device_bytes}
        tokens = model.generate(ids, past_key_values=make_cache(model.config, None, **knobs), **how)
        assert torch.equal(tokens, expected)


def test_layers_on_two_devices_share_a_cache(make_cache, gpu):
    """What `device_map` over a GPU and the CPU comes to: blocks lie where their layers are."""
    cache = make_cache(None, None, device_bytes="1MiB", host_bytes="64MiB", disk_bytes="64MiB")
    held = {}
    for layer, where in enumerate((gpu, torch.device("cpu"), gpu)):
        held[layer] = torch.randn(2, 1, 2, 300, 8, device=where).unbind(0)
        for part in (slice(0, 120), slice(120, 300)):
            cache.update(*(states[:, :, part] for states in held[layer]), layer)
    for layer, (keys, values) in held.items():
        assert torch.equal(cache.layers[layer].keys.materialize(), keys)
        assert torch.equal(cache.layers[layer].values.materialize(), values)
    check_integrity(cache)


def test_a_model_whose_weights_lie_on_the_cpu(make_cache, gpu):
    """accelerate's `device_map` with modules on the CPU: they are computed on the GPU."""
    from accelerate import dispatch_model

    expected, _ = generate(
        model_on(torch.device("cpu"), "Llama"), DynamicCache(), prompt_on(torch.device("cpu"))
    )
    model, ids = model_on(torch.device("cpu"), "Llama"), prompt_on(gpu)
    device_map = {
        "model.embed_tokens": gpu.index,
        "model.layers.0": gpu.index,
        "model.layers.1": "cpu",
        "model.layers.2": "cpu",
        "model.norm": gpu.index,
        "model.rotary_emb": gpu.index,
        "lm_head": gpu.index,
    }
    dispatch_model(model, device_map, main_device=gpu.index)
    cache = make_cache(model.config, None, device_bytes="2MiB", **PLACES["host"])
    tokens, _ = generate(model, cache, ids)
    assert torch.equal(tokens, expected)
