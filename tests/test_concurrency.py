"""Several caches in several threads do not know of each other; a cache has one thread at a time."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import families
import pytest
import torch
from support import sharpen
from test_generate_parity import (
    LAYERS,
    SIZES,
    SMALLEST,
    check_integrity,
    prompt,
    run,
    tiny_model,
)
from transformers import DynamicCache, Gemma3nForCausalLM, Gemma3nTextConfig

from hf_tiered_cache import CacheInUseError, TieredCache


def states(num_tokens: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, num_tokens, 8), torch.randn(1, 2, num_tokens, 8)


def in_another_thread(call):
    """What `call` returns or raises in a thread of its own, which has ended then."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def forward(cache, layers: int = LAYERS, num_tokens: int = 1) -> None:
    for layer in range(layers):
        cache.update(*states(num_tokens), layer)


@pytest.fixture
def other_thread():
    """A thread that stays alive between its tasks."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call: pool.submit(call).result()


def test_generate_in_a_pool_of_threads_each_with_its_cache_and_two_models(make_cache):
    models = [tiny_model("Llama"), tiny_model("GPT2")]
    prompts = [torch.randint(2, 97, (1, 30 + i)) for i in range(4)]
    jobs = [(model, prompt) for prompt in prompts for model in models]
    expected = [run(model, DynamicCache(), prompt)[0] for model, prompt in jobs]
    caches = [make_cache(model.config, SMALLEST[1] + 2) for model, _ in jobs]
    together = threading.Barrier(4)

    def job(index: int) -> torch.Tensor:
        model, prompt = jobs[index]
        together.wait(timeout=60)
        # not by `run`, which seeds the generator of the whole process
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=caches[index],
            max_new_tokens=expected[index].shape[1] - prompt.shape[1],
            do_sample=False,
        )

    with ThreadPoolExecutor(4) as pool:
        tokens = list(pool.map(job, range(len(jobs))))
    for got, wanted, one in zip(tokens, expected, caches, strict=True):
        assert torch.equal(got, wanted)
        assert one.stats().counters.cold_reads > 0
        check_integrity(one)


def test_a_second_thread_in_the_middle_of_a_forward_is_refused_and_the_first_goes_on(
    make_cache, other_thread
):
    cache = make_cache(tiny_model("Llama").config, 64)
    forward(cache, num_tokens=9)
    before = [layer.get_seq_length() for layer in cache.layers]
    assert before == [9] * LAYERS
    cache.update(*states(), 0)
    for attempt in (
        lambda: cache.update(*states(), 0),
        lambda: cache.update(*states(), 1),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(CacheInUseError, match=r"its own TieredCache"):
            other_thread(attempt)
    cache.update(*states(), 1)
    cache.update(*states(), 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [10] * LAYERS
    check_integrity(cache)


def test_without_a_config_the_first_forward_ends_where_the_model_says(make_cache, other_thread):
    """Layers appear as they come: only the model knows that another one follows."""
    model = tiny_model("Llama")
    cache = make_cache(None, 64)
    refused = []

    def intrude(*_) -> None:
        with pytest.raises(CacheInUseError) as caught:
            other_thread(lambda: cache.update(*states(), 0))
        refused.append(caught.value)

    hook = model.model.layers[1].register_forward_hook(intrude)
    with torch.no_grad():
        model(torch.arange(2, 11)[None], past_key_values=cache)
    hook.remove()
    assert len(refused) == 1
    assert [one.get_seq_length() for one in cache.layers] == [9] * LAYERS


def test_threads_may_take_turns_between_forwards(make_cache, other_thread):
    cache = make_cache(tiny_model("Llama").config, 64)
    for turn in range(4):
        (other_thread if turn % 2 else in_another_thread)(lambda: forward(cache))
    forward(cache)
    other_thread(lambda: cache.crop(-2))
    assert [layer.get_seq_length() for layer in cache.layers] == [3] * LAYERS
    check_integrity(cache)


def test_a_thread_that_ended_in_the_middle_holds_nothing(make_cache):
    cache = make_cache(tiny_model("Llama").config, 64)
    in_another_thread(lambda: cache.update(*states(), 0))
    cache.crop(-1)
    forward(cache)
    assert cache.get_seq_length() == 1 and cache.layers[LAYERS - 1].get_seq_length() == 1


def test_reset_frees_a_cache_whose_forward_was_given_up(make_cache, other_thread):
    cache = make_cache(tiny_model("Llama").config, 64)
    other_thread(lambda: cache.update(*states(), 0))
    with pytest.raises(CacheInUseError, match="reset"):
        forward(cache)
    cache.reset()
    forward(cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [1] * LAYERS


def test_hammered_by_two_threads_a_cache_refuses_but_never_mixes(make_cache):
    """Whatever the timing: every forward that was not refused is there, whole, in every layer."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    cache = make_cache(tiny_model("Llama").config, 64, block_tokens=4)
    forward(cache)
    done: list[float] = [float("nan")]
    refused = 0
    lock = threading.Lock()
    together = threading.Barrier(2)

    def hammer(number: int) -> None:
        nonlocal refused
        together.wait(timeout=60)
        for step in range(60):
            value = float(1000 * number + step)
            keys = torch.full((1, 2, 1, 8), value)
            try:
                for layer in range(LAYERS):
                    cache.update(keys, keys, layer)
            except CacheInUseError:
                with lock:
                    refused += 1
            else:
                with lock:
                    done.append(value)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(done) - 1 + refused == 120
    seen = [layer.keys.materialize()[0, 0, 1:, 0].tolist() for layer in cache.layers]
    assert all(sorted(tokens) == sorted(done[1:]) for tokens in seen)
    assert all(tokens == seen[0] for tokens in seen)
    check_integrity(cache)


