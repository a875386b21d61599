"""How sides are timed here: in turn, in one process; and what `generate` takes with a cache.

Absolute speeds of a shared machine move within minutes, so a claim is a ratio of two sides that
were timed alternately.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Samples:
    """Seconds of one side, a number per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def paired(*sides: Callable[[], float], rounds: int = 9, warmup: int = 2) -> tuple[Samples, ...]:
    """Time the sides in turn, A B A B ..., after `warmup` rounds that do not count.

    A side does its work and returns the seconds it took (what it leaves out is its own set-up).
    """
    for _ in range(warmup):
        for side in sides:
            side()
    times = [[side() for side in sides] for _ in range(rounds)]
    return tuple(Samples(tuple(column)) for column in zip(*times, strict=True))


def fill(caches: Iterable[Cache], model: PreTrainedModel, context: int) -> None:
    """Write the same random keys and values of `context` tokens into every layer of each cache."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (2, 1, config.num_key_value_heads, context, head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(shape, dtype=model.dtype, device=model.device).unbind(0)
        for cache in caches:
            cache.update(keys, values, layer)


def decode(
    model: PreTrainedModel, cache: Cache, prompt: torch.Tensor, new_tokens: int
) -> tuple[list[int], float]:
    """`new_tokens` greedy tokens behind the cached context, which is left as it was, and the
    seconds they took. The cache holds all of `prompt` [1, tokens] but its last token."""
    start = perf_counter()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    seconds = perf_counter() - start
    cache.crop(-new_tokens)
    return tokens[0, prompt.shape[1] :].tolist(), seconds
