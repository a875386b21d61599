"""Attention over blocks: what is promised, for whichever kernel runs.

Checks arguments, allocates, dispatches. What it means is in `reference.py`; how it is fast is in
`csrc/`. Promises, the same for every kernel:

- bits depend on nothing but the values: not on the number of threads, not on how the blocks are
  split over successive `attend_blocks` calls (in block order), not on which slots hold them;
- accumulation in float32; log-sum-exp natural, float32, -inf (and output 0) where nothing was
  attended; positions that may not be attended are not read into any result (they may be NaN);
- an `UnsupportedInputError` comes before anything is written.

What the compiled core cannot do (`not_supported_reasons`) is done by the reference, on just the
blocks given, so memory stays bounded.

The Python side of `paged_attention` is paid once per layer and token: only cheap checks here.
"""

import torch
from torch import Tensor

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import checks, flash, reference
from hf_tiered_cache.kernels.cores import (
    DTYPE_NUMBERS,
    MAX_HEAD_DIM,
    Core,
    out_pointers,
    state_pointers,
)
from hf_tiered_cache.kernels.loader import (
    available_kernels,
    backend,
    kernel_for,
    missing_core,
    use_kernel,
)
from hf_tiered_cache.kernels.state import AttentionState, RunningState
from hf_tiered_cache.kernels.view import BlockView
from hf_tiered_cache.layout import BlockLayout

__all__ = [
    "AttentionState",
    "BlockView",
    "RunningState",
    "append_tokens",
    "attend_blocks",
    "available_kernels",
    "backend",
    "finish_attention",
    "join_states",
    "merge_attention_states",
    "not_supported_reasons",
    "paged_attention",
    "use_kernel",
]

_NO_LSE = torch.empty(0)  # its address is null


def append_tokens(keys: Tensor, values: Tensor, view: BlockView, start_token: int) -> None:
    """Write new tokens at positions start_token.. of every sequence.

    keys [batch, kv_heads, tokens, key_dim] and values [batch, kv_heads, tokens, value_dim], any
    strides. Raises UnsupportedInputError before any write.
    """
    checks.check_append(keys, values, view, start_token)
    core = kernel_for(keys).core
    if core is None or view.layout.dtype not in DTYPE_NUMBERS:
        reference.append_tokens(keys, values, view, start_token)
    else:
        core.append(keys, values, view, start_token)


def paged_attention(
    query: Tensor,
    view: BlockView,
    *,
    kv_tokens: int,
    scale: float,
    query_start: int | None = None,
    causal: bool = True,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = True,
) -> AttentionState:
    """Attend the blocks of a view in one shot.

    query [batch, heads, queries, key_dim]: any strides, contiguous last dimension. The view's
    tokens end at kv_tokens, or with its last column.

    Query i stands at position query_start + i (default: the last ones before kv_tokens) and, if
    `causal`, attends positions up to its own. starts int32 [batch]: first attended position of
    each sequence (left padding). mask: bool [batch|1, heads|1, queries|1, >= kv_tokens], indexed
    by absolute position, True = attend; all three restrict together. bias: float, added to the
    scores, indexed as the mask. softcap: scores become softcap * tanh(score / softcap). sinks
    [heads]: one more score per head that has no value; the log-sum-exp counts it.

    out [batch, heads, queries, value_dim]: written if given (any strides, the query's dtype),
    else new in the query's dtype. The state's lse is empty unless `return_lse`. Raises
    UnsupportedInputError before anything is written.
    """
    checks.check_attention(query, view, kv_tokens, starts, mask, bias)
    layout = view.layout
    batch, heads, queries, _ = query.shape
    shape = (batch, heads, queries, layout.value_dim)
    if out is None:
        out = query.new_empty(shape)
    else:
        checks.check_out(out, shape, query.dtype, query)
    if sinks is not None:
        checks.check_sinks(sinks, query)
    if query_start is None:
        query_start = kv_tokens - queries
    core = _core_for(query, layout, bias)
    if core is None or _is_for_flash(query, layout, mask, bias, softcap):
        state = RunningState.begin(query, layout.value_dim)
        attend_blocks(
            state,
            query,
            view,
            kv_tokens=kv_tokens,
            scale=scale,
            query_start=query_start,
            causal=causal,
            starts=starts,
            mask=mask,
            bias=bias,
            softcap=softcap,
        )
        return finish_attention(state, out, sinks=sinks)
    lse = query.new_empty(shape[:3], dtype=torch.float32) if return_lse else _NO_LSE
    core.attend(
        query,
        view,
        kv_tokens,
        scale,
        query_start,
        causal,
        starts,
        mask,
        softcap,
        None,
        out_pointers(out, lse, _as_float32(sinks)),
    )
    return AttentionState(out, lse)


