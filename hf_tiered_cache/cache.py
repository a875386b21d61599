"""`TieredCache`: transformers' Cache API in the words of this package.

The words and signatures of transformers end here and in `attention.py`. A `TieredLayer` turns the
new keys and values of one layer into blocks and returns paged handles on everything seen; which
tier holds what is the business of the rooms below.
"""

import copy
import operator
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from hf_tiered_cache import attention
from hf_tiered_cache.block_manager import BlockTable
from hf_tiered_cache.config import TieredCacheConfig
from hf_tiered_cache.errors import (
    ClosedCacheError,
    ConfigError,
    OutOfBlocksError,
    TierIOError,
    UnsupportedInputError,
)
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.manager_pool import ManagerPool
from hf_tiered_cache.metrics import CacheStats
from hf_tiered_cache.offload_manager import OffloadManager
from hf_tiered_cache.paged_states import PagedStates, Reader, Snapshot

TIERED_LAYER_TYPE = "full_attention"


class _Owned:
    """The tables of one cache, layer by layer; what must be dropped when the cache goes.

    `reader` is the model that attends them.
    """

    def __init__(self, pool: ManagerPool) -> None:
        self.pool = pool
        self.reader = Reader()
        self._tables: dict[int, tuple[OffloadManager, BlockTable]] = {}
        self._scans: dict[OffloadManager, list[BlockTable]] = {}

    @property
    def tables(self) -> list[BlockTable]:
        """In layer order."""
        return [table for _, (_, table) in sorted(self._tables.items())]

    @property
    def first_layer(self) -> int | None:
        """The number of the first layer that has a table."""
        return min(self._tables, default=None)

    def scan(self, manager: OffloadManager) -> list[BlockTable]:
        """The manager's tables in the order a forward reads them."""
        if manager not in self._scans:
            owners = sorted(self._tables.items())
            self._scans[manager] = [table for _, (owner, table) in owners if owner is manager]
        return self._scans[manager]

    def add(self, layer_idx: int, manager: OffloadManager, table: BlockTable) -> None:
        self._tables[layer_idx] = (manager, table)
        self._scans.clear()

    def drop(self, layer_idx: int) -> None:
        manager, table = self._tables.pop(layer_idx)
        self._scans.clear()
        manager.drop_table(table)
        if not self._tables:
            self.reader = Reader()  # an empty cache is free for another model

    def release(self) -> None:
        """The cache is gone: drop its tables, and the pool with the last fork."""
        tables = list(self._tables.values())
        self._tables.clear()
        self._scans.clear()
        self.pool.release(tables)


