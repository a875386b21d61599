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
from hf_tiered_cache.kernels.call import AttentionCall
from hf_tiered_cache.kernels.cores import (
    DTYPE_NUMBERS,
    KNOWN_FACTS,
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
    "AttentionCall",
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
    call: AttentionCall,
    *,
    out: Tensor | None = None,
    return_lse: bool = True,
) -> AttentionState:
    """Attend the blocks of a view in one shot.

    query [batch, heads, queries, key_dim]: any strides, contiguous last dimension. The view's
    tokens end at the call's kv_tokens, or with its last column.

    out [batch, heads, queries, value_dim]: written if given (any strides, the query's dtype),
    else new in the query's dtype. The state's lse is empty unless `return_lse`. Raises
    UnsupportedInputError before anything is written.
    """
    checks.check_attention(query, view, call)
    layout = view.layout
    batch, heads, queries, _ = query.shape
    shape = (batch, heads, queries, layout.value_dim)
    if out is None:
        out = query.new_empty(shape)
    else:
        checks.check_out(out, shape, query.dtype, query)
    core = _core_for(query, layout, call)
    if core is None or _is_for_flash(query, layout, call):
        state = RunningState.begin(query, layout.value_dim)
        attend_blocks(state, query, view, call)
        return finish_attention(state, out, sinks=call.sinks)
    lse = query.new_empty(shape[:3], dtype=torch.float32) if return_lse else _NO_LSE
    sinks = None if call.sinks is None else _as_float32(call.sinks)
    core.attend(query, view, call, None, out_pointers(out, lse, sinks))
    return AttentionState(out, lse)


def attend_blocks(state: RunningState, query: Tensor, view: BlockView, call: AttentionCall) -> None:
    """Fold the blocks of a view into `state`; arguments as in `paged_attention`.

    Calls over consecutive views of a table, in block order, followed by `finish_attention`, give
    the bits of one `paged_attention` over the whole table.
    """
    checks.check_attention(query, view, call)
    layout = view.layout
    checks.check_state(state, query, layout)
    core = _core_for(query, layout, call)
    if _is_for_flash(query, layout, call):
        flash.attend_blocks(state, query, view, call)
    elif core is None:
        reference.attend_blocks(state, query, view, call)
    else:
        core.attend(query, view, call, state_pointers(state), None)


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
    (default: the state's). sinks [heads]: those of the call that was folded.
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
    sinks = None if sinks is None else _as_float32(sinks)
    core.finish(state, out.dtype, out_pointers(out, lse, sinks))
    return AttentionState(out, lse)


def merge_attention_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The attention state over the positions of both, which share none; float32."""
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        raise UnsupportedInputError(
            f"merge_attention_states: a has out {list(a.out.shape)} and lse {list(a.lse.shape)}, "
            f"b has {list(b.out.shape)} and {list(b.lse.shape)}; expected the same shapes"
        )
    return reference.merge_attention_states(a, b)


def not_supported_reasons(query: Tensor, layout: BlockLayout, call: AttentionCall) -> list[str]:
    """Why the compiled core of the query's device cannot attend this, all reasons; empty if it
    can."""
    reasons = call.beyond(KNOWN_FACTS)
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


def _is_for_flash(query: Tensor, layout: BlockLayout, call: AttentionCall) -> bool:
    """Whether torch's flash attention does this best: prefill on a CUDA device."""
    is_prefill = query.is_cuda and query.shape[2] >= flash.MIN_QUERIES
    return is_prefill and not flash.not_supported_reasons(query, layout, call)


def _core_for(query: Tensor, layout: BlockLayout, call: AttentionCall) -> Core | None:
    """The core that attends this; None: the reference does."""
    core = kernel_for(query).core
    return None if core is None or not_supported_reasons(query, layout, call) else core


def _is_compiled_state(state: RunningState) -> bool:
    return (
        state.acc.dtype == torch.float32
        and state.acc.is_contiguous()
        and state.acc.size(-1) <= MAX_HEAD_DIM
    )


def _as_float32(sinks: Tensor) -> Tensor:
    return sinks.detach().to(torch.float32).contiguous()
