"""A user's model and tokenizer, ready to be measured; what cannot be loaded is said in one line."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from hf_tiered_cache.devices import Device
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.evaluation.names import (
    AUTO,
    DTYPES,
    ModelError,
    check_device,
    check_dtype,
    check_model,
    not_loaded,
)
from hf_tiered_cache.integration import attention
from hf_tiered_cache.planner.rates import matmul_slowdown

# Times float32's from which on half precision is no user's choice but this machine's lack.
SLOW_MATMUL = 3
NOT_LOADED = (OSError, ValueError, ImportError, SafetensorError)


def load_model(name: str, dtype: str = AUTO, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A causal model in evaluation mode.

    name: hub id or folder. dtype: "auto" for the checkpoint's own, or one of DTYPES. Raises
    ModelError.
    """
    check_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except NOT_LOADED as error:
        raise not_loaded(name, error) from None
    return model.eval().to(device)


def load_outline(name: str, dtype: str = AUTO) -> PreTrainedModel:
    """A causal model without its weights, on the meta device, from its config alone: whether it can
    be measured is seen before anything is loaded. Raises ModelError."""
    check_dtype(dtype)
    check_model(name)
    try:
        config = AutoConfig.from_pretrained(name)
        if dtype != AUTO:
            config.dtype = dtype
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except NOT_LOADED as error:
        raise not_loaded(name, error) from None
    own = str(model.dtype).removeprefix("torch.")
    if own not in DTYPES:
        raise ModelError(f"{name} is in {own}: give --dtype, one of {', '.join(DTYPES)}")
    return model


def choose_dtype(outline: PreTrainedModel, dtype: str, device: torch.device) -> tuple[str, str]:
    """What to load a model in, and why if it is not the checkpoint's own: for "auto", float32
    on a CPU whose matmuls are slow in the checkpoint's own dtype."""
    own = outline.dtype
    if dtype != AUTO or device.type != "cpu" or own == torch.float32:
        return dtype, ""
    slowdown = matmul_slowdown(own)
    if slowdown < SLOW_MATMUL:
        return dtype, ""
    name = str(own).removeprefix("torch.")
    return "float32", (
        f"in float32: {name}, which the weights are in, takes torch {slowdown:.0f}x as long on "
        f"this processor (--dtype {name} measures it all the same)"
    )


def check_fits(
    outline: PreTrainedModel, context: int, new_tokens: int, attention: str | None = None
) -> None:
    """Raise ModelError, before any weights are loaded, for a model of which the cache keeps nothing
    in blocks, that was not made for so many tokens, or that does not take that attention."""
    check_has_full_attention(outline)
    check_positions(outline, context, new_tokens)
    if attention is not None:
        check_attention(outline, attention)


def check_positions(model: PreTrainedModel, context: int, new_tokens: int) -> None:
    """Raise ModelError unless the model was made for a context and the tokens decoded behind it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and context + new_tokens > limit:
        raise ModelError(
            f"--context {context} and --new-tokens {new_tokens}: the model was made for {limit:,} "
            f"positions; expected a context of {max(0, limit - new_tokens)} at most"
        )


def check_attention(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError unless the model takes that implementation of attention, which it has
    afterwards."""
    attention.enable()
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, OSError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ModelError(f"--attention {name}: {reason}; expected e.g. tiered, sdpa") from None
    if model.config._attn_implementation != name:
        raise ModelError(
            f"--attention {name}: {type(model).__name__} computes attention by itself, so none can "
            "be set; leave the option out"
        )


def check_has_full_attention(model: PreTrainedModel) -> None:
    """Raise ModelError for a model of which no layer is kept in blocks."""
    in_blocks = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
    if not any(kind in in_blocks for kind in _kinds(model)):
        raise ModelError(
            f"{type(model).__name__} keeps no layer in blocks (they are for full attention), so "
            "there is nothing to measure; expected a model with full-attention layers"
        )


def check_has_only_full_attention(model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose caches cannot be compared layer by layer."""
    if any(one is not DynamicLayer for one in _kinds(model)):
        raise ModelError(
            "this model has layers other than full attention, whose caches are not compared; "
            "expected a model of full attention only"
        )


def _kinds(model: PreTrainedModel) -> list[type]:
    """What transformers keeps each layer of the model in."""
    return [type(layer) for layer in DynamicCache(config=model.config).layers]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or folder. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except NOT_LOADED as error:
        raise not_loaded(name, error) from None


def choose_device(name: str = AUTO) -> torch.device:
    """A device of that name; "auto" is a GPU that torch can use, else the CPU. Raises
    ModelError."""
    check_device(name)
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        Device.kind_of(device)
        torch.empty(1, device=device)
    except (UnsupportedInputError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {name}: {reason}; expected auto, cpu or cuda") from None
    return device
