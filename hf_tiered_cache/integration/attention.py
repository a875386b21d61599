"""How attention reaches the blocks: `tiered_attention_forward` and the registry of transformers.

A model hands what `update()` returned to the attention function of its configuration. `enable`
wraps those functions so that a paged handle goes to `tiered_attention_forward` and everything
else to the original, untouched; the first `TieredCache` calls it.

Importing this module only adds a name of our own, "tiered", with a mask function that builds no
query-by-key mask where position alone says what may be attended:
`model.set_attn_implementation("tiered")`, for prompts whose mask would itself be too large.

transformers' signatures as of 5.17 to 5.23 (`modeling_utils.AttentionInterface`,
`masking_utils.AttentionMaskInterface`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from hf_tiered_cache.integration import forwards, masks
from hf_tiered_cache.integration.dense_attention import explicit_mask, textbook_attention
from hf_tiered_cache.integration.paged_states import PagedStates, RefuseBackward, Snapshot
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.observe.metrics import span
from hf_tiered_cache.observe.tracing import ATTEND, ATTENTION, MERGE

NAME = "tiered"
WRAPPED_NAMES = (
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

_originals: dict[str, AttentionFunction] = {}


def enable() -> None:
    """Let paged handles reach tiered attention, and caches know how a forward ended; called by the
    first `TieredCache`. Idempotent."""
    forwards.watch()
    registry = AttentionInterface._global_mapping
    for name in WRAPPED_NAMES:
        if name in registry and name not in _originals:
            _originals[name] = registry[name]
            AttentionInterface.register(name, _wrap(name, registry[name]))


def disable() -> None:
    """Put transformers' own attention functions and calls back; with them, caches go on densely,
    and a forward that fails outside the cache leaves in it what it brought."""
    forwards.unwatch()
    for name, original in _originals.items():
        AttentionInterface.register(name, original)
    _originals.clear()


def tiered_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function over the blocks behind `key` and `value`.

    query `[batch, heads, queries, head_dim]`; attention_mask: None (causal by position), 2-D
    padding `[batch, kv_tokens]`, or 4-D `[batch, heads, queries, kv_tokens]`, boolean (True =
    attend) or additive. Of the keyword arguments scaling, dropout, is_causal, softcap, s_aux
    (sinks), position_bias, sliding_window and output_attentions mean what they mean in
    transformers. Returns (out `[batch, queries, heads, head_dim]`, None).

    What the blocks cannot answer (attention weights, dropout, dense tensors) is computed densely.
    """
    attend = _attend_uncompiled if torch.compiler.is_compiling() else _attend
    return attend(_dense_attention, module, query, key, value, attention_mask, **kwargs)


