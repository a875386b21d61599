"""Prefill by torch's own flash attention over blocks.

Many queries over many tokens are bound by arithmetic, where torch's flash attention is hard to
beat; all it lacks is blocks. So a few blocks at a time (a group) are gathered into one dense run
of keys and values, attended, and folded into the running state by their log-sum-exp. On CUDA that
is `aten::_scaled_dot_product_flash_attention`; the same code runs on the CPU, through
`aten::_scaled_dot_product_flash_attention_for_cpu`, so that it is tested on any machine.

Bits depend on nothing but the call's arguments: groups begin at multiples of their size, counted
from position 0, and a view must begin and end at such borders (`group_columns`). What else cuts a
group, the first query and a sequence's first attended token, is part of the call.

flash's own causal flag means what we mean only where queries and keys stand at the same positions
(versions differ in how they align others), so it is used for such squares only, and never for a
row that attends nothing.
"""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels.call import AttentionCall
from hf_tiered_cache.kernels.state import RunningState, weight
from hf_tiered_cache.kernels.view import BlockView
from hf_tiered_cache.layout import BlockLayout

# A partial costs passes over the running state: per query, head and channel about 20 bytes (twice
# 4 read and 4 written, the partial's 2 written and read) against 4 * tokens operations. At 4 TB/s
# and 500 Tflop/s that is 625 / tokens of the arithmetic: 31 % at 2048, 2.4 times it at one block of
# 256. Twice as many tokens would halve that, and double the staging.
GROUP_TOKENS = 2048
# Staging holds two groups of every sequence. Blocks smaller than the default ones are asked for
# where memory is tight (and by tests), so their groups are smaller too.
MAX_GROUP_COLUMNS = 16

KNOWN_FACTS = frozenset(("kv_tokens", "query_start", "scale", "causal", "starts", "sinks"))
MIN_QUERIES = 16  # below, reading the blocks once in place is cheaper than gathering them
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8  # on CUDA: rows are read 16 bytes at a time
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_CAPABILITY = (8, 0)
CPU_DTYPES = (*CUDA_DTYPES, torch.float32, torch.float64)
PARTIAL_ELEMENTS = 1 << 24  # 32 MiB of 16-bit partial at a time; queries are sliced to keep to it


class _Piece(NamedTuple):
    """Queries that attend tokens: all of them, or each those up to its own position."""

    queries: slice  # indices
    tokens: slice  # positions
    is_causal: bool


