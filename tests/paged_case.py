"""A paged cache to attend, and what attention over it should be, in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout


@dataclass
class PagedCase:
    """Random queries, keys and values; the latter two also in blocks.

    Slots are shuffled, three are spare, and every byte that holds no token is NaN.
    """

    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    queries: int = 1
    tokens: int = 40
    key_dim: int = 64
    value_dim: int = 64
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0
    layout: BlockLayout = field(init=False)
    query: Tensor = field(init=False)
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    blocks: Tensor = field(init=False)
    table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(self.dtype)

        self.layout = BlockLayout(
            self.kv_heads, self.key_dim, self.value_dim, self.block_tokens, self.dtype
        )
        self.query = normal(self.batch, self.heads, self.queries, self.key_dim) * 2
        self.keys = normal(self.batch, self.kv_heads, self.tokens, self.key_dim)
        self.values = normal(self.batch, self.kv_heads, self.tokens, self.value_dim)
        columns = self.layout.num_blocks(self.tokens)
        slots = self.batch * columns + 3
        order = torch.randperm(slots, generator=random)[: self.batch * columns]
        self.table = order.view(self.batch, columns).int()
        self.fill_blocks(slots)

    def fill_blocks(self, slots: int) -> None:
        """Write keys and values to the table's slots by plain indexing, NaN elsewhere."""
        self.blocks = torch.full((slots, self.layout.num_bytes), 0xFF, dtype=torch.uint8)
        block_keys, block_values = self.layout.keys(self.blocks), self.layout.values(self.blocks)
        for token in range(self.tokens):
            column, inside = divmod(token, self.block_tokens)
            slot = self.table[:, column].long()
            block_keys[slot, :, inside] = self.keys[:, :, token]
            block_values[slot, :, inside] = self.values[:, :, token]

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    def attend(self, **changes: object) -> ops.AttentionState:
        """`paged_attention` over the whole table; changes of the query, the view, the call."""
        query = changes.pop("query", self.query)
        of_view = _taken(changes, "blocks", "table", "first_token", "codec")
        how = _taken(changes, "out", "return_lse")
        return ops.paged_attention(query, self.view(**of_view), self.call(**changes), **how)

    def call(self, **changes: object) -> ops.AttentionCall:
        """A call whose queries are the last of the tokens."""
        last = {"kv_tokens": self.tokens, "query_start": self.tokens - self.queries}
        return ops.AttentionCall(**{**last, "scale": self.scale, **changes})

    def view(self, **changes: object) -> ops.BlockView:
        """The whole table."""
        return ops.BlockView(
            **{"blocks": self.blocks, "table": self.table, "layout": self.layout, **changes}
        )

    def attend_in_pieces(self, sizes: list[int], **changes: object) -> ops.RunningState:
        """`attend_blocks` over consecutive pieces of the table, `sizes` blocks each."""
        call = self.call(**changes)
        state = ops.RunningState.begin(self.query, self.value_dim)
        column = 0
        for size in sizes:
            piece = self.table[:, column : column + size]
            view = self.view(table=piece, first_token=column * self.block_tokens)
            ops.attend_blocks(state, self.query, view, call)
            column += size
        return state

    def allowed(
        self,
        causal: bool = True,
        starts: Tensor | None = None,
        mask: Tensor | None = None,
        query_start: int | None = None,
    ) -> Tensor:
        """Which positions each query may attend: bool [batch, heads, queries, tokens]."""
        allowed = torch.ones(self.batch, self.heads, self.queries, self.tokens, dtype=torch.bool)
        positions = torch.arange(self.tokens)
        if causal:
            start = self.tokens - self.queries if query_start is None else query_start
            allowed &= positions <= (torch.arange(self.queries) + start)[:, None]
        if starts is not None:
            allowed &= positions >= starts[:, None, None, None]
        if mask is not None:
            allowed &= mask[..., : self.tokens]
        return allowed

    def expected(
        self,
        causal: bool = True,
        starts: Tensor | None = None,
        mask: Tensor | None = None,
        query_start: int | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) in float64 by the textbook: softmax over the whole row at once."""
        allowed = self.allowed(causal, starts, mask, query_start)
        keys = self.keys.double().repeat_interleave(self.group, 1)
        values = self.values.double().repeat_interleave(self.group, 1)
        scores = self.query.double() @ keys.mT * self.scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[..., : self.tokens].double()
        scores = scores.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            sink = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            lse = torch.cat([scores, sink], -1).logsumexp(-1)
        else:
            lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().masked_fill(~allowed, 0.0)
        return weights @ values, lse

    def sdpa(self, **restrictions: object) -> Tensor:
        """Torch's own attention in the case's dtype."""
        return torch.nn.functional.scaled_dot_product_attention(
            self.query,
            self.keys.repeat_interleave(self.group, 1),
            self.values.repeat_interleave(self.group, 1),
            attn_mask=self.allowed(**restrictions),
            scale=self.scale,
        )


def _taken(changes: dict[str, object], *names: str) -> dict[str, object]:
    return {name: changes.pop(name) for name in names if name in changes}