class TieredLayer(CacheLayerMixin):
    """One full-attention layer of a `TieredCache`, kept in blocks."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, owned: _Owned, layer_idx: int) -> None:
        # Not calling super: it would set `keys` and `values`, which are views here.
        self._owned = owned
        self._layer_idx = layer_idx
        self._manager: OffloadManager | None = None
        self._table: BlockTable | None = None
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self.is_initialized = False

    @property
    def keys(self) -> PagedStates | None:
        """A handle on all keys `[batch, kv_heads, tokens, head_dim]`; None before the first."""
        return self._handles()[0] if self._table is not None else None

    @property
    def values(self) -> PagedStates | None:
        """A handle on all values `[batch, kv_heads, tokens, head_dim]`; None before the first."""
        return self._handles()[1] if self._table is not None else None

    @property
    def batch_size(self) -> int:
        """Sequences in this layer; -1 before the first update."""
        return -1 if self._table is None else self._table.batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Choose the blocks' shape and device from the first tensors and open an empty table."""
        _check_states(key_states, value_states)
        self._manager = self._owned.pool.manager(key_states, value_states)
        with self._manager.lock:
            self._table = self._manager.new_table(self._layer_idx, key_states.shape[0])
        self.dtype, self.device = key_states.dtype, key_states.device
        self._owned.add(self._layer_idx, self._manager, self._table)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens `[batch, kv_heads, tokens, head_dim]`; return handles on all.

        Raises, before anything changed: UnsupportedInputError for another shape, dtype or device
        than this layer holds, OutOfBlocksError when no tier has room, ClosedCacheError.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            try:
                return self.update(key_states, value_states)
            except BaseException:
                self.reset()
                raise
        manager, table = self._manager, self._table
        assert manager is not None and table is not None
        self._check_fits(table, key_states, value_states)
        needs_grad = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad
        )
        if needs_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        with manager.lock:
            manager.append(table, key_states, value_states)
        keys, values = self._handles(num_new_tokens=key_states.shape[2])
        if needs_grad:
            keys, values = keys.refuse_backward(), values.refuse_backward()
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys a forward with `query_length` new tokens will attend."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self._table is None else self._table.num_tokens

    def get_max_length(self) -> int:
        """-1: bounded by the tiers' bytes, not by a number of tokens."""
        return -1

    def offload(self) -> None:
        """Nothing: blocks are demoted one by one as room is needed."""

    def prefetch(self) -> None:
        """Nothing: loads run ahead of attention by themselves."""

    def reset(self) -> None:
        """Forget everything; the next update may bring another batch."""
        if self._table is not None and self._manager is not None:
            with self._manager.lock:
                self._detach_snapshots()
                self._owned.drop(self._layer_idx)
            self._manager = self._table = None
            self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a count at most 0, as in transformers)."""
        if tokens_to_remove > 0:
            raise UnsupportedInputError(
                f"crop({tokens_to_remove}): expected 0 or a negative count of tokens to remove"
            )
        if tokens_to_remove == 0 or self._table is None or self._manager is None:
            return
        with self._manager.lock:
            self._detach_snapshots()
            keep = max(0, self._table.num_tokens + tokens_to_remove)
            self._manager.truncate(self._table, keep)

    def select_rows(self, rows: list[int]) -> None:
        """Make sequence `i` what sequence `rows[i]` was, sharing its blocks."""
        if self._table is None or self._manager is None:
            return
        batch = self._table.batch
        wrong = [row for row in rows if not -batch <= row < batch]
        if wrong or not rows:
            raise UnsupportedInputError(
                f"rows {wrong or rows} of a batch of {batch}: expected at least one, each from "
                f"{-batch} to {batch - 1}"
            )
        with self._manager.lock:
            self._detach_snapshots()
            self._manager.select_rows(self._table, rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search; blocks are shared, not copied."""
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times; blocks are shared, not copied."""
        self.select_rows([row for row in range(max(0, self.batch_size)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` (anything that indexes a dimension)."""
        if self._table is not None:
            self.select_rows(torch.arange(self._table.batch)[indices].tolist())

    def fork(self, owned: _Owned) -> "TieredLayer":
        """The same tokens in another cache; full blocks are shared."""
        layer = TieredLayer(owned, self._layer_idx)
        if self._table is not None and self._manager is not None:
            with self._manager.lock:
                layer._table = self._manager.blocks.fork(self._table)
            layer._manager = self._manager
            layer.dtype, layer.device = self.dtype, self.device
            layer.is_initialized = True
            owned.add(self._layer_idx, layer._manager, layer._table)
        return layer

    def _handles(self, num_new_tokens: int = 0) -> tuple[PagedStates, PagedStates]:
        manager, table = self._manager, self._table
        assert manager is not None and table is not None
        owned = self._owned
        snapshot = Snapshot(manager, table, owned.scan(manager), owned.reader, num_new_tokens)
        self._snapshots.add(snapshot)
        return PagedStates(snapshot, "keys"), PagedStates(snapshot, "values")

    def _detach_snapshots(self) -> None:
        """Before the table changes otherwise than by appending: handles keep what they saw."""
        for snapshot in list(self._snapshots):
            snapshot.detach()
        self._snapshots.clear()

    def _check_fits(
        self, table: BlockTable, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        if key_states.dim() != 4 or value_states.dim() != 4:
            _check_states(key_states, value_states)
        layout = table.layout
        expected = (table.batch, layout.kv_heads, layout.key_dim, layout.value_dim)
        batch, kv_heads, _, key_dim = key_states.shape
        got = (batch, kv_heads, key_dim, value_states.shape[3])
        if (
            got == expected
            and key_states.dtype == value_states.dtype == layout.dtype
            and key_states.device == self.device
            and value_states.shape[:3] == key_states.shape[:3]
        ):
            return
        _check_states(key_states, value_states)
        if batch != table.batch and table.num_tokens == 0:
            raise UnsupportedInputError(f"a batch of {batch} for an empty layer of {table.batch}")
        raise UnsupportedInputError(
            f"layer {self._layer_idx} holds (batch, kv_heads, key head_dim, value head_dim) = "
            f"{expected} in {layout.dtype} on {self.device}, but got {got} in {key_states.dtype} "
            f"on {key_states.device}: use one cache per model and batch (batch_repeat_interleave "
            "or batch_select_indices change the batch, reset() empties the cache)"
        )


class TieredCache(DynamicCache):
    """A `DynamicCache` whose keys and values lie in blocks over device, memory and disk.

        model.generate(**inputs, past_key_values=TieredCache())

    Exact: the same tokens as `DynamicCache`, and the same bits whatever the budgets are. Full
    attention layers are kept in blocks; sliding-window, linear and state-space layers, which are
    small, keep transformers' own classes (given `config`, as `DynamicCache` does).

    Args:
        config: the model's config; optional. With it windowed and hybrid layers get the cache
            they need, and a budget that is too small is found at the first token.
        device_bytes, disk_bytes, disk_dir, disk_io, block_tokens, staging_bytes: see
            `TieredCacheConfig`; sizes are int bytes, "4GiB", "1.5GB" or "auto".
        tiers: all of these as one `TieredCacheConfig` instead.

    Raises ConfigError for an impossible or unknown value, before anything is allocated.

    A cache may be deep-copied (full blocks are shared), closed (`close()` or `with`), and is
    closed when it is garbage-collected: no file, thread or memory stays.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        tiers: TieredCacheConfig | None = None,
        ddp_cache_data: Iterable[Any] | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **knobs: Any,
    ) -> None:
        if ddp_cache_data is not None or not (
            config is None or isinstance(config, PreTrainedConfig)
        ):
            raise ConfigError(
                f"config={type(config).__name__}: expected a model's config or None (the data that "
                "nn.DataParallel gathers is not supported: use one process per device)"
            )
        if offloading or offload_only_non_sliding:
            raise ConfigError(
                "offloading=True: a TieredCache offloads by itself; set device_bytes, disk_bytes"
            )
        if tiers is not None and knobs:
            raise ConfigError(f"give either tiers= or {', '.join(knobs)}, not both")
        tiers = tiers or TieredCacheConfig.from_arguments(**knobs)
        layer_types: list[str] = []
        if config is not None:
            layer_types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        pool = ManagerPool(tiers, expected_tables=layer_types.count(TIERED_LAYER_TYPE))
        self._own(pool)
        attention.enable()
        Cache.__init__(self, layers=[])
        self._num_layers = len(layer_types)
        for layer_idx, layer_type in enumerate(layer_types):
            if layer_type == TIERED_LAYER_TYPE:
                self.layers.append(TieredLayer(self._owned, layer_idx))
            else:
                layer_class = DYNAMIC_LAYER_TYPE_MAPPING[layer_type]
                self.layers.append(layer_class(**kwargs[layer_idx]))

    def _own(self, pool: ManagerPool) -> None:
        self._owned = _Owned(pool)
        self._finalizer = weakref.finalize(self, self._owned.release)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new tokens and return handles on all; see `TieredLayer.update`.

        Each layer once per forward, in order. When a layer has no room for the tokens, those that
        the layers before it took in the same forward are removed again.
        """
        layer_idx = self._check_layer(layer_idx)
        if layer_idx >= len(self.layers):
            self._add_layers(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, TieredLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        before = layer.get_seq_length()
        self._check_order(layer_idx, before)
        try:
            return layer.update(key_states, value_states, *args, **kwargs)
        except (OutOfBlocksError, TierIOError):
            num_tokens = key_states.shape[2]
            tiered = [one for one in self.layers[:layer_idx] if isinstance(one, TieredLayer)]
            for earlier in tiered:
                if earlier.get_seq_length() == before + num_tokens:
                    earlier.crop(-num_tokens)
            raise

    def _check_layer(self, layer_idx: int) -> int:
        """`layer_idx` as an int; raises UnsupportedInputError for anything that is no index."""
        try:
            index = operator.index(layer_idx)
        except TypeError:
            index = -1
        if index < 0:
            raise UnsupportedInputError(
                f"layer_idx={layer_idx!r}: expected the layer's number, an int from 0 up (a layer "
                "made without layer_idx cannot use a cache)"
            )
        return index

    def _check_order(self, layer_idx: int, num_tokens: int) -> None:
        """Raise UnsupportedInputError if the layer already has this forward's tokens."""
        first = self._owned.first_layer
        if first is None or first >= layer_idx or num_tokens == 0:
            return
        got = self.layers[first].get_seq_length()
        if num_tokens == got:
            raise UnsupportedInputError(
                f"out of order: layer {layer_idx} holds {num_tokens} tokens, as many as layer "
                f"{first}; expected fewer: every layer is updated once per forward, in order, "
                f"layer {first} first"
            )

    def _add_layers(self, layer_idx: int) -> None:
        if self._num_layers:
            raise UnsupportedInputError(
                f"layer {layer_idx} of a cache made for {self._num_layers} layers: this is another "
                "model's cache; make one with TieredCache(config=model.config)"
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(TieredLayer(self._owned, len(self.layers)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search; tiered layers share blocks instead of copying."""
        rows = beam_idx.tolist()  # once: on a device tensor this waits for the device
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.select_rows(rows)
            else:
                layer.reorder_cache(beam_idx)

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must not compile around a cache that moves blocks."""
        return False

    @property
    def is_closed(self) -> bool:
        return not self._finalizer.alive

    def stats(self) -> CacheStats:
        """What lies where and what it cost so far: a frozen snapshot."""
        pool = self._owned.pool
        tables = self._owned.tables
        first = tables[0] if tables else None
        return CacheStats(
            num_tokens=max((table.num_tokens for table in tables), default=0),
            batch=first.batch if first else 0,
            num_layers=len(tables),
            block_tokens=first.layout.block_tokens if first else self._block_tokens(),
            block_bytes=first.layout.num_bytes if first else 0,
            cold_blocks=sum(manager.num_cold_blocks() for manager in pool.managers),
            kernel=ops.backend(),
            tiers=pool.tier_stats(),
            counters=pool.counters(),
        )

    def _block_tokens(self) -> int:
        return self._owned.pool.config.block_tokens or 0

    def close(self) -> None:
        """Give memory, files and threads back; using the cache afterwards raises. Idempotent."""
        self._finalizer()

    def __enter__(self) -> "TieredCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        if self.is_closed:
            raise ClosedCacheError("this cache is closed: make a new TieredCache")
        fork = self.__class__.__new__(self.__class__)
        memo[id(self)] = fork
        for name, value in vars(self).items():
            if name not in ("_owned", "_finalizer", "layers"):
                setattr(fork, name, copy.deepcopy(value, memo))
        fork._own(self._owned.pool.share())
        fork._owned.reader = Reader(self._owned.reader)
        fork.layers = [
            layer.fork(fork._owned)
            if isinstance(layer, TieredLayer)
            else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        return fork

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{self.get_seq_length()} tokens"
        return f"{type(self).__name__}({state}, {len(self.layers)} layers)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.stats()}" if not self.is_closed else repr(self)


def _check_states(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    if (
        key_states.dim() != 4
        or value_states.dim() != 4
        or key_states.shape[:3] != value_states.shape[:3]
        or key_states.dtype != value_states.dtype
        or key_states.device != value_states.device
        or not key_states.is_floating_point()
    ):
        raise UnsupportedInputError(
            f"keys {_describe(key_states)} and values {_describe(value_states)}: expected two "
            "floating-point tensors [batch, kv_heads, tokens, head_dim] of one dtype and device"
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
