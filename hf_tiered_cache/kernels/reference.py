"""What the kernels mean, in plain torch: the definition, and the backend that always works.

Attention over a list of blocks is a left fold. Every block gives a partial (acc, max, sum) of its
own (Milakov & Gimelshein 2018, arXiv 1805.02867); partials are joined in block order with the
rescaling of FlashAttention-2 (arXiv 2307.08691). Because a partial depends on nothing but its
block and the query, any splitting of the blocks over calls gives the same bits. Two finished
states are joined as FlashInfer joins attention states (arXiv 2501.01005).

Positions that a query may not attend are never multiplied: their keys and values may be NaN.
Memory is bounded by one block and `SCORES_ELEMENTS` scores. Works on any device; float64 input
is computed in float64, everything else in float32. Arguments are checked in `ops`.
"""

import torch
from torch import Tensor

from hf_tiered_cache.kernels.call import AttentionCall
from hf_tiered_cache.kernels.state import AttentionState, RunningState, weight
from hf_tiered_cache.kernels.view import BlockView

KNOWN_FACTS = frozenset(
    (
        "kv_tokens",
        "query_start",
        "scale",
        "causal",
        "starts",
        "mask",
        "bias",
        "softcap",
        "sinks",
        "has_gaps",
    )
)
SCORES_ELEMENTS = 1 << 24  # 64 MiB of float32 scores at a time; queries are sliced to keep to it


def append_tokens(
    keys: Tensor,
    values: Tensor,
    view: BlockView,
    start_token: int,
) -> None:
    """Write new tokens at positions start_token.. into their blocks; see `ops.append_tokens`."""
    layout = view.layout
    block_keys, block_values = layout.keys(view.blocks), layout.values(view.blocks)
    column, offset = divmod(start_token - view.first_token, layout.block_tokens)
    written = 0
    for slots in view.device_table[:, column:].long().unbind(1):
        count = min(layout.block_tokens - offset, keys.shape[2] - written)
        if count <= 0:
            break
        inside, new = slice(offset, offset + count), slice(written, written + count)
        # Advanced indexing puts the batch first: [batch, kv_heads, count, dim].
        block_keys[slots, :, inside] = keys[:, :, new]
        block_values[slots, :, inside] = values[:, :, new]
        written += count
        offset = 0


