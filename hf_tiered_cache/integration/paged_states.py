"""`PagedStates`: what `update()` returns in place of a dense tensor of keys or values.

It looks like the dense tensor (shape, dtype, device) and holds none of its bytes. Tiered attention
recognises it and streams the blocks behind it; any other torch operation on it builds the dense
tensor first: right, slower, and told once with the fix. So a model whose attention is not reached
still computes the truth.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers.utils import logging

from hf_tiered_cache.blocks.block_manager import BlockTable
from hf_tiered_cache.blocks.offload_manager import OffloadManager
from hf_tiered_cache.blocks.selection import SelectionPolicy
from hf_tiered_cache.errors import BackwardError, UnsupportedInputError
from hf_tiered_cache.integration.read_only import ReadOnlyTensor
from hf_tiered_cache.layout import BlockLayout

logger = logging.get_logger(__name__)

_make_wrapper = torch.Tensor._make_wrapper_subclass
_throw_on_data_ptr = torch._C._set_throw_on_mutable_data_ptr

TOLD_ONCE = (
    "A torch operation reached the paged keys or values of a TieredCache: the dense tensor is "
    "built for it, at every call. The result is right, but slow and not bounded by the cache's "
    "budgets. If this is your model's attention, use model.set_attn_implementation('sdpa'), which "
    "streams the blocks; if it already does, this model computes its attention by itself."
)


class ModelIdentity:
    """The model that attends a cache, known by the attention module and the config of each layer.

    Keys and values of one model mean nothing to another, even where their shapes agree. But a model
    may be wrapped, cut or edited, and its layers may have configs of their own: another one is told
    by both, in a layer where the module that attended before is still alive.
    """

    __slots__ = ("_config", "_layers")

    def __init__(self, other: "ModelIdentity | None" = None) -> None:
        self._config: weakref.ref[Any] | None = None if other is None else other._config
        # (module, config) by number of the layer
        self._layers: dict[int, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}
        if other is not None:
            self._layers.update(other._layers)

    def is_another(self, module: torch.nn.Module) -> bool:
        """Whether a living model other than that of `module` attended before; else remember it."""
        layer_idx: Any = getattr(module, "layer_idx", None)
        if (known := self._layers.get(layer_idx)) is not None:
            before = known[0]()
            if before is module:
                return False
            config_before = known[1]()
        else:
            before = config_before = None
        config = getattr(module, "config", None)
        if before is not None and config_before is not None and config_before is not config:
            return True
        if layer_idx is not None and config is not None:
            with contextlib.suppress(TypeError):  # a config that cannot be referred to weakly
                self._config = weakref.ref(config)
                self._layers[layer_idx] = weakref.ref(module), self._config
        return False

    @property
    def num_layers(self) -> int:
        """Layers of the model as its config tells, 0 where it does not."""
        config = None if self._config is None else self._config()
        if getattr(config, "is_encoder_decoder", False):
            return 0  # may count those of the encoder
        return getattr(config, "num_hidden_layers", 0)

    def __repr__(self) -> str:
        config = None if self._config is None else self._config()
        return "no model" if config is None else describe_model(config)


def describe_model(config: Any) -> str:
    """How an error names a model."""
    name = getattr(config, "name_or_path", "") or f"config at {id(config):#x}"
    return f"{type(config).__name__.removesuffix('Config')} ({name})"


class Owner(Protocol):
    """Whose tables snapshots show: while it lives, they are kept."""

    model: ModelIdentity  # the model that attends them
    selection: SelectionPolicy  # what of them it attends

    def scan(self, manager: OffloadManager) -> Sequence[BlockTable]:
        """The manager's tables in the order a forward reads them."""

    def note_failure(self, error: BaseException) -> None:
        """Attention to a snapshot failed."""


