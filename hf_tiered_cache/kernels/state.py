"""What attention over some blocks leaves behind: finished, or still running.

Both are the pair (weighted sum of values, log-sum-exp of scores) in two normalisations. The
finished pair is FlashInfer's attention state (arXiv 2501.01005, section 3.1); the running one is
the online softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867) as FlashAttention-2 carries it
(arXiv 2307.08691): unnormalised, so that one more block costs one multiply-add per value.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """Attention over some positions. The log-sum-exp is natural; with nothing attended it is
    -inf and `out` is 0."""

    out: Tensor  # [batch, heads, queries, value_dim]
    lse: Tensor  # [batch, heads, queries] float32


@dataclass(slots=True)
class RunningState:
    """Attention over the blocks seen so far, before the division by the sum.

    float32, contiguous (float64 when the query is float64; only the reference backend computes
    that). Nothing attended yet: `acc` 0, `max` -inf, `sum` 0.
    """

    acc: Tensor  # [batch, heads, queries, value_dim]: sum of exp(score - max) * value
    max: Tensor  # [batch, heads, queries]: largest score
    sum: Tensor  # [batch, heads, queries]: sum of exp(score - max)

    @classmethod
    def begin(cls, query: Tensor, value_dim: int) -> "RunningState":
        """The state before any block, for `query` [batch, heads, queries, key_dim]."""
        rows = query.shape[:3]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return cls(
            acc=torch.zeros((*rows, value_dim), dtype=dtype, device=query.device),
            max=torch.full(rows, -torch.inf, dtype=dtype, device=query.device),
            sum=torch.zeros(rows, dtype=dtype, device=query.device),
        )


def weight(score: Tensor, maximum: Tensor) -> Tensor:
    """exp(score - maximum), 0 where the score is -inf (also when the maximum is)."""
    return torch.where(score == -torch.inf, 0.0, (score - maximum).exp())
