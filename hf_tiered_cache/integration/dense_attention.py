"""Attention over dense tensors: what the blocks cannot answer.

Weights that a caller wants to see, dropout, windows without a mask: rare, small or exploratory
uses, answered rightly and at the cost of every score in memory at once.
"""

from typing import Any

import torch


def textbook_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, weights `[batch, heads, queries, kv_tokens]`) with every score in memory at once."""
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    scores = (query @ key.mT).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if s_aux is not None:  # one more score per head, which has no value
        sinks = s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = torch.nn.functional.dropout(weights.to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def explicit_mask(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    is_causal: bool | None,
    is_for_sdpa: bool,
) -> torch.Tensor | None:
    """Boolean `[batch, 1, queries, kv_tokens]`, or None where everything may be attended or where
    sdpa's own reading of None is right.

    sdpa aligns an implicit causal mask at the top left, which is wrong behind a longer past.
    """
    queries, tokens = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_implicit = queries == 1 or not is_causal or (is_for_sdpa and queries == tokens)
    if padding is None and is_implicit:
        return None
    mask = torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=query.device)
    if is_causal:
        mask = mask.tril(tokens - queries)
    return mask if padding is None else mask & padding.bool()[:, None, None, :tokens]