@torch.no_grad()
def attend_blocks(state: RunningState, query: Tensor, view: BlockView, call: AttentionCall) -> None:
    """Fold the view's blocks into `state`, in block order; see `ops.attend_blocks`. Raises
    UnsupportedInputError for a fact that it does not know, before anything is written."""
    call.check_known(KNOWN_FACTS, "the reference kernel")
    layout = view.layout
    heads, num_queries = query.shape[1], query.shape[2]
    step = max(1, SCORES_ELEMENTS // (query.shape[0] * heads * layout.block_tokens))
    for column, slots in enumerate(view.device_table.unbind(1)):
        first = view.first_token + column * layout.block_tokens
        count = min(layout.block_tokens, call.kv_tokens - first)
        if count <= 0:
            break
        blocks, slots = view.decoded(slots)
        keys = layout.keys(blocks)[slots, :, :count].to(state.acc.dtype)
        values = layout.values(blocks)[slots, :, :count].to(state.acc.dtype)
        positions = torch.arange(first, first + count, device=query.device)
        for begin in range(0, num_queries, step):
            part = slice(begin, min(begin + step, num_queries))
            stands_at = torch.arange(part.start, part.stop, device=query.device)
            stands_at = stands_at + call.query_start
            attended = _attended(positions, stands_at if call.causal else None, call.starts)
            tokens = slice(first, first + count)
            if call.mask is not None:
                attended = attended & _slice(call.mask, part, tokens)
            if call.bias is not None:
                bias_part = _slice(call.bias, part, tokens).to(state.acc.dtype)
                attended = attended & (bias_part > -torch.inf)
            else:
                bias_part = None
            partial = _block_partial(
                query[:, :, part].to(state.acc.dtype),
                keys,
                values,
                attended.expand(query.shape[0], heads, part.stop - part.start, count),
                call.scale,
                call.softcap,
                bias_part,
            )
            _fold(state, part, *partial)


@torch.no_grad()
def join_states(state: RunningState, other: RunningState) -> None:
    """Fold `other` into `state`; see `ops.join_states`."""
    _fold(state, slice(None), other.acc, other.max, other.sum)


@torch.no_grad()
def finish_attention(state: RunningState, out: Tensor, sinks: Tensor | None) -> Tensor:
    """Write the normalised values into `out` and return the log-sum-exp (float32)."""
    row_max, row_sum = state.max, state.sum
    acc = state.acc
    if sinks is not None:
        # A sink is one more score with value 0: it only enlarges the sum.
        sink = sinks.to(row_max.dtype)[None, :, None]
        new_max = torch.maximum(row_max, sink)
        shrink = weight(row_max, new_max)
        row_sum = row_sum * shrink + weight(sink.expand_as(row_max), new_max)
        acc = acc * shrink.unsqueeze(-1)
        row_max = new_max
    empty = row_sum == 0
    out.copy_(acc / torch.where(empty, 1.0, row_sum).unsqueeze(-1))
    return torch.where(empty, -torch.inf, row_max + row_sum.log()).float()


@torch.no_grad()
def merge_attention_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state of attention over both sets of positions; float32."""
    lse = torch.logaddexp(a.lse.float(), b.lse.float())
    weight_a, weight_b = weight(a.lse.float(), lse), weight(b.lse.float(), lse)
    out = a.out.float() * weight_a.unsqueeze(-1) + b.out.float() * weight_b.unsqueeze(-1)
    return AttentionState(out, lse)


def _attended(positions: Tensor, stands_at: Tensor | None, starts: Tensor | None) -> Tensor:
    """Which positions may be attended, broadcastable [batch, heads, queries, tokens]."""
    attended = torch.ones((1, 1, 1, positions.numel()), dtype=torch.bool, device=positions.device)
    if stands_at is not None:
        attended = attended & (positions <= stands_at[:, None])
    if starts is not None:
        attended = attended & (positions >= starts[:, None, None, None])
    return attended


def _slice(mask: Tensor, queries: slice, tokens: slice) -> Tensor:
    """The part of a broadcastable [batch, heads, queries, tokens] mask for these queries."""
    return mask[:, :, queries if mask.shape[2] > 1 else slice(None), tokens]


def _block_partial(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attended: Tensor,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(acc, max, sum) of one block alone: the first step of the online softmax.

    query [batch, heads, queries, key_dim], keys and values [batch, kv_heads, tokens, dim],
    attended [batch, heads, queries, tokens].
    """
    kv_heads = keys.shape[1]
    rows = (query.shape[1] // kv_heads, query.shape[2])  # group, queries: one matrix of rows
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    anywhere = attended.unflatten(1, (kv_heads, -1)).any(dim=(2, 3)).unsqueeze(-1)
    # 0 * NaN is NaN: what nobody attends must not even meet a weight of zero.
    values = values.masked_fill(~anywhere, 0.0)
    scores = (grouped @ keys.mT).unflatten(2, rows).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~attended, -torch.inf)
    row_max = scores.amax(-1)
    weights = weight(scores, row_max.unsqueeze(-1))
    grouped = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    acc = (grouped @ values).unflatten(2, rows).flatten(1, 2)
    return acc, row_max, weights.sum(-1)


def _fold(state: RunningState, part: slice, acc: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Join a partial to the running state of the queries in `part`."""
    new_max = torch.maximum(state.max[:, :, part], row_max)
    keep, add = weight(state.max[:, :, part], new_max), weight(row_max, new_max)
    state.acc[:, :, part] = state.acc[:, :, part] * keep[..., None] + acc * add[..., None]
    state.sum[:, :, part] = state.sum[:, :, part] * keep + row_sum * add
    state.max[:, :, part] = new_max
