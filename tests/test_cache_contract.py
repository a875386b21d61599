"""What transformers may ask of a cache, answered by `TieredCache` as `DynamicCache` answers it.

The first half asks the API itself, the second uses a cache as people do: a tiny model whose tokens
depend on its attention, budgets so small that most blocks are cold.
"""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.operations import send_to_device
from support import new_tokens
from test_generate_parity import LAYERS, NEW, PROMPT, SMALLEST, padded, prompt, run, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, Gemma2Config, LlamaConfig, MistralConfig

from hf_tiered_cache import TieredCache
from hf_tiered_cache.errors import ConfigError, UnsupportedInputError
from hf_tiered_cache.integration.paged_states import PagedStates


def dense(states: torch.Tensor | None) -> torch.Tensor | None:
    return states.materialize() if isinstance(states, PagedStates) else states


def assert_same(tiered: Any, dynamic: Any) -> None:
    """Two caches hold the same bits in every layer."""
    assert len(tiered) == len(dynamic)
    for mine, theirs in zip(tiered.layers, dynamic.layers, strict=True):
        assert (mine.keys is None) == (theirs.keys is None)
        if theirs.keys is not None:
            assert torch.equal(dense(mine.keys), theirs.keys)
            assert torch.equal(dense(mine.values), theirs.values)


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the built-in exception it raises."""
    try:
        return action()
    except Exception as error:
        names = {one.__name__ for one in type(error).__mro__}
        return "raises " + next(
            name
            for name in ("IndexError", "TypeError", "AttributeError", "ValueError")
            if name in names
        )


@pytest.fixture
def make_twins(make_cache):
    """Builds (tiered, dynamic); `fill=(batch, tokens, layers)` gives both the same tokens."""

    def make(config=None, fill=None, **sizes) -> tuple[TieredCache, DynamicCache]:
        twins = make_cache(config, **sizes), DynamicCache(config=config)
        if fill:
            update_both(twins, *fill)
        return twins

    return make


def update_both(twins, batch: int = 2, num_tokens: int = 3, layers: int = 2) -> None:
    for layer in range(layers):
        keys, values = new_tokens(batch, num_tokens)
        for one in twins:
            one.update(keys, values, layer)


# --- questions -----------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "length": lambda cache: cache.get_seq_length(),
    "length of a layer": lambda cache: cache.get_seq_length(1),
    "length of a layer that is not there": lambda cache: cache.get_seq_length(9),
    "length of the last layer": lambda cache: cache.get_seq_length(-1),
    "mask": lambda cache: cache.get_mask_sizes(5, 0),
    "mask of a layer that is not there": lambda cache: cache.get_mask_sizes(5, 9),
    "offset": lambda cache: cache.get_query_offset(),
    "offset of a layer": lambda cache: cache.get_query_offset(1),
    "capacity": lambda cache: cache.get_max_length(),
    "capacity of a layer": lambda cache: cache.get_max_length(0),
    "capacity of a layer that is not there": lambda cache: cache.get_max_length(9),
    "number of layers": len,
    "truth": bool,
    "initialised": lambda cache: cache.is_initialized,
    "layers initialised": lambda cache: [layer.is_initialized for layer in cache.layers],
    "croppable": lambda cache: cache.is_croppable,
    "compileable": lambda cache: cache.is_compileable,
    "sliding": lambda cache: cache.is_sliding,
    "linear": lambda cache: cache.is_linear,
    "dummy": lambda cache: cache.is_dummy,
    "recording": lambda cache: bool(cache.layers) and cache.is_recording_past(0),
    "previous state": lambda cache: cache.has_previous_state(),
    "previous state of a layer": lambda cache: cache.has_previous_state(0),
    "convolution": lambda cache: cache.get_conv_state(0),
    "recurrence": lambda cache: cache.get_recurrent_state(0),
    "indexer": lambda cache: cache.update_indexer(torch.zeros(1, 1, 4), 0),
    "subscript": lambda cache: cache[0],
    "shapes": lambda cache: [tuple(keys.shape) for keys, _, _ in cache if keys is not None],
    "windows": lambda cache: [window for _, _, window in cache],
    "a slice of layers": lambda cache: len(cache.layers[1:]),
    "a positive crop": lambda cache: cache.crop(2) if cache.layers else None,
    "early initialisation": lambda cache: cache.early_initialization(
        2, [2], 8, torch.float32, torch.device("cpu")
    ),
}
# Without a config any layer may turn out to keep linear states, when a model asks for them.
ON_DEMAND = {"convolution", "recurrence"}
STAGES: dict[str, Callable[[Any], Any]] = {
    "new": id,
    "half a forward": lambda twins: update_both(twins, layers=1),
    "full": lambda twins: update_both(twins, num_tokens=30),
    "cropped": lambda twins: (update_both(twins), [one.crop(-1) for one in twins]),
    "cropped to nothing": lambda twins: (update_both(twins), [one.crop(-9) for one in twins]),
    "reset": lambda twins: (update_both(twins), [one.reset() for one in twins]),
    "recording": lambda twins: (
        update_both(twins),
        [one.activate_past_recording() for one in twins],
    ),
    "offloaded": lambda twins: (update_both(twins), [one.offload(0) for one in twins]),
}


@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_every_question_has_the_answer_of_a_dynamic_cache(make_twins, stage, has_config):
    twins = make_twins(LlamaConfig(num_hidden_layers=2) if has_config else None, device_blocks=14)
    STAGES[stage](twins)
    assert_same(*twins)
    for name, question in QUESTIONS.items():
        if name in ON_DEMAND and not has_config:
            continue
        mine, theirs = (outcome(partial(question, one)) for one in twins)
        assert mine == theirs, (name, mine, theirs)


def test_the_batch_is_known_where_transformers_knows_it_only_of_other_caches(make_twins):
    tiered, dynamic = make_twins(fill=(3, 5, 2))
    assert (tiered.batch_size, dynamic.batch_size) == (3, -1)
    tiered.reset()
    assert tiered.batch_size == -1


def test_the_batch_may_be_asked_in_the_middle_of_a_forward(make_twins):
    tiered, _ = make_twins(LlamaConfig(num_hidden_layers=2), fill=(3, 5, 1))
    assert tiered.batch_size == 3


def test_a_new_layer_has_no_keys_and_prints_its_name(make_twins):
    tiered, dynamic = make_twins(LlamaConfig(num_hidden_layers=2))
    assert [*tiered] == [*dynamic] == [(None, None, None)] * 2
    assert repr(tiered.layers[1]) == "TieredLayer"


def test_update_takes_what_remote_code_adds(make_twins):
    tiered, _ = make_twins()
    keys, values = new_tokens(1, 3)
    got = tiered.update(keys, values, 0, {"sin": None}, cache_position=torch.arange(3))
    assert [part.shape for part in got] == [keys.shape, values.shape]


def test_a_forward_of_no_tokens_changes_nothing(make_twins):
    twins = make_twins(fill=(2, 5, 2))
    update_both(twins, num_tokens=0)
    assert_same(*twins)


# --- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([3, 1, 1]),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([True, False, False, True]),
        [3, 1],
        [-1, 0],
        [True, False, True, False],
        range(2),
        np.array([2, 0]),
        slice(1, 3),
        slice(None, None, 2),
        slice(None),
        ...,
    ],
    ids=repr,
)
def test_rows_are_selected_by_whatever_indexes_a_dimension(make_twins, indices):
    twins = make_twins(fill=(4, 9, 2), device_blocks=20)
    for one in twins:
        one.batch_select_indices(indices)
    assert_same(*twins)


@pytest.mark.parametrize(
    "indices",
    [(3, 1), (1,), (True, False, True, False), [torch.tensor(1), torch.tensor(2)]],
    ids=repr,
)
def test_rows_are_selected_by_a_tuple_of_numbers(make_twins, indices):
    twins = make_twins(fill=(4, 9, 2))
    for one in twins:
        one.batch_select_indices(indices)
    assert_same(*twins)


@pytest.mark.parametrize("indices", [2, torch.tensor(2), torch.tensor([[0, 1]])], ids=repr)
def test_what_would_not_leave_a_batch_is_refused_by_name(make_twins, indices):
    tiered, _ = make_twins(fill=(4, 9, 2))
    with pytest.raises(UnsupportedInputError):
        tiered.batch_select_indices(indices)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 1, 0, 2])),
        ("reorder_cache", torch.tensor([2, 0], dtype=torch.int32)),
        ("batch_repeat_interleave", 3),
        ("batch_repeat_interleave", 1),
        ("crop", -4),
        ("crop", -9),
        ("crop", 0),
    ],
)
def test_operations_do_to_cold_blocks_what_they_do_to_tensors(make_twins, name, argument):
    twins = tiered, _ = make_twins(fill=(4, 30, 2), device_blocks=20)
    assert tiered.stats().cold_blocks > 20
    for one in twins:
        getattr(one, name)(argument)
    assert_same(*twins)
    batch = twins[1].layers[0].keys.shape[0]
    if batch <= 4:  # twelve filling blocks need a larger device
        update_both(twins, batch, 3)
        assert_same(*twins)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("reorder_cache", torch.tensor([0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([0])),
        ("crop", -1),
        ("reset", None),
        ("activate_past_recording", None),
    ],
)
def test_operations_on_a_new_cache_do_nothing(make_twins, name, argument):
    for config in (None, LlamaConfig(num_hidden_layers=2)):
        twins = make_twins(config)
        for one in twins:
            getattr(one, name)(*([] if argument is None else [argument]))
        update_both(twins)
        assert_same(*twins)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 1, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([0])),
    ],
)
def test_operations_on_rows_of_an_emptied_cache_do_nothing(make_twins, name, argument):
    twins = make_twins(fill=(2, 5, 2))
    for one in twins:
        one.crop(-5)
        getattr(one, name)(argument)
    assert_same(*twins)
    update_both(twins, batch=2)
    assert_same(*twins)


def test_early_initialisation_opens_empty_layers(make_twins):
    twins = tiered, dynamic = make_twins(LlamaConfig(num_hidden_layers=2))
    for one in twins:
        one.early_initialization(2, 2, [8, 8], torch.float32, torch.device("cpu"))
    assert tiered.is_initialized
    assert dynamic.is_initialized
    assert tiered.get_mask_sizes(3, 1) == dynamic.get_mask_sizes(3, 1) == (3, 0)
    states = [torch.randn(2, 2, 5, 8) for _ in range(4)]
    for one in twins:
        one.update(*states[:2], 0)
        one.update(*states[2:], 1)
    assert_same(*twins)


@pytest.mark.parametrize(("batch", "value_dim"), [(3, 8), (2, 4)])
def test_early_initialisation_does_not_bind_the_first_update(make_twins, batch, value_dim):
    twins = make_twins(LlamaConfig(num_hidden_layers=1))
    keys, values = torch.randn(batch, 2, 5, 8), torch.randn(batch, 2, 5, value_dim)
    for one in twins:
        one.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
        one.update(keys, values, 0)
    assert_same(*twins)


def test_offload_and_prefetch_of_a_layer_change_nothing_to_be_seen(make_twins):
    twins = tiered, _ = make_twins(fill=(1, 40, 2), device_blocks=8)
    for one in twins:
        one.offload(1)
        one.layers[1].prefetch()
    assert_same(*twins)
    assert tiered.stats().cold_blocks > 0


def test_windowed_layers_beside_tiered_ones_record_and_crop_as_ever(make_twins):
    twins = tiered, _ = make_twins(Gemma2Config(num_hidden_layers=4, sliding_window=6))
    update_both(twins, 2, 4, layers=4)
    for one in twins:
        one.activate_past_recording()
    assert [tiered.is_recording_past(layer) for layer in range(4)] == [True, False] * 2
    update_both(twins, 2, 7, layers=4)
    for one in twins:
        one.crop(-3)
        one.reorder_cache(torch.tensor([1, 0]))
        one.batch_repeat_interleave(2)
    assert_same(*twins)
    for layer in range(4):
        assert tiered.get_mask_sizes(2, layer) == twins[1].get_mask_sizes(2, layer)
    forks = copy.deepcopy(twins)
    update_both(forks, 4, 2, layers=4)
    assert_same(*forks)
    assert_same(*twins)
    for one in twins:
        one.reset()
    update_both(twins, 1, 9, layers=4)
    assert_same(*twins)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([2, 0])),
        ("batch_select_indices", slice(1, None)),
    ],
)
def test_a_cache_without_any_tiered_layer_has_rows_all_the_same(make_twins, name, argument):
    twins = make_twins(MistralConfig(num_hidden_layers=2, sliding_window=6))
    update_both(twins, 3, 9)
    for one in twins:
        getattr(one, name)(argument)
    assert_same(*twins)
    update_both(twins, twins[1].layers[0].keys.shape[0], 2)
    assert_same(*twins)


# --- what a layer's keys and values are ----------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda keys: (keys.shape, keys.shape[-2], keys.size(2), keys.dim(), len(keys)),
        lambda keys: (keys.numel(), keys.nbytes, keys.element_size(), keys.dtype, keys.device),
        lambda keys: (keys.is_contiguous(), keys.requires_grad, torch.is_tensor(keys)),
        lambda keys: keys[1, :, -3:].tolist(),
        lambda keys: keys[torch.tensor([True, False])].tolist(),
        lambda keys: [row.sum().item() for row in keys],
        lambda keys: torch.cat([keys, torch.zeros(2, 2, 1, 8)], dim=2).tolist(),
        lambda keys: torch.zeros(2, 2, 9, 8).copy_(keys).tolist(),
        lambda keys: keys.to(torch.bfloat16).tolist(),
        lambda keys: keys.to(keys.device, non_blocking=True) is keys,
        lambda keys: keys.tolist(),
        lambda keys: keys.numpy().tolist(),
        lambda keys: np.asarray(keys).tolist(),
        lambda keys: torch.from_dlpack(keys).tolist(),
        lambda keys: copy.deepcopy(keys).tolist(),
        lambda keys: pickle.loads(pickle.dumps(keys)).tolist(),
        lambda keys: torch.einsum("bhtd,bhsd->ts", keys, keys).tolist(),
        lambda keys: torch.zeros_like(keys).shape,
    ],
)
def test_keys_of_a_layer_read_as_the_tensor_they_stand_for(make_twins, read):
    tiered, dynamic = make_twins(fill=(2, 9, 1), device_blocks=8)
    assert read(tiered.layers[0].keys) == read(dynamic.layers[0].keys)


@pytest.mark.parametrize(
    "write",
    [
        lambda keys: keys.zero_(),
        lambda keys: keys.__setitem__((0, 0), 1.0),
        lambda keys: keys.__iadd__(1),
        lambda keys: keys.copy_(torch.zeros(2, 2, 9, 8)),
        lambda keys: torch.add(keys, 1, out=keys),
    ],
)
def test_writing_into_the_keys_of_a_layer_is_refused(make_twins, write):
    twins = tiered, _ = make_twins(fill=(2, 9, 1))
    with pytest.raises(UnsupportedInputError, match="read-only"):
        write(tiered.layers[0].keys)
    assert_same(*twins)


# --- where caches travel -------------------------------------------------------------------------


def test_accelerate_sends_a_cache_nowhere(make_twins):
    """Whatever has a `to` is sent, in every forward of a model that is spread over devices."""
    tiered, _ = make_twins(fill=(1, 5, 1))
    assert isinstance(tiered, DynamicCache)
    assert not hasattr(tiered, "to")
    sent = send_to_device({"cache": tiered, "more": (tiered, torch.ones(2))}, "meta")
    assert sent["cache"] is sent["more"][0] is tiered
    assert sent["more"][1].device.type == "meta"


def test_the_gathering_of_data_parallel_is_refused_with_what_to_do(make_twins):
    tiered, _ = make_twins(fill=(1, 5, 2))
    gathered = map(list, zip(tiered, tiered, strict=True))
    with pytest.raises(ConfigError, match="use one process per device"):
        type(tiered)(gathered)


def test_generate_marks_the_cache_and_returns_it(make_cache):
    model, cache = tiny_model("Llama"), make_cache()
    out = model.generate(
        prompt(), past_key_values=cache, max_new_tokens=2, return_dict_in_generate=True
    )
    assert out.past_key_values is cache
    assert cache._is_user_defined
    assert copy.deepcopy(cache)._is_user_defined
    assert model(prompt(), past_key_values=make_cache()).past_key_values.get_seq_length() == PROMPT


@pytest.fixture
def make_encoder_decoder_twins(make_twins):
    """Builds two `EncoderDecoderCache`s, one over a tiered cache, both with the same tokens."""

    def make() -> tuple[EncoderDecoderCache, EncoderDecoderCache]:
        twins = tuple(
            EncoderDecoderCache(one, DynamicCache()) for one in make_twins(device_blocks=20)
        )
        for layer in range(2):
            keys, values = new_tokens(2, 7)
            for one in twins:
                one.self_attention_cache.update(keys, values, layer)
                one.cross_attention_cache.update(values, keys, layer)
                one.is_updated[layer] = True
        return twins

    return make


def assert_both_same(tiered: EncoderDecoderCache, dynamic: EncoderDecoderCache) -> None:
    assert_same(tiered.self_attention_cache, dynamic.self_attention_cache)
    assert_same(tiered.cross_attention_cache, dynamic.cross_attention_cache)
    assert tiered.is_updated == dynamic.is_updated
    for question in (
        "length",
        "number of layers",
        "capacity",
        "sliding",
        "linear",
        "dummy",
        "mask",
    ):
        assert QUESTIONS[question](tiered) == QUESTIONS[question](dynamic)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("crop", -3),
        ("crop", 0),
        ("reorder_cache", torch.tensor([1, 1])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([1])),
        ("activate_past_recording", None),
        ("reset", None),
    ],
)
def test_an_encoder_decoder_cache_does_all_to_its_tiered_half(
    make_encoder_decoder_twins, name, argument
):
    twins = make_encoder_decoder_twins()
    forks = copy.deepcopy(twins)
    for one in twins:
        getattr(one, name)(*([] if argument is None else [argument]))
    assert_both_same(*twins)
    assert_both_same(*forks)
    assert [[part is None for part in row] for row in twins[0]] == [
        [part is None for part in row] for row in twins[1]
    ]
    for mine, theirs in zip(*forks, strict=True):
        assert torch.equal(mine[0].materialize(), theirs[0])
    assert "TieredCache(" in repr(twins[0])


# --- as people use it ----------------------------------------------------------------------------


def assert_close(tiered: TieredCache, dynamic: DynamicCache) -> None:
    """The same tokens in every layer, up to the rounding of the layers below."""
    for mine, theirs in zip(tiered.layers, dynamic.layers, strict=True):
        torch.testing.assert_close(dense(mine.keys), theirs.keys, rtol=0, atol=5e-5)
        torch.testing.assert_close(dense(mine.values), theirs.values, rtol=0, atol=5e-5)


@pytest.fixture
def model_twins(make_cache):
    """Builds (the tiny model, (a cache of the smallest device for a batch, a dynamic one)).

    Afterwards blocks must have been attended from the disk: else the use proved little."""
    made: list[TieredCache] = []

    def make(batch: int = 1) -> tuple[Any, tuple[TieredCache, DynamicCache]]:
        model = tiny_model("Llama")
        made.append(make_cache(model.config, SMALLEST[1] * batch))
        return model, (made[-1], DynamicCache(config=model.config))

    yield make
    for cache in made:
        assert cache.stats().counters.cold_reads > 0


def generate_both(model, twins, ids=None, mask=None, **how) -> torch.Tensor:
    """The tokens that both caches give, which are the same and not always the same one."""
    (mine, logits), (theirs, expected) = (run(model, one, ids, mask, **how) for one in twins)
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert_close(*twins)
    return mine


def forward_both(model, twins, ids, **how) -> torch.Tensor:
    """The logits of a plain forward over either cache."""
    with torch.no_grad():
        mine, theirs = (model(ids, past_key_values=one, **how).logits for one in twins)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
    assert_close(*twins)
    return mine


def test_an_answer_is_cropped_away_and_asked_for_again(model_twins):
    model, twins = model_twins()
    first = generate_both(model, twins)
    for one in twins:
        one.crop(-(one.get_seq_length() - PROMPT + 5))  # the last five words of the prompt as well
    other = torch.cat([first[:, : PROMPT - 5], prompt(1).flip(1)[:, :9]], 1)
    second = generate_both(model, twins, other)
    assert not torch.equal(first[:, PROMPT:], second[:, other.shape[1] :])


def test_a_forward_fills_the_cache_and_generate_goes_on(model_twins):
    model, twins = model_twins()
    forward_both(model, twins, prompt()[:, :30])
    tokens = generate_both(model, twins)
    expected, _ = run(model, DynamicCache())
    assert torch.equal(tokens, expected)


def test_several_conversations_continue_one_prompt_and_share_its_blocks(model_twins):
    model, twins = model_twins()
    shared = prompt()[:, :36]  # nine full blocks in each layer
    forward_both(model, twins, shared)
    endings = [prompt()[:, first : first + 5] for first in (0, 7, 19)]
    alone = [run(model, DynamicCache(), torch.cat([shared, one], 1))[0] for one in endings]

    def num_blocks() -> int:
        """Distinct blocks held, wherever they lie."""
        (manager,) = twins[0]._owned.pool.managers
        manager.check_integrity()
        return len({block for table in manager.blocks.tables for block in table.blocks()})

    held = num_blocks()
    assert held == LAYERS * 9
    forks = [(copy.deepcopy(twins[0]), copy.deepcopy(twins[1])) for _ in endings[1:]]
    assert num_blocks() == held
    # One by one, as a device that holds no more than one sequence allows.
    for pair, ending, expected in zip([*forks, twins], endings[::-1], alone[::-1], strict=True):
        got = generate_both(model, pair, torch.cat([shared, ending], 1))
        assert torch.equal(got, expected)
        new_blocks = num_blocks() - held
        assert 0 < new_blocks <= LAYERS * (1 + (5 + NEW) // 4)
        pair[0].close()
    assert len({tuple(tokens[0].tolist()) for tokens in alone}) == 3


@pytest.mark.parametrize(
    "how", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=repr
)
def test_one_prompt_is_repeated_for_several_answers(model_twins, how):
    model, twins = model_twins(3)
    forward_both(model, twins, prompt()[:, :30])
    for one in twins:
        one.batch_repeat_interleave(3)
    tokens = generate_both(model, twins, **how)
    expected, _ = run(model, DynamicCache(), **how)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "tiered"])
def test_right_padded_rows_are_read_and_continued(model_twins, implementation):
    """Pads on the right leave a hole in the mask as soon as tokens follow."""
    model, twins = model_twins(2)
    ids, mask = (tensor.flip(1) for tensor in padded())
    positions = torch.arange(PROMPT).expand(2, -1)
    try:
        model.set_attn_implementation(implementation)
        forward_both(model, twins, ids, attention_mask=mask, position_ids=positions)
        for _ in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            step = mask.sum(1, keepdim=True) - 1
            forward_both(model, twins, ids[:, :1], attention_mask=mask, position_ids=step)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_of_four_dimensions_say_what_is_attended(model_twins, kind):
    """A tree of guesses: four tokens behind the prompt, each seeing the prompt and itself."""
    model, twins = model_twins()
    forward_both(model, twins, prompt())
    guesses = prompt()[:, :4]
    mask = torch.cat([torch.ones(4, PROMPT, dtype=torch.bool), torch.eye(4, dtype=torch.bool)], 1)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.full((1, 4), PROMPT)
    logits = forward_both(
        model, twins, guesses, attention_mask=mask[None, None], position_ids=positions
    )
    alone = DynamicCache()
    with torch.no_grad():
        model(prompt(), past_key_values=alone)
        last = model(guesses[:, 3:], past_key_values=alone).logits
    torch.testing.assert_close(logits[:, 3:], last, rtol=0, atol=2e-4)


def test_positions_that_restart_are_taken_as_they_come(model_twins):
    """With a cache transformers looks for no packed sequences: all tokens see all before them."""
    model, twins = model_twins()
    positions = torch.cat([torch.arange(20), torch.arange(PROMPT - 20)])[None]
    restarted = forward_both(model, twins, prompt(), position_ids=positions)
    more = torch.arange(PROMPT - 20, PROMPT - 17)[None]
    forward_both(model, twins, prompt()[:, :3], position_ids=more)
    with torch.no_grad():
        plain = model(prompt()).logits
    assert not torch.allclose(restarted[:, -1], plain[:, -1], atol=1e-2)


def test_a_prompt_of_one_token(model_twins):
    model, twins = model_twins()
    generate_both(model, twins, prompt()[:, :1])


@pytest.mark.parametrize("is_continued", [False, True])
def test_a_prompt_given_as_embeddings(model_twins, is_continued):
    model, twins = model_twins()
    if is_continued:
        forward_both(model, twins, prompt()[:, :21])
    embedded = model.get_input_embeddings()(prompt()).detach()
    tokens = [
        model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones_like(prompt()),
            past_key_values=one,
            max_new_tokens=NEW,
            do_sample=False,
        )
        for one in twins
    ]
    expected, _ = run(model, DynamicCache())
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], expected[:, PROMPT:])
    assert_close(*twins)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 30])], ids=repr)
def test_only_some_logits_are_asked_for(model_twins, keep):
    model, twins = model_twins()
    logits = forward_both(model, twins, prompt(), logits_to_keep=keep)
    assert logits.shape[1] == (2 if isinstance(keep, torch.Tensor) else keep)
    forward_both(model, twins, prompt()[:, :5], logits_to_keep=1)


@pytest.mark.parametrize("chunk", [1, 7, 13])
@pytest.mark.parametrize("is_continued", [False, True])
def test_prompts_are_fed_in_chunks_that_fit_no_block(model_twins, chunk, is_continued):
    model, twins = model_twins()
    if is_continued:
        forward_both(model, twins, prompt()[:, :6])
    tokens = generate_both(model, twins, prefill_chunk_size=chunk)
    expected, _ = run(model, DynamicCache())
    assert torch.equal(tokens, expected)
