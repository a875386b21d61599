"""What a mask says in fewer words: left padding as positions, causality as nothing at all.

The kernels take the first attended position of each row, and know causality by themselves; a mask
of bytes costs them a read for each pair of query and token.
"""

import threading
import weakref
from collections.abc import Callable

import torch

from hf_tiered_cache.kernels import masks

Answer = tuple[torch.Tensor | None, torch.Tensor | None]


def padding(mask: torch.Tensor) -> Answer:
    """A padding mask `[batch, kv_tokens]` as (starts, mask): left padding as the first attended
    position of each row, anything else as a boolean mask `[batch, 1, 1, kv_tokens]`."""
    return _once(_padding, mask)


def boolean(mask: torch.Tensor, batch: int, query_start: int, kv_tokens: int) -> Answer:
    """A boolean mask `[batch, heads, queries, kv_tokens]` as (starts, None) where causality and
    left padding say the same, else (None, mask)."""
    return _once(_boolean, mask, batch, query_start, kv_tokens)


def _padding(mask: torch.Tensor) -> Answer:
    mask = mask.bool()
    starts = mask.int().argmax(dim=1)
    if bool((mask.sum(dim=1) == mask.shape[1] - starts).all()):
        return (starts.int(), None) if bool(starts.any()) else (None, None)
    return None, mask[:, None, None, :]


def _boolean(mask: torch.Tensor, batch: int, query_start: int, kv_tokens: int) -> Answer:
    starts = masks.causal_starts(mask, query_start, kv_tokens)
    if starts is None:
        return None, mask
    return (starts.expand(batch).contiguous(), None) if bool(starts.any()) else (None, None)


class _SeenMask(threading.local):
    """The mask that this thread read last, and what was found."""

    mask: weakref.ref[torch.Tensor] | None = None
    facts: tuple[int, ...] = ()
    answer: Answer = (None, None)


_seen = _SeenMask()


def _once(read: Callable[..., Answer], mask: torch.Tensor, *arguments: int) -> Answer:
    """`read(mask, *arguments)`, kept for the next layer: all of a forward bring the same mask, and
    to look into one waits for the device."""
    if mask.is_inference():  # these do not count their changes
        return read(mask, *arguments)
    facts = (mask._version, *arguments)
    if _seen.mask is None or _seen.mask() is not mask or _seen.facts != facts:
        _seen.answer = read(mask, *arguments)
        _seen.mask, _seen.facts = weakref.ref(mask), facts
    return _seen.answer
