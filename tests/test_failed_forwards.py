"""A forward is all or nothing: wherever it fails, the cache goes on as if it had not been tried.

Each case fails a forward once, in one place and in one way, then goes on in some way, with the
cache that saw the failure and with a twin that did not. The logits must be the same bits.
"""

import contextlib
import copy
import errno
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
from test_generate_parity import check_integrity
from tiers.faulty_file import FaultyFile, fails_with
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_tiered_cache import TieredCache, TierIOError, disable, enable
from hf_tiered_cache.blocks import assembly
from hf_tiered_cache.integration import forwards
from hf_tiered_cache.tiers.disk import DiskTier

pytestmark = pytest.mark.usefixtures("one_thread")

# What keeps its past differently: full, windowed, linear, both in one layer, convolutions alone.
FAMILIES = ("Llama", "Gemma 3", "Qwen3-Next", "Falcon-H1", "LFM2")
STEPS = (14, 9, 1, 1, 1)  # tokens of each forward: two chunks of a prompt, then a few tokens
STAGES = {"prompt": 0, "chunk": 1, "token": 3}
LAYERS = 3


class PlannedError(Exception):
    """What a test made a forward fail with."""


@dataclass(frozen=True)
class Case:
    family: str
    stage: str
    layer: int
    moment: str
    error: type[BaseException]
    way: str
    batch: int = 1
    has_config: bool = True
    host_bytes: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def step(self) -> int:
        """The number of the forward that fails."""
        return STAGES[self.stage]


def ids_of(case: Case) -> list[torch.Tensor]:
    """The tokens of every forward, `[batch, tokens]`."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 97, (case.batch, n), generator=generator) for n in STEPS]


@torch.no_grad()
def step(model: torch.nn.Module, cache: TieredCache, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


# --- moments: where a forward is made to fail ----------------------------------------------------


def mixer(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The first module that calls itself that layer's."""
    return next(one for one in model.modules() if getattr(one, "layer_idx", None) == layer)


