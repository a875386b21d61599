"""A progress bar over the prompt's tokens, then over the new ones, of a plain `generate`.

`generate` has no hook for either, but every forward of the model does: the bars count the tokens
that pass through it. They obey transformers' own switch for progress bars.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.observe.metrics import CacheStats
from hf_tiered_cache.sizes import format_bytes

POSTFIX_SECONDS = 0.5  # between two looks at the cache


@dataclass
class Timing:
    """What the bars saw; seconds. Prefill ends when the last prompt token has been computed."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, the first one (which the prefill gives) left out."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def progress_bar(total: int, label: str, unit: str = "token", delay_seconds: float = 0.0) -> tqdm:
    """A bar that goes when it is done; not shown where transformers' bars are switched off, nor
    before `delay_seconds`."""
    is_off = not logging.is_progress_bar_enabled()
    return tqdm(
        total=total, desc=label, unit=unit, disable=is_off, leave=False, delay=delay_seconds
    )


def _postfix(stats: CacheStats) -> str:
    """What a cache says of itself behind a bar: "hit 25%, device 12.0 MiB, disk 36.0 MiB"."""
    tiers = [f"{tier.name} {format_bytes(tier.used_bytes)}" for tier in stats.tiers]
    return ", ".join([f"hit {stats.hit_share:.0%}", *tiers])


@contextmanager
def generation_progress(
    model: torch.nn.Module, prompt_tokens: int, new_tokens: int, label: str = ""
) -> Iterator[Timing]:
    """Show bars for one `model.generate(...)` inside, and time it; yields the `Timing`.

    prompt_tokens: tokens the prefill still has to compute; new_tokens: the most that will follow.
    Where the model is given a TieredCache, they show behind the rate which share of the attended
    blocks was resident, and the bytes of each tier. They obey transformers' switch
    (`transformers.utils.logging.disable_progress_bar`).
    """
    timing = Timing()
    bar = progress_bar(prompt_tokens, label + "prefill")
    start, told = perf_counter(), 0.0

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal bar, start, told
        inputs = kwargs.get("input_ids", args[0] if args else None)
        tokens = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[1]
        seconds, start = perf_counter() - start, perf_counter()
        cache = kwargs.get("past_key_values")
        if isinstance(cache, TieredCache) and start - told >= POSTFIX_SECONDS and not bar.disable:
            bar.set_postfix_str(_postfix(cache.stats()), refresh=False)
            told = start
        bar.update(tokens)
        if timing.prefill_tokens < prompt_tokens:
            timing.prefill_tokens += tokens
            timing.prefill_seconds += seconds
            if timing.prefill_tokens >= prompt_tokens:
                bar.close()
                bar = progress_bar(max(0, new_tokens - 1), label + "decode")
        else:
            timing.decode_tokens += tokens
            timing.decode_seconds += seconds

    hook = model.register_forward_hook(count, with_kwargs=True)
    try:
        yield timing
    finally:
        hook.remove()
        bar.close()