def group_columns(layout: BlockLayout) -> int:
    """Blocks of one sequence that are attended in one go: views begin and end at multiples."""
    return min(max(1, GROUP_TOKENS // layout.block_tokens), MAX_GROUP_COLUMNS)


def not_supported_reasons(query: Tensor, layout: BlockLayout, call: AttentionCall) -> list[str]:
    """Why flash attention cannot, or should not, do this call, all reasons; empty if it can.

    They depend on the call alone, not on the view, so every view of a table goes the same way.
    """
    reasons = call.beyond(KNOWN_FACTS)
    if query.shape[2] < MIN_QUERIES:
        reasons.append(f"{query.shape[2]} queries, expected at least {MIN_QUERIES}")
    if query.dtype != layout.dtype:
        reasons.append(f"query of {query.dtype}, expected the blocks' {layout.dtype}")
    if query.stride(-1) != 1:
        reasons.append("query with a strided last dimension")
    if layout.key_dim != layout.value_dim:
        reasons.append(f"key_dim {layout.key_dim} and value_dim {layout.value_dim} differ")
    if max(layout.key_dim, layout.value_dim) > MAX_HEAD_DIM:
        reasons.append(
            f"key_dim {layout.key_dim}, value_dim {layout.value_dim}; expected <= {MAX_HEAD_DIM}"
        )
    return reasons + _device_reasons(query.device, layout)


def _device_reasons(device: torch.device, layout: BlockLayout) -> list[str]:
    if device.type == "cpu":
        if layout.dtype in CPU_DTYPES:
            return []
        return [f"blocks of {layout.dtype}, expected one of {CPU_DTYPES}"]
    if device.type != "cuda":
        return [f"query on device {device}, expected cuda or cpu"]
    reasons = []
    if layout.dtype not in CUDA_DTYPES:
        reasons.append(f"blocks of {layout.dtype}, expected one of {CUDA_DTYPES}")
    if layout.key_dim % HEAD_DIM_STEP:
        reasons.append(f"key_dim {layout.key_dim}, expected a multiple of {HEAD_DIM_STEP}")
    if not torch.backends.cuda.is_flash_attention_available():
        reasons.append("torch was built without flash attention")
    elif (capability := torch.cuda.get_device_capability(device)) < CUDA_CAPABILITY:
        reasons.append(f"compute capability {capability}, expected {CUDA_CAPABILITY} or later")
    return reasons


@torch.no_grad()
def attend_blocks(state: RunningState, query: Tensor, view: BlockView, call: AttentionCall) -> None:
    """Fold the view's blocks into `state`, in block order; see `ops.attend_blocks`.

    The view begins at a multiple of `group_columns` blocks and ends at one, or at kv_tokens.
    Raises UnsupportedInputError otherwise, and for what `not_supported_reasons` names, before
    anything is written. `starts` are brought to the host: one synchronisation for each tensor,
    which the chunks and layers of a forward share.
    """
    reasons = not_supported_reasons(query, view.layout, call)
    if reasons:
        raise UnsupportedInputError(f"flash attention cannot do this: {'; '.join(reasons)}")
    _check_borders(view, call.kv_tokens)
    if query.is_cuda:
        view.note_stream(torch.cuda.current_stream(query.device).cuda_stream)
    if call.starts is None:
        _attend_rows(state, query, view, call, start=0)
        return
    for row, start in enumerate(_on_host(call.starts)):
        one = slice(row, row + 1)
        _attend_rows(
            RunningState(state.acc[one], state.max[one], state.sum[one]),
            query[one],
            BlockView(view.blocks, view.device_table[one], view.layout, view.first_token),
            call,
            start,
        )


class _SeenStarts:
    """The last `starts` that were read, and what they said."""

    def __init__(self) -> None:
        self.entry: tuple[weakref.ref[Tensor], int, list[int]] | None = None


_seen = _SeenStarts()


def _on_host(starts: Tensor) -> list[int]:
    """The positions, kept for the next chunk and layer: to read them waits for the device."""
    if starts.is_inference():  # these do not count their changes
        return starts.tolist()
    entry = _seen.entry  # one step, as other threads may be here
    if entry is None or entry[0]() is not starts or entry[1] != starts._version:
        entry = _seen.entry = weakref.ref(starts), starts._version, starts.tolist()
    return entry[2]


def _check_borders(view: BlockView, kv_tokens: int) -> None:
    columns = group_columns(view.layout)
    group = columns * view.layout.block_tokens
    last = view.first_token + view.table.size(1) * view.layout.block_tokens
    if view.first_token % group or (last % group and last < kv_tokens):
        raise UnsupportedInputError(
            f"view: got positions [{view.first_token}, {last}), expected multiples of {group} "
            f"(flash.group_columns: {columns} blocks of {view.layout.block_tokens} tokens), or the "
            f"end at kv_tokens {kv_tokens}"
        )


def _attend_rows(
    state: RunningState,
    query: Tensor,
    view: BlockView,
    call: AttentionCall,
    start: int,
) -> None:
    """Sequences that all attend from position `start`: group after group of their blocks."""
    layout = view.layout
    num_queries = query.shape[2]
    columns = group_columns(layout)
    query_start = call.query_start if call.causal else None
    end = call.kv_tokens
    if query_start is not None:
        end = min(end, query_start + num_queries)
    for column in range(0, view.table.size(1), columns):
        origin = view.first_token + column * layout.block_tokens
        first, last = max(origin, start), min(origin + columns * layout.block_tokens, end)
        if first >= last:
            continue
        slots = view.device_table[:, column : column + layout.num_blocks(last - origin)]
        keys = _gather(layout.keys(view.blocks), slots)
        values = _gather(layout.values(view.blocks), slots)
        for piece in _pieces(first, last, query_start, num_queries):
            tokens = slice(piece.tokens.start - origin, piece.tokens.stop - origin)
            for part in _slices(piece, query):
                out, lse = _flash_attention(
                    query[:, :, part],
                    keys[:, :, tokens],
                    values[:, :, tokens],
                    call.scale,
                    piece.is_causal,
                )
                _fold(state, part, out, lse)


def _gather(plane: Tensor, slots: Tensor) -> Tensor:
    """Blocks `[slots, kv_heads, block_tokens, dim]` of a table `[batch, n]` as one dense
    `[batch, kv_heads, n * block_tokens, dim]`, in one pass."""
    heads = torch.arange(plane.shape[1], device=slots.device)
    return plane[slots.long()[:, None, :], heads[None, :, None]].flatten(2, 3)


def _pieces(first: int, last: int, query_start: int | None, num_queries: int) -> Iterator[_Piece]:
    """What of the tokens [first, last) is attended by whom, together all of it; causal where
    `query_start` is given, and `last` is then at most the position behind the last query."""
    everybody = slice(0, num_queries)
    if query_start is None or last <= query_start:
        yield _Piece(everybody, slice(first, last), False)
        return
    if first < query_start:
        yield _Piece(everybody, slice(first, query_start), False)
        first = query_start
    tokens = slice(first, last)
    at = slice(first - query_start, last - query_start)  # the queries that stand there
    yield _Piece(at, tokens, True)
    if at.stop < num_queries:
        yield _Piece(slice(at.stop, num_queries), tokens, False)


def _slices(piece: _Piece, query: Tensor) -> Iterator[slice]:
    """The queries of a piece in slices whose partial is not too large; a square, itself no larger
    than a group, in one."""
    if piece.is_causal:
        yield piece.queries
        return
    step = max(1, PARTIAL_ELEMENTS // (query.shape[0] * query.shape[1] * query.shape[3]))
    for begin in range(piece.queries.start, piece.queries.stop, step):
        yield slice(begin, min(begin + step, piece.queries.stop))


def _flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse) of dense attention: out in the query's dtype, lse natural. Both operators take
    grouped heads and views with a contiguous last dimension."""
    assert not is_causal or query.shape[2] == keys.shape[2]
    aten = torch.ops.aten
    if query.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, is_causal, False, scale=scale
        )
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, is_causal, scale=scale
        )
    return out, lse


def _fold(state: RunningState, part: slice, out: Tensor, lse: Tensor) -> None:
    """Join a finished partial: its `out` is its sum of values over a sum of 1, with `lse` in place
    of the largest score."""
    # flash-attention 2 says +inf where nothing could be attended, or where a score was NaN; in the
    # latter case `out` is NaN, and stays so under any weight.
    lse = lse.to(state.max.dtype).masked_fill(lse == torch.inf, -torch.inf)
    acc, row_max, row_sum = state.acc[:, :, part], state.max[:, :, part], state.sum[:, :, part]
    new_max = torch.maximum(row_max, lse)
    keep, add = weight(row_max, new_max), weight(lse, new_max)
    acc.mul_(keep.unsqueeze(-1)).addcmul_(out, add.unsqueeze(-1))
    row_sum.mul_(keep).add_(add)
    row_max.copy_(new_max)