@contextlib.contextmanager
def hooked(register: Callable[..., Any], error: BaseException) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise error

    handle = register(fail)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def failing_method(cache: TieredCache, layer: int, error: BaseException) -> Iterator[None]:
    """The cache takes what the layer brings, and then fails."""

    methods = {"update": 2, "update_conv_state": 1, "update_recurrent_state": 1}

    def failing(name: str, position: int) -> Callable[..., Any]:
        method = getattr(cache, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if layer == (args[position] if len(args) > position else kwargs["layer_idx"]):
                raise error
            return result

        return call

    for name, position in methods.items():
        setattr(cache, name, failing(name, position))
    try:
        yield
    finally:
        for name in methods:
            delattr(cache, name)


MOMENTS: dict[str, Callable[[Any, TieredCache, int, BaseException], Any]] = {
    "before": lambda model, _cache, layer, error: hooked(
        mixer(model, layer).register_forward_pre_hook, error
    ),
    "inside": lambda _model, cache, layer, error: failing_method(cache, layer, error),
    "after": lambda model, _cache, layer, error: hooked(
        mixer(model, layer).register_forward_hook, error
    ),
    "head": lambda model, _cache, _layer, error: hooked(
        model.get_output_embeddings().register_forward_hook, error
    ),
    "end": lambda model, _cache, _layer, error: hooked(model.register_forward_hook, error),
}


# --- ways of going on ----------------------------------------------------------------------------


def again(model, cache, rest) -> list[torch.Tensor]:
    return [step(model, cache, ids) for ids in rest]


def in_a_copy(model, cache, rest) -> list[torch.Tensor]:
    """In a copy, and then in the cache itself."""
    with copy.deepcopy(cache) as fork:
        return again(model, fork, rest) + again(model, cache, rest)


def generated(model, cache, rest) -> list[torch.Tensor]:
    done = cache.get_seq_length()
    everything = torch.cat([torch.full((len(rest[0]), done), 5), *rest], 1)
    tokens = model.generate(
        everything,
        attention_mask=torch.ones_like(everything),
        past_key_values=cache,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [tokens.sequences, *tokens.logits]


def cropped(model, cache, rest) -> list[torch.Tensor]:
    """Some tokens back, where the layers can go back, then on."""
    if cache.get_seq_length() and cache.is_croppable:
        with contextlib.suppress(RuntimeError):  # a window that slid: as for the twin
            cache.crop(-2)
    return again(model, cache, rest)


def looked_at(model, cache, rest) -> list[torch.Tensor]:
    numbers = [i for i, one in enumerate(cache.layers) if hasattr(one, "get_seq_length")]
    lengths = [cache.get_seq_length(number) for number in numbers]
    seen = torch.tensor([cache.stats().num_tokens, *lengths])
    return [seen, *again(model, cache, rest)]


def failed_again(model, cache, rest) -> list[torch.Tensor]:
    with (
        hooked(model.get_output_embeddings().register_forward_hook, PlannedError()),
        pytest.raises(PlannedError),
    ):
        step(model, cache, rest[0])
    return again(model, cache, rest)


WAYS = {
    "again": again,
    "generate": generated,
    "deepcopy": in_a_copy,
    "crop": cropped,
    "look": looked_at,
    "fail again": failed_again,
}


# --- outcomes ------------------------------------------------------------------------------------


def cache_for(case: Case, model: torch.nn.Module, folder: Any) -> TieredCache:
    return TieredCache(
        model.config if case.has_config else None,
        device_bytes=(LAYERS + 4) * (case.batch + 1) * 4096,
        host_bytes=case.host_bytes,
        disk_bytes="8MiB",
        disk_dir=folder,
        block_tokens=4,
    )


def outcome(case: Case, folder: Any) -> str:
    """'ok', or what is wrong."""
    model = families.tiny_model(case.family).to(case.dtype)
    all_ids = ids_of(case)
    with cache_for(case, model, folder) as cache, cache_for(case, model, folder) as twin:
        for ids in all_ids[: case.step]:
            step(model, cache, ids)
            step(model, twin, ids)
        error = case.error()
        try:
            with MOMENTS[case.moment](model, cache, case.layer, error):
                step(model, cache, all_ids[case.step])
        except case.error:
            pass
        else:
            return "nothing failed"
        rest = all_ids[case.step :]
        expected = WAYS[case.way](model, twin, rest)
        try:
            got = WAYS[case.way](model, cache, rest)
        except Exception as error:  # as a caller would meet it
            return f"{type(error).__name__}: {error}"
        check_integrity(cache)
        for mine, theirs in zip(got, expected, strict=True):
            if not torch.equal(mine, theirs):
                return "WRONG"
    return "ok"


def count_outcomes(cases: list[Case], folder: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    examples: dict[str, Case] = {}
    for case in cases:
        result = outcome(case, folder)
        counts[result] = counts.get(result, 0) + 1
        examples.setdefault(result, case)
    print(f"{len(cases)} failed forwards: {counts}")
    for result, case in examples.items():
        if result != "ok":
            print(f"{result}, for example: {case}")
    return counts


def assert_all_right(cases: list[Case], folder: Any) -> None:
    """A few cases cannot fail: a layer that does not call the method which was to fail."""
    counts = count_outcomes(cases, folder)
    assert counts.keys() <= {"ok", "nothing failed"}
    assert counts["ok"] > 0.9 * len(cases)


def every_case(**more: Any) -> list[Case]:
    kinds = itertools.product(FAMILIES, STAGES, range(LAYERS), ("before", "inside", "after"))
    cases = [(family, stage, layer, moment) for family, stage, layer, moment in kinds]
    ends = itertools.product(FAMILIES, STAGES, (LAYERS - 1,), ("head", "end"))
    errors = (PlannedError, KeyboardInterrupt)
    return [
        Case(*kind, error, way, **more)
        for kind, error, way in itertools.product([*cases, *ends], errors, WAYS)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_a_forward_fails_going_on_is_right(tmp_path, family):
    """A part of all cases: each kind of failure with one error and one way of going on."""
    cases = [case for case in every_case() if case.family == family][::7]
    assert_all_right(cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"batch": 3},
        {"has_config": False},
        {"host_bytes": 6 * 4096},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_wherever_a_forward_fails_going_on_is_right_all_of_it(tmp_path, more):
    assert_all_right(every_case(**more), tmp_path)


def test_without_the_watch_the_same_cases_go_wrong(tmp_path, monkeypatch):
    """The oracle would notice: a cache that keeps what a failed forward brought is WRONG."""
    end = forwards.Forward.end
    monkeypatch.setattr(forwards.Forward, "end", lambda self, _: end(self, True))
    cases = [
        Case(family, stage, layer, "after", PlannedError, "again")
        for family, stage, layer in itertools.product(FAMILIES, STAGES, range(LAYERS))
    ]
    counts = count_outcomes(cases, tmp_path)
    assert counts.get("ok", 0) < len(cases) // 2 < counts["WRONG"]


def test_a_load_that_fails_once_in_attention_is_as_if_it_had_not_been_tried(tmp_path, monkeypatch):
    """Each read of a decode step in turn: the step fails, or its load is tried again; going on,
    or in a copy, gives the bits of a cache whose disk is sound."""

    class FaultyDisk(DiskTier):
        def __init__(self, *args: Any, **knobs: Any) -> None:
            super().__init__(*args, open_file=FaultyFile, **knobs)

    monkeypatch.setattr(assembly, "DiskTier", FaultyDisk)
    case = Case("Llama", "token", 0, "inside", TierIOError, "again")
    model, all_ids = families.tiny_model("Llama"), ids_of(case)
    counts = {"failed": 0, "tried again": 0}
    for number in range(60):
        with cache_for(case, model, tmp_path) as cache, cache_for(case, model, tmp_path) as twin:
            for ids in all_ids[: case.step]:
                step(model, cache, ids)
                step(model, twin, ids)
            (manager,) = cache._owned.pool.managers
            file = manager.tiers[-1]._file
            first = file.num_calls["read"] + number
            for call in range(first, first + 8):  # a load ahead is tried again before it fails
                file.plan["read", call] = fails_with(errno.EIO)
            rest = all_ids[case.step :]
            try:
                got = again(model, cache, rest)
                counts["tried again"] += 1
            except TierIOError:
                counts["failed"] += 1
                file.plan.clear()
                assert cache.get_seq_length() == cache.layers[-1].get_seq_length()
                done = cache.get_seq_length() - sum(STEPS[: case.step])
                got = in_a_copy(model, cache, rest[done:])[: len(rest) - done]
                got = again(model, twin, rest[:done]) + got
                twin.crop(-done)
            expected = again(model, twin, rest)
            assert all(map(torch.equal, got, expected))
            check_integrity(cache)
    assert counts["failed"] > 5


def test_a_draft_that_leaves_the_model_early_is_no_failure(tmp_path):
    model = families.tiny_model("Llama")
    ids = ids_of(Case("Llama", "prompt", 0, "end", PlannedError, "again"))[0]
    how = {"max_new_tokens": 12, "do_sample": False, "assistant_early_exit": 1}
    how["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **how)
    case = Case("Llama", "prompt", 0, "end", PlannedError, "again")
    with cache_for(case, model, tmp_path) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **how), expected)
        check_integrity(cache)


@torch.no_grad()
def test_a_model_of_which_only_a_part_runs_is_no_failure(tmp_path):
    """What ended well stays, whichever layers it went through."""
    model = copy.deepcopy(families.tiny_model("Llama"))
    case = Case("Llama", "prompt", 0, "end", PlannedError, "again")
    ids, dynamic = ids_of(case), DynamicCache(config=model.config)
    with cache_for(case, model, tmp_path) as cache:
        for number, num_layers in enumerate((3, 2, 1)):
            model.config.num_hidden_layers = num_layers
            got = model(ids[number], past_key_values=cache).logits
            assert (got - model(ids[number], past_key_values=dynamic).logits).abs().max() < 2e-4
        lengths = [layer.get_seq_length() for layer in dynamic.layers]
        assert [layer.get_seq_length() for layer in cache.layers] == lengths
        assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize("cross_is_tiered", [False, True])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("number", [0, 2])
@torch.no_grad()
def test_both_caches_of_an_encoder_decoder_model_go_back(tmp_path, cross_is_tiered, layer, number):
    model = families.tiny_model("BART")
    case = Case("BART", "prompt", layer, "after", PlannedError, "again")
    ids = ids_of(case)
    encoded = model.get_encoder()(ids[0])

    def pair() -> EncoderDecoderCache:
        cross = cache_for(case, model, tmp_path) if cross_is_tiered else DynamicCache()
        return EncoderDecoderCache(cache_for(case, model, tmp_path), cross)

    def decode(past: EncoderDecoderCache, step_ids: torch.Tensor) -> torch.Tensor:
        how = {"decoder_input_ids": step_ids, "past_key_values": past}
        return model(encoder_outputs=encoded, **how).logits

    past, twin = pair(), pair()
    decoder_layer = model.model.decoder.layers[layer]
    for step_number, step_ids in enumerate(ids):
        if step_number == number:
            with (
                hooked(decoder_layer.register_forward_hook, PlannedError()),
                pytest.raises(PlannedError),
            ):
                decode(past, step_ids)
        assert torch.equal(decode(past, step_ids), decode(twin, step_ids))
    for one in (past, twin):
        for cache in (one.self_attention_cache, one.cross_attention_cache):
            if isinstance(cache, TieredCache):
                check_integrity(cache)
                cache.close()


@torch.no_grad()
def test_two_caches_that_take_part_in_one_forward_both_go_back(tmp_path):
    """As where a model calls another one: the outermost call decides for both."""

    class Pair(LlamaForCausalLM):
        def forward(self, ids, past, fails=False):
            logits = [self.inner(ids, past_key_values=one).logits for one in past]
            if fails:
                raise PlannedError
            return logits

    inner = families.tiny_model("Llama")
    model = Pair(LlamaConfig(**families.SIZES))
    model.inner = inner
    case = Case("Llama", "prompt", 0, "end", PlannedError, "again")
    ids = ids_of(case)
    past = [cache_for(case, inner, tmp_path) for _ in range(2)]
    twin = [cache_for(case, inner, tmp_path) for _ in range(2)]
    for step_ids in ids:
        with pytest.raises(PlannedError):
            model(step_ids, past, fails=True)
        assert all(map(torch.equal, model(step_ids, past), model(step_ids, twin)))
    for one in (*past, *twin):
        check_integrity(one)
        one.close()


def test_disabled_the_models_call_is_torchs_own_again():
    enable()
    assert "__call__" in vars(PreTrainedModel)
    disable()
    assert "__call__" not in vars(PreTrainedModel)
    enable()
