"""`PagedStates`: what `update()` returns in place of a dense tensor of keys or values.

It looks like the dense tensor (shape, dtype, device) and holds none of its bytes. Tiered attention
recognises it and streams the blocks behind it; any other torch operation on it builds the dense
tensor first: right, slower, and told once with the fix. So a model whose attention is not reached
still computes the truth.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from hf_tiered_cache.block_manager import BlockTable
from hf_tiered_cache.errors import BackwardError
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.offload_manager import OffloadManager
from hf_tiered_cache.sizes import format_bytes

logger = logging.get_logger(__name__)


class Snapshot:
    """The first `num_tokens` tokens of one layer, fixed while anybody holds it.

    Appending cannot disturb it (full blocks are immutable, new tokens stand behind `num_tokens`).
    Before anything else is done to the table its owner calls `detach`.
    `scan`: the cache's tables in the order a forward reads them.
    """

    __slots__ = ("manager", "table", "num_tokens", "scan", "__weakref__")

    def __init__(
        self, manager: OffloadManager, table: BlockTable, scan: Sequence[BlockTable]
    ) -> None:
        self.manager = manager
        self.table = table
        self.num_tokens = table.num_tokens
        self.scan = scan

    @property
    def layout(self) -> BlockLayout:
        return self.table.layout

    def detach(self) -> None:
        """Hold the blocks by a fork of the table, dropped with this snapshot."""
        self.table = self.manager.blocks.fork(self.table)
        weakref.finalize(self, self.manager.drop_table, self.table)

    def materialize(self, part: str) -> torch.Tensor:
        """Build the dense `[batch, kv_heads, num_tokens, dim]` tensor of "keys" or "values"."""
        layout, manager = self.layout, self.manager
        dim = layout.key_dim if part == "keys" else layout.value_dim
        dense = torch.empty(
            (self.table.batch, layout.kv_heads, self.num_tokens, dim),
            dtype=layout.dtype,
            device=manager.device_tier.device,
        )
        with manager.lock:
            view = getattr(layout, part)(manager.device_tier.slab)
            for chunk in manager.stream(self.table, self.scan):
                first = chunk.first * layout.block_tokens
                last = min(first + chunk.slots.shape[1] * layout.block_tokens, self.num_tokens)
                # [batch, blocks, kv_heads, block_tokens, dim] -> tokens of a head side by side
                tokens = view[chunk.slots.long()].transpose(1, 2).flatten(2, 3)
                dense[:, :, first:last] = tokens[:, :, : last - first]
        return dense


class PagedStates(torch.Tensor):
    """A handle on the keys or the values of a `Snapshot`, `[batch, kv_heads, tokens, head_dim]`."""

    snapshot: Snapshot
    part: str  # "keys" or "values"

    @staticmethod
    def __new__(cls, snapshot: Snapshot, part: str) -> "PagedStates":
        layout = snapshot.layout
        dim = layout.key_dim if part == "keys" else layout.value_dim
        handle: PagedStates = torch.Tensor._make_wrapper_subclass(
            cls,
            (snapshot.table.batch, layout.kv_heads, snapshot.num_tokens, dim),
            dtype=layout.dtype,
            device=snapshot.manager.device_tier.device,
        )
        handle.snapshot = snapshot
        handle.part = part
        return handle

    # Operations are caught one level lower, where every one of them arrives.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def dense(handle: "PagedStates") -> torch.Tensor:
            tensor = handle.materialize()
            logger.warning_once(
                f"{func} reached paged keys or values: the dense tensor "
                f"({format_bytes(tensor.nbytes)}) is built for it at every call. The result is "
                "right but slow and not bounded by the cache's budgets. If this is your model's "
                'attention, use model.set_attn_implementation("sdpa"), which streams the blocks.'
            )
            return tensor

        args, kwargs = tree_map_only(PagedStates, dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def materialize(self) -> torch.Tensor:
        """The dense tensor this handle stands for."""
        return self.snapshot.materialize(self.part)

    def refuse_backward(self) -> "PagedStates":
        """Let a backward pass that arrives here raise `BackwardError`."""
        self.requires_grad_(True)
        self.register_hook(_raise_backward_error)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PagedStates({self.part}, {list(self.shape)}, {self.dtype}, device={self.device})"


def _raise_backward_error(gradient: torch.Tensor) -> torch.Tensor:
    raise BackwardError(
        "a gradient was asked for through a TieredCache, which stores detached keys and values: "
        "train with use_cache=False, or run the forward under torch.no_grad()"
    )


class RefuseBackward(torch.autograd.Function):
    """Identity on `out` that belongs to the graph of `source` and raises on the way back."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _raise_backward_error(gradients[0])