def test_many_caches_come_and_go_in_threads(tmp_path):
    def life(_: int) -> int:
        with TieredCache(
            device_bytes=10 * 4096, disk_bytes="1MiB", disk_dir=tmp_path, block_tokens=4
        ) as cache:
            for _ in range(30):
                forward(cache, layers=2)
            return cache.get_seq_length()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(life, range(12))) == [30] * 12


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("name", ["Jamba", "LFM2"])
def test_turns_of_a_chat_may_come_from_any_thread_also_with_linear_layers(
    make_cache, other_thread, name, has_config
):
    """The last layers hold no tokens: where a forward ends is known all the same."""
    model = families.tiny_model(name)
    config = model.config if has_config else None
    cache = make_cache(config, 64)
    first, second = (torch.randint(2, 97, (1, length)) for length in (12, 9))

    def turn(past, ids: torch.Tensor) -> torch.Tensor:
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        return model.generate(ids, past_key_values=past, **how)

    def chat(past, run_first, run_second) -> torch.Tensor:
        history = run_first(lambda: turn(past, first))
        return run_second(lambda: turn(past, torch.cat([history, second], 1)))

    expected = chat(DynamicCache(config=model.config), in_another_thread, in_another_thread)
    assert torch.equal(chat(cache, other_thread, lambda call: call()), expected)


@cache
def shared_states_model() -> Gemma3nForCausalLM:
    """A model whose last two layers attend the keys and values of earlier ones."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8},
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=None,
    )
    return sharpen(Gemma3nForCausalLM(config), factor=1.5)


@pytest.mark.parametrize("has_config", [True, False])
def test_the_answer_may_come_from_another_thread_where_the_last_layers_keep_nothing(
    make_cache, other_thread, has_config
):
    """The prompt's thread lives on, as that of an application does beside a streamer's."""
    model = shared_states_model()
    ids = prompt()
    expected, _ = run(model, DynamicCache(config=model.config), ids)
    past = make_cache(model.config if has_config else None, 24)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=past)
    assert torch.equal(other_thread(lambda: run(model, past, ids))[0], expected)
    check_integrity(past)


def test_the_linear_states_of_a_forward_under_way_are_guarded_too(make_cache, other_thread):
    cache = make_cache(families.tiny_model("LFM2").config, 64)  # linear layers come first
    cache.update_conv_state(torch.randn(1, 32, 3), 0)
    for attempt in (
        lambda: cache.update_conv_state(torch.randn(1, 32, 3), 0),
        lambda: cache.get_conv_state(0),
    ):
        with pytest.raises(CacheInUseError):
            other_thread(attempt)
    assert cache.get_conv_state(0) is not None
