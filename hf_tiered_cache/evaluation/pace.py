"""How long a run will take on this machine, measured on a few tokens before it begins.

An estimate for somebody who waits, not a figure: right within a factor of two or so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import DynamicCache, PreTrainedModel

PROBE_TOKENS = 64
QUICK_SECONDS = 25.0  # of a run whose command, with what it loads, shall end within a minute
QUICK_CONTEXTS = (2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class Pace:
    """Seconds of a token through a model without a past, and the share of that which each token
    of the past adds."""

    prefill: float
    decode: float
    growth: float

    def seconds(self, context: int, new_tokens: int = 0) -> float:
        """Of prefilling `context` tokens and decoding `new_tokens` behind them."""
        prefill = context * self.prefill * (1 + self.growth * context / 2)
        return prefill + new_tokens * self.decode * (1 + self.growth * context)


@torch.no_grad()
def measure_pace(model: PreTrainedModel) -> Pace:
    """Put a few tokens through the model, all at once and one by one."""
    ids = torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=model.device)

    def seconds(tokens: torch.Tensor) -> float:
        start = perf_counter()
        model(tokens, past_key_values=DynamicCache(config=model.config)).logits.sum().item()
        return perf_counter() - start

    for tokens in (ids, ids[:, :1]):  # the first forward of either kind is slower
        seconds(tokens)
    return Pace(seconds(ids) / PROBE_TOKENS, seconds(ids[:, :1]), _growth(model))


def _growth(model: PreTrainedModel) -> float:
    """Multiplications of attending one token over those of the weights."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = DynamicCache(config=model.config).layers
    attended = sum(not getattr(layer, "is_sliding", False) for layer in kinds)
    return 2 * attended * heads * head_dim / sum(p.numel() for p in model.parameters())


def quick_context(seconds_of: Callable[[int], float], most: int) -> int:
    """The longest context of QUICK_CONTEXTS up to `most` whose run ends in QUICK_SECONDS, else the
    shortest."""
    fitting = [one for one in QUICK_CONTEXTS if one <= most] or [most]
    return next((one for one in fitting if seconds_of(one) <= QUICK_SECONDS), fitting[-1])


def format_seconds(seconds: float) -> str:
    """As a clock would be read: "40 s", "7 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