def attend_blocks(
    state: RunningState,
    query: Tensor,
    view: BlockView,
    *,
    kv_tokens: int,
    scale: float,
    query_start: int | None = None,
    causal: bool = True,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Fold the blocks of a view into `state`; arguments as in `paged_attention`.

    Calls over consecutive views of a table, in block order, followed by `finish_attention`, give
    the bits of one `paged_attention` over the whole table.
    """
    checks.check_attention(query, view, kv_tokens, starts, mask, bias)
    layout = view.layout
    checks.check_state(state, query, layout)
    if query_start is None:
        query_start = kv_tokens - query.shape[2]
    core = _core_for(query, layout, bias)
    is_for_flash = _is_for_flash(query, layout, mask, bias, softcap)
    if core is None or is_for_flash:
        attend = flash.attend_blocks if is_for_flash else reference.attend_blocks
        attend(
            state,
            query,
            view,
            kv_tokens=kv_tokens,
            scale=scale,
            query_start=query_start,
            causal=causal,
            starts=starts,
            mask=mask,
            bias=bias,
            softcap=softcap,
        )
        return
    core.attend(
        query,
        view,
        kv_tokens,
        scale,
        query_start,
        causal,
        starts,
        mask,
        softcap,
        state_pointers(state),
        None,
    )


def join_states(state: RunningState, other: RunningState) -> None:
    """Fold `other`, a running state of the same queries over other positions, into `state`.

    So may parts of the blocks be attended elsewhere, each in block order. Associative only up to
    rounding: the same joins in the same order give the same bits.
    """
    checks.check_join(state, other)
    core = kernel_for(state.acc).core
    if core is None or not _is_compiled_state(state) or not _is_compiled_state(other):
        reference.join_states(state, other)
    else:
        core.join(state, other)


def finish_attention(
    state: RunningState,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> AttentionState:
    """Divide by the sum: the attention state of everything folded so far. `state` stays as it is.

    out [batch, heads, queries, value_dim]: written if given (any strides), else new, of `dtype`
    (default: the state's). sinks [heads]: see `paged_attention`.
    """
    shape = tuple(state.acc.shape)
    if out is None:
        out = state.acc.new_empty(shape, dtype=dtype)
    else:
        checks.check_out(out, shape, dtype or out.dtype, state.acc)
    if sinks is not None:
        checks.check_sinks(sinks, state.acc)
    core = kernel_for(state.acc).core
    if core is None or out.dtype not in DTYPE_NUMBERS or not _is_compiled_state(state):
        return AttentionState(out, reference.finish_attention(state, out, sinks))
    lse = state.sum.new_empty(shape[:3])
    core.finish(state, out.dtype, out_pointers(out, lse, _as_float32(sinks)))
    return AttentionState(out, lse)


def merge_attention_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The attention state over the positions of both, which share none; float32."""
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        raise UnsupportedInputError(
            f"merge_attention_states: a has out {list(a.out.shape)} and lse {list(a.lse.shape)}, "
            f"b has {list(b.out.shape)} and {list(b.lse.shape)}; expected the same shapes"
        )
    return reference.merge_attention_states(a, b)


def not_supported_reasons(
    query: Tensor,
    layout: BlockLayout,
    *,
    bias: Tensor | None = None,
) -> list[str]:
    """Why the compiled core of the query's device cannot attend this, all reasons; empty if it
    can."""
    reasons = []
    if bias is not None:
        reasons.append("an additive bias")
    if not query.is_cpu and (missing := missing_core(query.device)):
        reasons.append(f"query on device {query.device}: {missing}")
    if layout.dtype not in DTYPE_NUMBERS:
        reasons.append(f"blocks of {layout.dtype}, expected float32, bfloat16 or float16")
    if query.dtype != layout.dtype:
        reasons.append(f"query of {query.dtype}, expected the blocks' {layout.dtype}")
    if max(layout.key_dim, layout.value_dim) > MAX_HEAD_DIM:
        reasons.append(
            f"key_dim {layout.key_dim}, value_dim {layout.value_dim}; expected <= {MAX_HEAD_DIM}"
        )
    if query.stride(-1) != 1:
        reasons.append("query with a strided last dimension")
    return reasons


def _is_for_flash(
    query: Tensor,
    layout: BlockLayout,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> bool:
    """Whether torch's flash attention does this best: prefill on a CUDA device."""
    return query.is_cuda and not flash.not_supported_reasons(
        query, layout, mask=mask, bias=bias, softcap=softcap
    )


def _core_for(query: Tensor, layout: BlockLayout, bias: Tensor | None) -> Core | None:
    """The core that attends this; None: the reference does."""
    core = kernel_for(query).core
    return None if core is None or not_supported_reasons(query, layout, bias=bias) else core


def _is_compiled_state(state: RunningState) -> bool:
    return (
        state.acc.dtype == torch.float32
        and state.acc.is_contiguous()
        and state.acc.size(-1) <= MAX_HEAD_DIM
    )


def _as_float32(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.detach().to(torch.float32).contiguous()
