"""What may be handed to the kernels: each check says what, got and expected.

They run for every layer and token, so they look at shapes, dtypes and strides only; slots are
checked where they are read, in the core. Nothing has been written when one fails.
"""

import torch
from torch import Tensor

from hf_tiered_cache.kernels.call import AttentionCall
from hf_tiered_cache.kernels.state import RunningState
from hf_tiered_cache.kernels.view import BlockView, refuse
from hf_tiered_cache.layout import BlockLayout


def check_attention(query: Tensor, view: BlockView, call: AttentionCall) -> None:
    """Refuse what `paged_attention` and `attend_blocks` cannot mean."""
    layout, shape = view.layout, query.shape
    if len(shape) != 4 or shape[3] != layout.key_dim or shape[0] != view.batch:
        expected = f"[batch {view.batch}, heads, queries, key_dim {layout.key_dim}]"
        refuse("query", list(shape), expected)
    batch, heads, queries, _ = shape
    if heads % layout.kv_heads != 0 or heads == 0:
        refuse("query heads", heads, f"a multiple of kv_heads {layout.kv_heads}")
    if query.dtype != layout.dtype and not query.is_floating_point():
        refuse("query dtype", query.dtype, "a floating-point type")
    blocks = view.blocks
    if not (query.is_cpu and blocks.is_cpu) and query.device != blocks.device:
        refuse("query device", query.device, f"that of the blocks, {blocks.device}")
    if call.kv_tokens < 0:
        refuse("kv_tokens", call.kv_tokens, "0 or more")
    starts, mask, bias = call.starts, call.mask, call.bias
    if starts is not None and (
        starts.dtype != torch.int32 or starts.shape != (batch,) or not starts.is_contiguous()
    ):
        refuse("starts", f"{starts.dtype} {list(starts.shape)}", f"int32 [batch {batch}]")
    if mask is not None:
        if mask.dtype != torch.bool:
            refuse("mask dtype", mask.dtype, "bool, True = attend (additive masks go in bias)")
        _check_broadcast("mask", mask, batch, heads, queries, call.kv_tokens)
    if bias is not None:
        if not bias.is_floating_point():
            refuse("bias dtype", bias.dtype, "a floating-point type")
        _check_broadcast("bias", bias, batch, heads, queries, call.kv_tokens)
    if call.sinks is not None:
        check_sinks(call.sinks, query)


def check_append(keys: Tensor, values: Tensor, view: BlockView, start_token: int) -> None:
    """Refuse what `append_tokens` cannot write."""
    check_new_tokens(keys, values, view.layout, view.batch)
    blocks = view.blocks
    if not (keys.is_cpu and blocks.is_cpu) and keys.device != blocks.device:
        refuse("keys device", keys.device, f"that of the blocks, {blocks.device}")
    offset, tokens = start_token - view.first_token, keys.size(2)
    if offset < 0:
        refuse("start_token", start_token, f"first_token {view.first_token}, or later")
    num_blocks = view.table.size(1)
    if num_blocks * view.layout.block_tokens < offset + tokens:
        needed = view.layout.num_blocks(offset + tokens)
        refuse(
            "table num_blocks",
            num_blocks,
            f"at least {needed} for {tokens} tokens from position {start_token}",
        )


def check_new_tokens(keys: Tensor, values: Tensor, layout: BlockLayout, batch: int) -> None:
    """Refuse keys and values that blocks of this layout cannot take."""
    tokens = keys.size(2) if keys.dim() == 4 else "tokens"
    expected = (batch, layout.kv_heads, tokens)
    if keys.shape != (*expected, layout.key_dim) or values.shape != (*expected, layout.value_dim):
        refuse(
            "keys and values",
            f"{list(keys.shape)} and {list(values.shape)}",
            "[batch, kv_heads, tokens, dim] = "
            f"{[*expected, layout.key_dim]} and {[*expected, layout.value_dim]}",
        )
    if keys.dtype != layout.dtype or values.dtype != layout.dtype:
        refuse("keys and values", f"{keys.dtype} and {values.dtype}", layout.dtype)
    if not (keys.is_cpu and values.is_cpu) and keys.device != values.device:
        refuse("values device", values.device, f"that of the keys, {keys.device}")


def check_state(state: RunningState, query: Tensor, layout: BlockLayout) -> None:
    """Refuse a running state that does not belong to the query."""
    rows = query.shape[:3]
    expected = torch.float64 if query.dtype == torch.float64 else torch.float32
    if state.acc.shape != (*rows, layout.value_dim) or state.acc.dtype != expected:
        refuse(
            "state",
            f"{state.acc.dtype} {list(state.acc.shape)}",
            f"{expected} [batch, heads, queries, value_dim] = {[*rows, layout.value_dim]}",
        )
    if not (state.acc.is_contiguous() and state.max.is_contiguous() and state.sum.is_contiguous()):
        refuse("state strides", state.acc.stride(), "contiguous tensors")


def check_join(state: RunningState, other: RunningState) -> None:
    """Refuse to join states of other queries, precision or device."""
    mine, theirs = state.acc, other.acc
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
        refuse(
            "other state",
            f"{theirs.dtype} {list(theirs.shape)} on {theirs.device}",
            f"{mine.dtype} {list(mine.shape)} on {mine.device}",
        )


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Refuse an output that the result does not fit."""
    is_near = (out.is_cpu and like.is_cpu) or out.device == like.device
    if out.shape != shape or out.dtype != dtype or not is_near:
        refuse(
            "out",
            f"{out.dtype} {list(out.shape)} on {out.device}",
            f"{dtype} [batch, heads, queries, value_dim] = {list(shape)} on {like.device}",
        )


def check_sinks(sinks: Tensor, like: Tensor) -> None:
    """Refuse sinks that are not one per head."""
    if sinks.shape != (like.shape[1],) or sinks.device != like.device:
        refuse("sinks", f"{list(sinks.shape)} on {sinks.device}", f"[heads {like.shape[1]}]")


def _check_broadcast(
    what: str, mask: Tensor, batch: int, heads: int, queries: int, kv_tokens: int
) -> None:
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2] not in (1, queries)
        or mask.shape[3] < kv_tokens
    ):
        refuse(
            what,
            list(mask.shape),
            f"[batch {batch} or 1, heads {heads} or 1, queries {queries} or 1, "
            f"at least kv_tokens {kv_tokens}]",
        )
