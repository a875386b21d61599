"""Every call that transformers makes of attention, over blocks, against the textbook in float64."""

import os
import subprocess
import sys

import pytest
import torch
from support import new_tokens
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_tiered_cache
from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.integration import attention, masks

HEADS, KV_HEADS, DIM = 4, 2, 8
TOKENS = 37
NAMES = ["sdpa", "tiered"]
BUDGETS = {"resident": 64, "cold": 8}


class Module(torch.nn.Module):
    """What an attention function reads of the model's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.layer_idx = 0
        self.num_key_value_groups = HEADS // KV_HEADS
        self.is_causal = True
        self.eval()


def textbook(query, keys, values, allowed, *, bias=None, softcap=None, sinks=None):
    """(out [batch, queries, heads, dim]) by the definition, in float64."""
    keys, values = (t.double().repeat_interleave(HEADS // KV_HEADS, 1) for t in (keys, values))
    scores = query.double() @ keys.mT * DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        sink = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ values).transpose(1, 2)


def causal(queries: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)


class Case:
    """A layer of 37 tokens in blocks of 4, its dense twin, and queries at its end."""

    def __init__(self, make_cache, budget: str, queries: int, batch: int = 2) -> None:
        torch.manual_seed(queries)
        self.cache = make_cache(device_blocks=BUDGETS[budget] * batch)
        self.keys = torch.randn(batch, KV_HEADS, TOKENS, DIM)
        self.values = torch.randn(batch, KV_HEADS, TOKENS, DIM)
        past = TOKENS - queries
        if past:
            self.cache.update(self.keys[:, :, :past], self.values[:, :, :past], 0)
        self.handles = self.cache.update(self.keys[:, :, past:], self.values[:, :, past:], 0)
        self.query = torch.randn(batch, HEADS, queries, DIM)
        self.batch, self.queries, self.budget = batch, queries, budget

    def call(self, name: str, mask=None, **kwargs) -> torch.Tensor:
        out, weights = ALL_ATTENTION_FUNCTIONS[name](
            Module(), self.query, *self.handles, mask, scaling=DIM**-0.5, **kwargs
        )
        if kwargs.get("output_attentions"):
            assert weights.shape == (self.batch, HEADS, self.queries, TOKENS)
        else:
            assert weights is None
        assert out.shape == (self.batch, self.queries, HEADS, DIM)
        return out

    def check(self, name: str, allowed, mask=None, streams: bool = True, known=None, **kwargs):
        """The call gives the textbook's answer, by streaming the blocks or (told) densely."""
        before = self.cache.stats().counters
        out = self.call(name, mask, **kwargs)
        expected = textbook(self.query, self.keys, self.values, allowed, **(known or {}))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
        after = self.cache.stats().counters
        reads = sum(
            getattr(after, field) - getattr(before, field)
            for field in ("cold_reads", "resident_reads")
        )
        blocks = self.batch * -(-TOKENS // 4)
        assert reads == (blocks if streams else 2 * blocks), "dense means keys and values apart"
        assert (after.cold_reads > 0) == (self.budget == "cold")


@pytest.fixture(params=BUDGETS)
def budget(request):
    return request.param


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("queries", [1, 5, TOKENS])
def test_no_mask_means_causal_by_position(make_cache, name, budget, queries):
    case = Case(make_cache, budget, queries)
    case.check(name, causal(queries))
    case.check(name, causal(queries), sliding_window=None, is_causal=None)


def test_an_explicit_is_causal_false_attends_everything(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    case.check(name, torch.ones(5, TOKENS, dtype=torch.bool), is_causal=False)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("side", ["left", "right", "holes", "none"])
def test_two_dimensional_padding_masks(make_cache, name, budget, queries, side):
    case = Case(make_cache, budget, queries)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    if side == "left":
        mask[1, :13] = 0
    elif side == "right":
        mask[1, -3:] = 0
    elif side == "holes":
        mask[0, 4:9] = 0
    allowed = causal(queries) & mask.bool()[:, None, None, :]
    case.check(name, allowed, mask)
    case.check(name, allowed, mask.bool())


def test_a_mask_is_looked_into_once_and_again_when_it_changed():
    looks = []

    def read(mask, *arguments):
        looks.append(arguments)
        return masks._padding(mask)

    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for _ in range(3):
        starts, _ = masks._once(read, mask, 5)
        assert starts.tolist() == [1, 0]
    assert looks == [(5,)]
    mask[0, 0] = 1
    assert masks._once(read, mask, 5) == (None, None)
    mask[0, 2] = 0
    holes = [[[[True, True, False]]], [[[True] * 3]]]
    assert masks._once(read, mask, 5)[1].tolist() == holes
    assert masks._once(read, mask, 6)[1].tolist() == holes
    assert len(looks) == 4
    other = mask.clone()
    other[0] = torch.tensor([0, 0, 1])
    assert masks._once(read, other, 6)[0].tolist() == [2, 0]
    with torch.inference_mode():
        assert masks._once(read, torch.tensor([[0, 1]]), 6)[0].tolist() == [1]


def test_a_dense_causal_mask_needs_no_reading_by_the_kernels(make_cache, monkeypatch):
    """Behind a past sdpa gets causality spelled out; other masks stay what they are."""
    given = []
    attend = attention._stream_attention

    def noted(snapshot, query, call):
        given.append((call.causal, call.starts, call.mask))
        return attend(snapshot, query, call)

    monkeypatch.setattr(attention, "_stream_attention", noted)
    case = Case(make_cache, "cold", 5)
    allowed = causal(5).expand(2, 1, 5, TOKENS).clone()
    case.check("sdpa", allowed, allowed)
    allowed = allowed.clone()
    allowed[1, ..., :3] = False
    case.check("sdpa", allowed, allowed)
    allowed = allowed.clone()
    allowed[0, 0, 2, 7] = False
    case.check("sdpa", allowed, allowed)
    (causal_1, starts_1, mask_1), (causal_2, starts_2, mask_2), (causal_3, _, mask_3) = given
    assert (causal_1, starts_1, mask_1) == (True, None, None)
    assert (causal_2, starts_2.tolist(), mask_2) == (True, [0, 3], None)
    assert (causal_3, mask_3 is allowed) == (False, True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_row_of_nothing_but_padding_gives_zeros_and_disturbs_no_other(make_cache, name, budget):
    case = Case(make_cache, budget, 3)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0] = False
    case.check(name, causal(3) & mask[:, None, None, :], mask)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("queries", [1, 6])
def test_four_dimensional_boolean_masks(make_cache, name, budget, queries, heads):
    case = Case(make_cache, budget, queries)
    mask = torch.rand(2, heads, queries, TOKENS) < 0.3
    mask[..., 0] = True
    case.check(name, mask, mask)
    longer = torch.nn.functional.pad(mask, (0, 5), value=True)
    case.check(name, mask, longer)


@pytest.mark.parametrize("queries", [1, 6])
def test_four_dimensional_additive_masks(make_cache, name, budget, queries):
    case = Case(make_cache, budget, queries)
    bias = torch.randn(2, 1, queries, TOKENS).masked_fill(~causal(queries), -torch.inf)
    case.check(name, causal(queries), bias, known={"bias": bias})


def test_the_lowest_number_masks_as_minus_infinity_does(make_cache, name, budget):
    """Eager models mask with the dtype's minimum."""
    case = Case(make_cache, budget, 6)
    bias = torch.zeros(1, 1, 6, TOKENS).masked_fill(~causal(6), torch.finfo(torch.float32).min)
    case.check(name, causal(6), bias)


def test_soft_capped_scores(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    case.query *= 20
    case.check(name, causal(5), softcap=3.0, known={"softcap": 3.0})


def test_attention_sinks(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    sinks = torch.tensor([0.5, -1.0, 3.0, 8.0])
    case.check(name, causal(5), s_aux=sinks, known={"sinks": sinks})


def test_a_position_bias_is_added_to_the_scores(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    bias = torch.randn(1, HEADS, 5, TOKENS)
    case.check(name, causal(5), position_bias=bias, known={"bias": bias})
    mask = torch.zeros(1, 1, 5, TOKENS).masked_fill(~causal(5), -torch.inf)
    case.check(name, causal(5), mask, position_bias=bias, known={"bias": bias})
    case.check(name, causal(5), causal(5)[None, None], position_bias=bias, known={"bias": bias})


def test_a_window_that_the_mask_spells_out_is_streamed(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    window = causal(5) & ~causal(5).roll(-8, 1).tril(TOKENS - 5 - 8)
    case.check(name, window, window[None, None].expand(2, 1, 5, TOKENS), sliding_window=8)
    case.check(name, causal(5), None, sliding_window=TOKENS)


def test_weights_asked_for_are_answered_densely(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    mask = causal(5)[None, None].expand(2, 1, 5, TOKENS)
    sinks = torch.tensor([0.5, -1.0, 3.0, 8.0])
    bias = torch.zeros(2, 1, 5, TOKENS).masked_fill(~causal(5), -torch.inf)
    for form in (mask, bias, None):
        case.check(name, causal(5), form, streams=False, output_attentions=True)
    asked = {"streams": False, "output_attentions": True}
    case.check(name, causal(5), s_aux=sinks, known={"sinks": sinks}, **asked)
    case.check(name, causal(5), softcap=2.0, known={"softcap": 2.0}, **asked)


def test_weights_are_those_of_the_whole_prompt(make_cache, name):
    case = Case(make_cache, "resident", TOKENS)
    _, weights = ALL_ATTENTION_FUNCTIONS[name](
        Module(), case.query, *case.handles, None, scaling=DIM**-0.5, output_attentions=True
    )
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    assert not weights.masked_select(~causal(TOKENS)).any()


def test_dropout_only_counts_when_training(make_cache, name, budget):
    case = Case(make_cache, budget, 1)
    case.check(name, causal(1), dropout=0.9)
    module = Module().train()
    out, _ = ALL_ATTENTION_FUNCTIONS[name](module, case.query, *case.handles, None, dropout=0.9)
    assert not torch.allclose(out, case.call(name), atol=1e-2)


def test_handles_of_two_layers_are_attended_densely(make_cache, name):
    case = Case(make_cache, "resident", 1)
    case.cache.update(case.keys, case.values * 2, 1)
    case.handles = case.handles[0], case.cache.layers[1].values
    out = case.call(name)
    expected = textbook(case.query, case.keys, case.values * 2, causal(1))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def test_bits_are_the_same_wherever_the_blocks_lie(make_cache, name):
    outs = [Case(make_cache, where, 7).call(name) for where in BUDGETS]
    assert torch.equal(*outs)


def test_a_handle_from_before_later_appends_is_attended_to_its_own_end(make_cache, name, budget):
    case = Case(make_cache, budget, 5)
    case.cache.update(*new_like(case, 30), 0)
    out = case.call(name)
    expected = textbook(case.query, case.keys, case.values, causal(5))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def new_like(case: Case, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, KV_HEADS, tokens, DIM) * 9, torch.randn(2, KV_HEADS, tokens, DIM) * 9


def test_a_block_that_cannot_be_loaded_stops_attention(make_cache, name, monkeypatch):
    case = Case(make_cache, "cold", 1)
    disk = case.cache._owned.pool.managers[0].tiers[1]

    def lost(*args):
        raise TierIOError(5, "the disk is gone")

    monkeypatch.setattr(disk, "read", lost)
    with pytest.raises(TierIOError, match="the disk is gone"):
        case.call(name)
    monkeypatch.undo()
    case.check(name, causal(1))


def test_plain_tensors_go_to_the_original_untouched(make_cache):
    make_cache()
    query = torch.randn(2, HEADS, 5, DIM)
    keys, values = torch.randn(2, 2, KV_HEADS, TOKENS, DIM).unbind()
    mask = causal(5)[None, None]
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert wrapped is not sdpa_attention_forward
    for arguments in ({"scaling": 0.3}, {"scaling": 0.3, "is_causal": False}):
        got, _ = wrapped(Module(), query, keys, values, mask, **arguments)
        expected, _ = sdpa_attention_forward(Module(), query, keys, values, mask, **arguments)
        assert torch.equal(got, expected)


def test_tiered_by_name_gives_plain_tensors_their_sinks_and_caps():
    """Stock sdpa would ignore the former and refuse the latter."""
    query = torch.randn(2, HEADS, 5, DIM) * 9
    keys, values = torch.randn(2, 2, KV_HEADS, TOKENS, DIM).unbind()
    sinks = torch.tensor([0.5, -1.0, 3.0, 8.0])
    out, _ = ALL_ATTENTION_FUNCTIONS["tiered"](
        Module(), query, keys, values, None, scaling=DIM**-0.5, s_aux=sinks, softcap=2.0
    )
    expected = textbook(query, keys, values, causal(5), sinks=sinks, softcap=2.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("is_padded", [False, True])
def test_tiered_by_name_takes_plain_tensors_with_an_implicit_mask(is_padded):
    """A windowed layer's dense keys reach the same function with the mask left implicit."""
    query = torch.randn(2, HEADS, 5, DIM)
    keys, values = torch.randn(2, 2, KV_HEADS, TOKENS, DIM).unbind()
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    padding[1, :20] = False
    mask = padding if is_padded else None
    out, _ = ALL_ATTENTION_FUNCTIONS["tiered"](
        Module(), query, keys, values, mask, scaling=DIM**-0.5
    )
    allowed = causal(5) & padding[:, None, None, :] if is_padded else causal(5)
    expected = textbook(query, keys, values, allowed)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def mask_of(**arguments) -> torch.Tensor | None:
    defaults = {"batch_size": 2, "q_length": 5, "kv_length": TOKENS, "q_offset": TOKENS - 5}
    return ALL_MASK_ATTENTION_FUNCTIONS["tiered"](
        **{**defaults, "mask_function": causal_mask_function, "device": "cpu", **arguments}
    )


def test_the_mask_of_tiered_is_as_small_as_the_question_allows():
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    assert mask_of() is None
    assert mask_of(attention_mask=padding) is None
    padding[1, :9] = False
    assert torch.equal(mask_of(attention_mask=padding), padding)
    for dense in ({"local_size": 8}, {"allow_is_causal_skip": False}):
        mask = mask_of(attention_mask=padding, **dense)
        assert mask.shape == (2, 1, 5, TOKENS)
        assert torch.equal(mask[:, 0], causal(5) & padding[:, None, :])


def registry() -> dict:
    names = (*attention.WRAPPED_NAMES, "tiered", "eager")
    return {name: ALL_ATTENTION_FUNCTIONS._global_mapping.get(name) for name in names}


def test_enable_and_disable_are_complete_and_may_be_repeated(make_cache):
    make_cache()
    enabled = registry()
    attention.enable()
    assert registry() == enabled
    try:
        attention.disable()
        disabled = registry()
        assert disabled["sdpa"] is sdpa_attention_forward
        wrapped = [name for name in enabled if enabled[name] is not disabled[name]]
        assert set(wrapped) == {n for n in attention.WRAPPED_NAMES if enabled[n] is not None}
        attention.disable()
        assert registry() == disabled
        case_without_us(make_cache)
    finally:
        attention.enable()
    assert registry()["sdpa"] is not sdpa_attention_forward


def case_without_us(make_cache) -> None:
    """A cache made before goes on when the functions are put back: densely."""
    keys, values = new_tokens(1, 9)
    cache = make_cache()
    attention.disable()
    handles = cache.update(keys, values, 0)
    query = torch.randn(1, 2, 1, 8)
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), query, handles[0], handles[0], None)
    dense, _ = sdpa_attention_forward(Module(), query, keys, keys, None)
    assert torch.equal(out, dense)


FRESH = """
import sys, torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
before = dict(functions._global_mapping)
import hf_tiered_cache
after = dict(functions._global_mapping)
assert after.pop("tiered") is hf_tiered_cache.tiered_attention_forward
assert after == before, "importing patches nothing"
cache = hf_tiered_cache.TieredCache(
    device_bytes=20480, disk_bytes="1MiB", disk_dir=sys.argv[1], block_tokens=4
)
assert functions["sdpa"] is not sdpa_attention_forward
hf_tiered_cache.disable()
assert functions["sdpa"] is sdpa_attention_forward
cache.update(torch.ones(1, 2, 90, 8), torch.ones(1, 2, 90, 8), 0)
assert cache.stats().counters.stores > 0
handle = cache.layers[0].keys  # alive when the interpreter ends, and the cache with it
"""


def test_importing_the_package_patches_nothing_and_exiting_leaves_nothing(tmp_path):
    root = os.path.dirname(os.path.dirname(hf_tiered_cache.__file__))
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