class Snapshot:
    """The first `num_tokens` tokens of one layer, fixed while anybody holds it.

    Appending cannot disturb it (full blocks are immutable, new tokens stand behind `num_tokens`).
    Before anything else is done to the table its owner calls `detach`. A cache that nobody refers
    to any more stays open while there are snapshots of it.
    `num_new_tokens`: those of the update that returned this snapshot.
    """

    __slots__ = (
        "manager",
        "table",
        "num_tokens",
        "owner",
        "model",
        "num_new_tokens",
        "is_detached",
        "__weakref__",
    )

    def __init__(
        self,
        manager: OffloadManager,
        table: BlockTable,
        owner: Owner,
        num_new_tokens: int = 0,
    ) -> None:
        self.manager = manager
        self.table = table
        self.num_tokens = table.num_tokens
        self.owner = owner
        self.model = owner.model
        self.num_new_tokens = num_new_tokens
        self.is_detached = False

    @property
    def layout(self) -> BlockLayout:
        return self.table.layout

    @property
    def scan(self) -> Sequence[BlockTable]:
        """The cache's tables in the order a forward reads them."""
        return self.owner.scan(self.manager)

    def detach(self) -> None:
        """Hold the blocks by a fork of the table, dropped with this snapshot. Idempotent."""
        if self.is_detached:
            return
        self.is_detached = True
        self.table = self.manager.fork(self.table)
        self.manager.truncate(self.table, self.num_tokens)
        weakref.finalize(self, self.manager.abandon_table, self.table)

    def handles(self) -> "tuple[PagedStates, PagedStates]":
        """Paged keys and values."""
        table, layout = self.table, self.table.layout
        batch, heads, tokens = len(table.rows), layout.kv_heads, self.num_tokens
        return (
            _handle(self, "keys", (batch, heads, tokens, layout.key_dim)),
            _handle(self, "values", (batch, heads, tokens, layout.value_dim)),
        )

    def check_model(self, module: torch.nn.Module) -> None:
        """Raise UnsupportedInputError if another model attended before, and take back the tokens
        that its update has just appended."""
        if not self.model.is_another(module):
            return
        with self.manager.lock:
            table = self.table
            if table.num_tokens == self.num_tokens and not self.is_detached:
                self.detach()
                self.manager.truncate(table, self.num_tokens - self.num_new_tokens)
        raise UnsupportedInputError(
            f"this cache holds the keys and values of {self.model!r}, but "
            f"{describe_model(module.config)} attends it: use one TieredCache per model (reset() "
            "empties a cache for another one)"
        )

    def materialize(self, part: str) -> torch.Tensor:
        """Build the dense `[batch, kv_heads, num_tokens, dim]` tensor of "keys" or "values"."""
        layout, manager = self.layout, self.manager
        dim = layout.key_dim if part == "keys" else layout.value_dim
        dense = torch.empty(
            (self.table.batch, layout.kv_heads, self.num_tokens, dim),
            dtype=layout.dtype,
            device=manager.device_tier.device,
        )
        done = 0
        with manager.read_lock:
            for (tokens,) in self.chunks(part):
                dense[:, :, done : done + tokens.shape[2]] = tokens
                done += tokens.shape[2]
        return dense

    def chunks(self, *parts: str) -> Iterator[list[torch.Tensor]]:
        """The tokens of "keys" or "values" or both, `[batch, kv_heads, some tokens, dim]`, in
        order. The caller holds the manager's `read_lock`; a chunk is good until the next is asked
        for."""
        layout = self.layout
        with self.manager.read(self) as reading:
            for chunk in reading.chunks():
                num_tokens = self.num_tokens - chunk.first * layout.block_tokens
                slab, slots = reading.view(chunk).decoded(chunk.slots)
                # [batch, blocks, kv_heads, block_tokens, dim] -> tokens of a head side by side
                views = [getattr(layout, part)(slab)[slots].transpose(1, 2) for part in parts]
                yield [view.flatten(2, 3)[:, :, :num_tokens] for view in views]


class PagedStates(ReadOnlyTensor):
    """A handle on the keys or the values of a `Snapshot`, `[batch, kv_heads, tokens, head_dim]`."""

    snapshot: Snapshot
    part: str  # "keys" or "values"
    __slots__ = ("snapshot", "part")  # with slots, `torch.utils.swap_tensors` refuses

    def materialize(self) -> torch.Tensor:
        """The dense tensor this handle stands for."""
        return self.snapshot.materialize(self.part)

    def operand(self) -> torch.Tensor:
        """The dense tensor, for an operation of torch: told once."""
        logger.warning_once(TOLD_ONCE)
        return self.materialize()

    # Bytes of one's own, which others may then read or share: there are none.

    def data_ptr(self) -> Any:
        raise _no_bytes("data_ptr")

    def const_data_ptr(self) -> Any:
        raise _no_bytes("const_data_ptr")

    def share_memory_(self) -> Any:
        raise _no_bytes("share_memory_")

    def storage(self) -> Any:
        raise _no_bytes("storage")

    def untyped_storage(self) -> Any:
        raise _no_bytes("untyped_storage")

    _typed_storage = storage

    def is_shared(self) -> bool:
        """Whether other processes see the bytes: no."""
        return False

    def refuse_backward(self) -> "PagedStates":
        """Let a backward pass that arrives here raise `BackwardError`."""
        self.requires_grad_(True)
        self.register_hook(_raise_backward_error)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PagedStates({self.part}, {list(self.shape)}, {self.dtype}, device={self.device})"


def _handle(snapshot: Snapshot, part: str, shape: tuple[int, ...]) -> PagedStates:
    handle: PagedStates = _make_wrapper(
        PagedStates,
        shape,
        dtype=snapshot.table.layout.dtype,
        device=snapshot.manager.device_tier.device,
        storage_size=0,
    )
    # Below torch's operations, whoever asks for an address gets an error and no null pointer.
    _throw_on_data_ptr(handle)
    handle.snapshot = snapshot
    handle.part = part
    return handle


def _no_bytes(what: str) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"{what}: keys and values of a TieredCache lie in its blocks and have no bytes of their "
        "own; take a dense copy, `.clone()`"
    )


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
