"""Adapters and caches: one is as good with the other as without, and adapters do not mix."""

import copy

import pytest
import torch
from families import tiny_model
from test_generate_parity import prompt
from transformers import DynamicCache

from hf_tiered_cache import TieredCache

peft = pytest.importorskip("peft", reason="pip install peft")

NAMES = ("first", "second")
HOW = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def model():
    """A model with two adapters whose weights are large enough to be heard."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], lora_alpha=32)
    wrapped = peft.get_peft_model(copy.deepcopy(tiny_model("Llama")), config, NAMES[0])
    wrapped.add_adapter(NAMES[1], config)
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return wrapped.eval()


def generated(model, cache) -> list[int]:
    ids = prompt()
    return model.generate(input_ids=ids, past_key_values=cache, **HOW)[0, ids.shape[1] :].tolist()


def test_every_adapter_says_what_it_says_with_a_dynamic_cache(model, make_cache):
    said = []
    for name in NAMES:
        model.set_adapter(name)
        said.append(generated(model, DynamicCache()))
        cache = make_cache(model.config, device_blocks=12)
        assert generated(model, cache) == said[-1]
        assert cache.stats().counters.cold_reads > 0
    with model.disable_adapter():
        said.append(generated(model, DynamicCache()))
        assert generated(model, make_cache(model.config, device_blocks=12)) == said[-1]
    assert len(set(map(tuple, said))) == 3, "adapters that would not be heard"


def test_a_fork_of_a_prompt_may_go_on_with_another_adapter_as_a_dynamic_cache_may(
    model, make_cache
):
    """What was computed with one adapter stays its own; nothing is computed again behind one's
    back, and each fork goes its way."""
    ids = prompt()
    more = torch.cat([ids, torch.tensor([[5, 7]])], 1)
    said = {}
    for kind, cache in (("dynamic", DynamicCache()), ("tiered", make_cache(model.config))):
        model.set_adapter(NAMES[0])
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        for name in NAMES:
            model.set_adapter(name)
            fork = copy.deepcopy(cache)
            tokens = model.generate(input_ids=more, past_key_values=fork, **HOW)
            said[kind, name] = tokens[0, more.shape[1] :].tolist()
            if isinstance(fork, TieredCache):
                fork.close()
    for name in NAMES:
        assert said["tiered", name] == said["dynamic", name]
    assert said["tiered", NAMES[0]] != said["tiered", NAMES[1]]
