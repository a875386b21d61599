"""What people's tools do with a cache, done to a `TieredCache`: all goes as with `DynamicCache`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import tiny_model
from test_commands import TINY_LM
from test_generate_parity import check_integrity, prompt
from transformers import AutoTokenizer, DynamicCache, TextIteratorStreamer, pipeline


@contextmanager
def press(model, kept: float = 0.5) -> Iterator[None]:
    """Compress as kvpress does: behind each attention module's prefill, keys and values of the
    layer are replaced by some of them, here those with the smallest keys."""

    def compress(module, _args, kwargs, _output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if kwargs["hidden_states"].shape[1] == 1:
            return
        keys, values = layer.keys, layer.values
        count = int(keys.shape[2] * kept)
        chosen = keys.norm(dim=-1).topk(count, largest=False).indices.sort().values
        chosen = chosen[..., None].expand(-1, -1, -1, keys.shape[3])
        layer.keys = keys.gather(2, chosen).contiguous()
        layer.values = values.gather(2, chosen).contiguous()

    hooks = [
        layer.self_attn.register_forward_hook(compress, with_kwargs=True)
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def compressed_then_continued(model, cache, num_new: int = 12) -> list[int]:
    """A prompt compressed, then greedy tokens behind it at their own positions."""
    ids = prompt()
    with press(model):
        logits = model(ids, past_key_values=cache).logits
    tokens = []
    for position in range(ids.shape[1], ids.shape[1] + num_new):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model(
            torch.tensor([tokens[-1:]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
        ).logits
    return tokens


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_press_replaces_keys_and_values_of_every_layer(make_cache, family):
    model = tiny_model(family)
    dynamic = DynamicCache(config=model.config)
    expected = compressed_then_continued(model, dynamic)
    cache = make_cache(model.config, device_blocks=12)
    assert compressed_then_continued(model, cache) == expected
    assert cache.get_seq_length() == dynamic.get_seq_length() < prompt().shape[1]
    assert cache.stats().counters.cold_reads > 0
    check_integrity(cache)
    unpressed = model.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert unpressed[0, prompt().shape[1] :].tolist() != expected, "it would show"


def test_a_streamer_reads_in_another_thread(make_cache):
    model, tokenizer = tiny_model("Llama"), AutoTokenizer.from_pretrained(TINY_LM)
    ids = prompt()
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **how)[0, ids.shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    cache = make_cache(model.config, device_blocks=12)
    thread = threading.Thread(
        target=model.generate,
        args=(ids,),
        kwargs={**how, "past_key_values": cache, "streamer": streamer},
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected)
    assert cache.stats().counters.cold_reads > 0
    assert cache.get_seq_length() == ids.shape[1] + 23, "this thread may go on with it"


def test_a_pipeline_takes_a_cache_as_generate_does(make_cache):
    text = "def main():\n    return parse_arguments(" * 4
    generate = pipeline("text-generation", model=TINY_LM, dtype=torch.float32)
    how = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    expected = generate(text, **how)
    cache = make_cache(generate.model.config, device_blocks=None, device_bytes="512KiB")
    assert generate(text, past_key_values=cache, **how) == expected
    assert cache.stats().counters.cold_reads > 0
