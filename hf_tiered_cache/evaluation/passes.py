"""The passes of a window of text: what is compared with what.

The reference is `DynamicCache` with the model's own attention. The noise is `DynamicCache` with
another of transformers' own implementations: as far as those two are from one another, right
computations in that dtype are on that text. Then a `TieredCache` for each share of its blocks off
the device. Every pass has the machine to itself: its times are those of a user.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_tiered_cache.evaluation.scoring import (
    NOISE,
    REFERENCE,
    TIERED,
    BlockShape,
    Pass,
    Plan,
    Reference,
    Window,
    run_window,
    uncounted,
)
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.observe.metrics import CacheStats

EAGER_SCORES = 1 << 26  # heads x queries x keys at once in a pass with eager attention


def score_window(
    model: PreTrainedModel,
    window: Window,
    plan: Plan,
    shape: BlockShape,
    shares: list[float],
    attention: str | None = None,
    disk_dir: str | None = None,
    on_tokens: Callable[[int], None] = uncounted,
) -> list[Pass]:
    """The passes of one window: the reference, the noise, then a `TieredCache` per share.

    attention: transformers' name of the attention that the tiered passes use; None for the
    model's own.
    """
    most_tokens = window.context + plan.new_tokens
    reference = Reference(most_tokens, disk_dir)
    own = model.config._attn_implementation
    passes = [
        _dense_pass(model, window, plan, reference, Pass(REFERENCE, None, own), on_tokens),
    ]
    other = noise_attention(model)
    if other is not None:
        with attention_of(model, other):
            eager = replace(plan, chunk=_eager_chunk(model, window.context, plan.chunk))
            found = Pass(NOISE, None, other)
            passes.append(_dense_pass(model, window, eager, reference, found, on_tokens))
    with attention_of(model, attention or own):
        for share in shares:
            found = Pass(TIERED, share, attention or own)
            budgets = shape.budgets(most_tokens, share)
            with TieredCache(config=model.config, disk_dir=disk_dir, **budgets) as cache:
                run_window(model, cache, window, plan, reference, found, on_tokens)
                read_stats(found, cache.stats())
            passes.append(found)
    return passes


def _dense_pass(
    model: PreTrainedModel,
    window: Window,
    plan: Plan,
    reference: Reference,
    found: Pass,
    on_tokens: Callable[[int], None],
) -> Pass:
    cache = DynamicCache(config=model.config)
    run_window(model, cache, window, plan, reference, found, on_tokens)
    found.peak_bytes = {"memory": dense_bytes(cache)}
    return found


def noise_attention(model: PreTrainedModel) -> str | None:
    """Another of transformers' own implementations of attention that the model takes; None where it
    computes attention by itself."""
    own = model.config._attn_implementation
    for name in ("eager", "sdpa"):
        if name != own:
            with suppress(ValueError, ImportError), attention_of(model, name):
                if model.config._attn_implementation == name:
                    return name
    return None


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model compute attention so inside the `with`."""
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _eager_chunk(model: PreTrainedModel, context: int, chunk: int) -> int:
    """Prompt tokens per forward whose whole matrix of scores fits in memory."""
    heads = model.config.get_text_config().num_attention_heads
    return max(2, min(chunk, EAGER_SCORES // (heads * context)))


def dense_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a `DynamicCache` holds."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))


def read_stats(found: Pass, stats: CacheStats) -> None:
    """Fill in what the cache says of itself."""
    blocks = stats.num_layers * math.ceil(stats.num_tokens / stats.block_tokens) * stats.batch
    found.off_device = stats.cold_blocks / blocks
    found.block_tokens = stats.block_tokens
    found.peak_bytes = {tier.name: tier.peak_bytes for tier in stats.tiers}


def num_passes(model: PreTrainedModel, shares: list[float]) -> int:
    """Passes of every window."""
    return 1 + (noise_attention(model) is not None) + len(shares)