def _attend(
    dense: AttentionFunction,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Chunk by chunk where the blocks can answer, else `dense` on dense tensors."""
    if isinstance(key, PagedStates):
        key.snapshot.check_model(module)
    if not _can_stream(query, key, value, attention_mask, module, kwargs):
        known = {
            "scaling": scaling,
            "is_causal": is_causal,
            "softcap": softcap,
            "s_aux": s_aux,
            "position_bias": position_bias,
        }
        kwargs |= {name: given for name, given in known.items() if given is not None}
        return dense(module, query, _dense(key), _dense(value), attention_mask, **kwargs)
    snapshot: Snapshot = key.snapshot  # type: ignore[attr-defined]
    autocast_dtype = torch.get_autocast_dtype(query.device.type) if _is_autocast(query) else None
    if query.dtype != key.dtype:
        query = query.to(key.dtype)
    batch, _, num_queries, head_dim = query.shape
    kv_tokens = snapshot.num_tokens
    query_start = kv_tokens - num_queries
    scale = scaling if scaling is not None else head_dim**-0.5
    causal = num_queries > 1
    starts = mask = None
    bias = position_bias
    if attention_mask is None:
        if causal:
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    elif attention_mask.dim() == 2:
        starts, mask = masks.padding(attention_mask)
    elif attention_mask.dtype == torch.bool:
        starts, mask = masks.boolean(attention_mask, batch, query_start, kv_tokens)
        causal = mask is None  # else the mask says it all
    else:
        bias = attention_mask if bias is None else bias + attention_mask
        causal = False
    # By position: once per layer and token, and names would cost three times as much.
    call = ops.AttentionCall(
        kv_tokens, query_start, scale, causal, starts, mask, bias, softcap, s_aux
    )
    try:
        seen = query.detach() if query.requires_grad else query
        out = _stream_attention(snapshot, seen, call)
    except BaseException as error:
        snapshot.owner.note_failure(error)
        raise
    if autocast_dtype is not None:  # attended in the blocks' own, wider dtype: only this is rounded
        out = out.to(autocast_dtype)
    if query.requires_grad and torch.is_grad_enabled():
        out = RefuseBackward.apply(out, query)
    return out, None


# Where blocks lie is no constant: a compiled model breaks its graph here.
_attend_uncompiled = torch.compiler.disable(_attend)


def _stream_attention(
    snapshot: Snapshot, query: torch.Tensor, call: ops.AttentionCall
) -> torch.Tensor:
    """Attend the blocks of a snapshot, in block order, as they become resident.

    Returns `[batch, queries, heads, value_dim]`. One call of the kernel when everything is
    resident, else one per chunk, folded into a running state: the same bits either way.
    """
    manager, layout = snapshot.manager, snapshot.layout
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, layout.value_dim))
    heads_first = out.transpose(1, 2)
    layer = snapshot.table.layer
    selection = snapshot.owner.selection
    with manager.read_lock, span(ATTENTION, layer), manager.read(snapshot, selection) as reading:
        if reading.resident is not None:
            ops.paged_attention(query, reading.resident, call, out=heads_first, return_lse=False)
            return out
        if reading.has_gaps:
            call = call._replace(has_gaps=True)
        state = ops.RunningState.begin(query, layout.value_dim)
        reading.attend_in_place(query, call)
        for chunk in reading.chunks():
            columns = range(chunk.first, chunk.first + chunk.slots.shape[1])
            with span(ATTEND, layer, columns):
                ops.attend_blocks(state, query, reading.view(chunk), call)
        with span(MERGE, layer):
            if reading.beside:
                reading.join_in_place(state)
            ops.finish_attention(state, out=heads_first, sinks=call.sinks)
    return out


def tiered_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function of the name "tiered": None or the 2-D padding mask where the kernels can
    tell the rest from positions, else transformers' dense boolean mask (windows, overlays)."""
    windowed = local_size is not None and kv_length >= local_size
    if windowed or not allow_is_causal_skip or use_vmap:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            **kwargs,
        )
    return flash_attention_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
    )


def _wrap(name: str, original: AttentionFunction) -> AttentionFunction:
    """The original, except that a paged handle goes to tiered attention."""
    dense = _dense_attention if name == "sdpa" else original

    @functools.wraps(original)
    def attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(key, PagedStates):
            attend = _attend_uncompiled if torch.compiler.is_compiling() else _attend
            return attend(dense, module, query, key, value, attention_mask, **kwargs)
        return original(module, query, key, value, attention_mask, **kwargs)

    return attention_forward


def _can_stream(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    module: torch.nn.Module,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the blocks behind the handles can answer this call, chunk by chunk."""
    return (
        isinstance(key, PagedStates)
        and isinstance(value, PagedStates)
        and key.snapshot is value.snapshot
        and (query.dtype == key.dtype or _is_autocast(query))
        and not kwargs.get("output_attentions")
        and not (kwargs.get("dropout") and module.training)
        and (
            attention_mask is None
            or (
                isinstance(attention_mask, torch.Tensor)
                and attention_mask.dim() in (2, 4)
                and attention_mask.shape[-1] >= key.shape[2]
            )
        )
        # With a 2-D mask or none, a window would have to come from this argument.
        and (
            (window := kwargs.get("sliding_window")) is None
            or window >= key.shape[2]
            or (attention_mask is not None and attention_mask.dim() == 4)
        )
    )


def _is_autocast(query: torch.Tensor) -> bool:
    """Whether autocast decides in which dtype this query is attended: it leaves float64 alone."""
    return torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64


def _dense(states: torch.Tensor) -> torch.Tensor:
    if not isinstance(states, PagedStates):
        return states
    try:
        return states.materialize()
    except BaseException as error:
        states.snapshot.owner.note_failure(error)
        raise


def _dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' sdpa over dense tensors, with an implicit mask spelled out; what it ignores or
    refuses (soft-capped scores, sinks, weights asked for) by the textbook."""
    asks_more = any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))
    asks_more = asks_more or bool(kwargs.get("output_attentions"))
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = explicit_mask(
            module, query, key, attention_mask, kwargs.get("is_causal"), is_for_sdpa=not asks_more
        )
    if asks_more:
        return textbook_attention(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# Here and not in `enable`: a model is loaded with attn_implementation="tiered" before any cache is
# made. Nothing of transformers is replaced by it.
AttentionInterface.register(NAME, tiered_attention_forward)
AttentionMaskInterface.register(NAME, tiered_mask)
