"""The layers of a `TieredCache`: full attention kept in blocks, alone or with linear states.

A `TieredLayer` turns the new keys and values of one layer into blocks and returns paged handles on
everything seen; which tier holds what is the business of the rooms below.
"""

import copy
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hf_tiered_cache.blocks.assembly import BlockMemory
from hf_tiered_cache.blocks.block_manager import BlockTable
from hf_tiered_cache.blocks.offload_manager import OffloadManager
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.finalizers import in_finalizer
from hf_tiered_cache.integration.forward_guard import ForwardGuard
from hf_tiered_cache.integration.paged_states import ModelIdentity, PagedStates, Snapshot
from hf_tiered_cache.integration.read_only import ReadOnlyTensor
from hf_tiered_cache.kernels import checks
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.store.files import OpenBlock

MAX_DEAD_SNAPSHOTS = 16  # references kept before those to dead snapshots are dropped


class OwnedTables:
    """The tables of one cache, layer by layer, dropped when the last holder of this object goes:
    the cache, shallow copies of it, its layers, and handles on their keys and values.

    `model` is the one that attends them, `selection` says what of them, `find_guard` is a weak
    reference to the guard of the cache.
    """

    def __init__(self, pool: BlockMemory) -> None:
        self.pool = pool
        self.model = ModelIdentity()
        self.selection = pool.selection
        self.was_assigned = False
        """Whether keys or values came otherwise than from a model, or layers were changed one by
        one, so that they need not hold the same tokens."""
        self._tables: dict[int, tuple[OffloadManager, BlockTable]] = {}
        # What follows from the tables; forgotten before they change, lest an interrupt keeps it.
        self._scans: dict[OffloadManager, list[BlockTable]] = {}
        self._first_layer: int | None = None
        self.find_guard: Callable[[], ForwardGuard | None] = _no_guard
        pool.add_owner(self._tables)
        self._finalizer = weakref.finalize(self, in_finalizer, pool.release, self._tables)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnedTables, (self.pool,)  # layers bring what they hold

    @property
    def is_closed(self) -> bool:
        """Whether the tables were given back; there is no way back."""
        return not self._finalizer.alive

    @property
    def tables(self) -> list[BlockTable]:
        """In layer order."""
        return [table for _, (_, table) in sorted(self._tables.items())]

    @property
    def first_layer(self) -> int | None:
        """The number of the first layer that has a table."""
        if self._first_layer is None:
            self._first_layer = min(self._tables, default=None)
        return self._first_layer

    def scan(self, manager: OffloadManager) -> list[BlockTable]:
        """The manager's tables in the order a forward reads them."""
        if manager not in self._scans:
            owners = sorted(self._tables.items())
            self._scans[manager] = [table for _, (owner, table) in owners if owner is manager]
        return self._scans[manager]

    def table(self, layer_idx: int) -> tuple[OffloadManager, BlockTable] | None:
        """A layer's manager and table; None where it has none."""
        return self._tables.get(layer_idx)

    def add(self, layer_idx: int, manager: OffloadManager, table: BlockTable) -> None:
        self._forget_order()
        self._tables[layer_idx] = (manager, table)

    def drop(self, layer_idx: int, manager: OffloadManager, table: BlockTable) -> None:
        """Drop a layer's table and what only it held. Repeatable."""
        self._forget_order()
        if self.holds(layer_idx, table):
            del self._tables[layer_idx]
        manager.drop_table(table)
        if not self._tables:
            self.model = ModelIdentity()  # an empty cache is free for another model
            self.was_assigned = False

    def replace(self, layer_idx: int, manager: OffloadManager, table: BlockTable) -> None:
        """Put a table in the place of a layer's own, which is kept as long as a forward that is
        under way may have to go back to it."""
        replaced = self._tables.get(layer_idx)
        self.add(layer_idx, manager, table)
        if replaced is not None:
            guard = self.find_guard()
            savepoint = None if guard is None else guard.savepoint
            if savepoint is None:
                replaced[0].drop_table(replaced[1])
            else:
                weakref.finalize(savepoint, replaced[0].abandon_table, replaced[1])

    def note_failure(self, error: BaseException) -> None:
        """Attention failed: where the forward is not watched, nobody else would tell the guard."""
        guard = self.find_guard()
        if guard is not None:
            guard.note_failure(type(error))

    def holds(self, layer_idx: int, table: BlockTable | None) -> bool:
        """Whether this is the layer's table."""
        return self._tables.get(layer_idx, (None, None))[1] is table

    def close(self) -> None:
        """Drop the tables, and the pool with the last fork. Idempotent, and repeatable should it be
        interrupted."""
        self._forget_order()
        if not self.is_closed:
            self.pool.release(self._tables)
            self._tables.clear()
            self._finalizer.detach()

    def _forget_order(self) -> None:
        self._scans.clear()
        self._first_layer = None


def _no_guard() -> None:
    return None


class Saved(NamedTuple):
    """A `TieredLayer` before a forward."""

    manager: OffloadManager | None
    table: BlockTable | None
    num_tokens: int
    assigned: dict[str, torch.Tensor]


class TieredLayer(CacheLayerMixin):
    """One full-attention layer of a `TieredCache`, kept in blocks."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    ATTRIBUTES = frozenset(
        [
            *("_owned", "_layer_idx", "_manager", "_table", "_snapshots", "_assigned"),
            *("is_initialized", "dtype", "device"),
        ]
    )

    def __init__(self, owned: OwnedTables, layer_idx: int) -> None:
        # Not calling super: it would set `keys` and `values`, which are views here.
        self._owned = owned
        self._layer_idx = layer_idx
        self._manager: OffloadManager | None = None
        self._table: BlockTable | None = None
        self._snapshots: list[weakref.ref[Snapshot]] = []  # some may have died
        # What was assigned to "keys" or "values" and does not fit the other yet.
        self._assigned: dict[str, torch.Tensor] = {}
        self.is_initialized = False

    @property
    def keys(self) -> torch.Tensor | None:
        """A handle on all keys `[batch, kv_heads, tokens, head_dim]`; None before the first.

        May be assigned: other keys, of any length, in the place of all. Until the values have the
        same batch, heads, length, dtype and device, the layer can only be read, assigned to and
        reset. Raises UnsupportedInputError for what can be no keys.
        """
        return self._states("keys")

    @keys.setter
    def keys(self, states: torch.Tensor) -> None:
        self._assign("keys", states)

    @property
    def values(self) -> torch.Tensor | None:
        """A handle on all values `[batch, kv_heads, tokens, head_dim]`; None before the first. May
        be assigned, as `keys`."""
        return self._states("values")

    @values.setter
    def values(self, states: torch.Tensor) -> None:
        self._assign("values", states)

    @property
    def batch_size(self) -> int:
        """Sequences in this layer. AttributeError before the first update: asked for its own, a
        cache skips layers without one."""
        if self._table is None:
            raise AttributeError("batch_size is not known before the first update")
        return self._table.batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Choose the blocks' shape and device from the first tensors and open an empty table."""
        _check_states(key_states, value_states)
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self._manager = self._owned.pool.manager(key_states, value_states, dtype)
        with self._manager.lock:
            self._table = self._manager.new_table(self._layer_idx, key_states.shape[0])
        self.dtype, self.device = dtype, key_states.device
        self._owned.add(self._layer_idx, self._manager, self._table)
        self.is_initialized = True

    def begin_with(
        self,
        layout: BlockLayout,
        device: torch.device,
        blocks: Sequence[OpenBlock],
        number: int,
        num_rows: int,
    ) -> None:
        """Let this layer, which is empty, hold the tokens of blocks of a store, the same in every
        row: cold ones, read when they are attended. `number`: of the extent that is its part."""
        pool = self._owned.pool
        manager = pool.manager_of(layout, device)
        stored = pool.store_tier(manager)
        with manager.lock:
            table = manager.new_table(self._layer_idx, num_rows)
            manager.adopt(table, stored.adopt(blocks, number))
            self._go_on_with(manager, table)

    def _states(self, part: str) -> torch.Tensor | None:
        if part in self._assigned:
            return self._assigned[part]
        if self._table is None:
            return None
        keys, values = self._handles()
        return keys if part == "keys" else values

    def _assign(self, part: str, states: Any) -> None:
        """Let `states` be all keys or all values from now on."""
        if (
            not isinstance(states, torch.Tensor)
            or states.dim() != 4
            or not states.is_floating_point()
        ):
            got = _describe(states) if isinstance(states, torch.Tensor) else repr(states)
            raise UnsupportedInputError(
                f"{part} of layer {self._layer_idx} = {got:.80}: expected a floating-point tensor "
                "[batch, kv_heads, tokens, head_dim]; reset() forgets keys and values"
            )
        self._owned.was_assigned = True
        dense = states.materialize() if isinstance(states, ReadOnlyTensor) else states.detach()
        assigned = {**self._assigned, part: dense}
        keys, values = (assigned.get(one, self._states(one)) for one in ("keys", "values"))
        if keys is None or values is None or not _are_alike(keys, values):
            self._assigned = assigned
            return
        keys, values = (
            one.materialize() if isinstance(one, PagedStates) else one for one in (keys, values)
        )
        manager = self._owned.pool.manager(keys, values, keys.dtype)
        with manager.lock:
            table = manager.new_table(self._layer_idx, keys.shape[0])
            try:
                manager.append(table, keys, values)
            except BaseException:
                manager.drop_table(table)
                raise
            self._go_on_with(manager, table)
        self._assigned = {}

    def _go_on_with(self, manager: OffloadManager, table: BlockTable) -> None:
        """Hold another table from now on."""
        with (self._manager or manager).lock:
            self._detach_snapshots()
            self._manager, self._table = manager, table
            self.dtype, self.device = manager.layout.dtype, manager.device_tier.device
            self.is_initialized = True
            self._owned.replace(self._layer_idx, manager, table)  # last: the old table goes

    def check_whole(self) -> None:
        """Raise UnsupportedInputError if keys were assigned that do not fit the values, or values
        that do not fit the keys."""
        if self._assigned:
            keys, values = (
                "missing" if one is None else _describe(one) for one in (self.keys, self.values)
            )
            raise UnsupportedInputError(
                f"layer {self._layer_idx} was half assigned: its keys are {keys}, its values "
                f"{values}; assign the other as well, or reset() the layer"
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens `[batch, kv_heads, tokens, head_dim]`; return handles on all.

        Keys and values of several dtypes, as autocast brings them, are held in the one that all of
        them can be promoted to, as by `torch.cat` in `DynamicLayer`.

        Raises, before anything changed: UnsupportedInputError for another shape, dtype or device
        than this layer holds, OutOfBlocksError when no tier has room, ClosedCacheError.
        """
        if self._assigned:
            self.check_whole()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            try:
                return self.update(key_states, value_states)
            except BaseException:
                self.drop_blocks()
                raise
        manager, table = self._manager, self._table
        assert manager is not None and table is not None
        if table.num_tokens == 0 and not self._fits(key_states, value_states):
            self.drop_blocks()  # nothing is held: an empty layer takes any batch
            return self.update(key_states, value_states)
        if not key_states.dtype == value_states.dtype == self.dtype:
            key_states, value_states = self._in_one_dtype(key_states, value_states)
            manager, table = self._manager, self._table
            assert manager is not None and table is not None
        needs_grad = (
            key_states.requires_grad or value_states.requires_grad
        ) and torch.is_grad_enabled()
        if needs_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        try:
            with manager.lock:
                manager.append(table, key_states, value_states)
        except UnsupportedInputError as error:
            raise self._misfit(key_states, value_states) from error
        keys, values = self._handles(num_new_tokens=key_states.shape[2])
        if needs_grad:
            keys, values = keys.refuse_backward(), values.refuse_backward()
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys a forward with `query_length` new tokens will attend."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        if "keys" in self._assigned:
            return self._assigned["keys"].shape[2]
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
        self.drop_blocks()
        self._assigned = {}

    def saved(self) -> "Saved":
        """What `restore` needs to come back here from whatever was appended or assigned later."""
        table = self._table
        num_tokens = 0 if table is None else table.num_tokens
        return Saved(self._manager, table, num_tokens, self._assigned)

    def restore(self, saved: "Saved") -> None:
        """Take back what was appended or assigned since `saved()`. Repeatable."""
        manager, table, num_tokens, self._assigned = saved
        if num_tokens == 0:
            if table is not self._table:
                self.drop_blocks()  # there was no table, or another one for another batch
            else:
                TieredLayer._keep(self, 0)
        elif self._owned.holds(self._layer_idx, table):
            TieredLayer._keep(self, num_tokens)
        else:  # replaced since: what was kept of it is dropped with the savepoint
            assert manager is not None and table is not None
            with manager.lock:
                fork = manager.fork(table)
                manager.truncate(fork, num_tokens)
                self._go_on_with(manager, fork)

    def drop_blocks(self, except_for: Collection[BlockTable | None] = ()) -> None:
        """Forget keys and values, and the shape they had. except_for: tables that another layer
        goes on with."""
        if self._table in except_for:
            return
        if self._table is not None and self._manager is not None:
            self.is_initialized = False  # first: then whatever an interrupt leaves is replaced
            with self._manager.lock:
                self._detach_snapshots()
                self._owned.drop(self._layer_idx, self._manager, self._table)
            self._manager = self._table = None

    def _keep(self, num_tokens: int) -> None:
        """Keep the first tokens."""
        manager, table = self._manager, self._table
        if table is not None and manager is not None and num_tokens < table.num_tokens:
            with manager.lock:
                self._detach_snapshots()
                manager.truncate(table, num_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a count at most 0, as in transformers)."""
        if tokens_to_remove > 0:
            raise UnsupportedInputError(
                f"crop({tokens_to_remove}): expected 0 or a negative count of tokens to remove"
            )
        if tokens_to_remove == 0:
            return
        self.check_whole()
        self._owned.was_assigned = True
        self._keep(max(0, self.get_seq_length() + tokens_to_remove))

    def select_rows(self, rows: list[int]) -> None:
        """Make sequence `i` what sequence `rows[i]` was, sharing its blocks."""
        self.check_whole()
        if self._table is None or self._manager is None or self._table.num_tokens == 0:
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
        self._owned.was_assigned = True
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times; blocks are shared, not copied."""
        self._owned.was_assigned = True
        self.select_rows([row for row in range(self._num_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` (anything that indexes a dimension), in that order."""
        if self._num_rows:
            self._owned.was_assigned = True
            self.select_rows(rows_of(indices, self._num_rows))

    @property
    def _num_rows(self) -> int:
        return 0 if self._table is None else self._table.batch

    def fork(self, owned: OwnedTables) -> "TieredLayer":
        """The same tokens in another cache; full blocks are shared."""
        layer = TieredLayer(owned, self._layer_idx)
        layer._assigned = self._assigned
        if self._table is not None and self._manager is not None:
            with self._manager.lock:
                layer._table = self._manager.fork(self._table)
            layer._manager = self._manager
            layer.dtype, layer.device = self.dtype, self.device
            layer.is_initialized = True
            owned.add(self._layer_idx, layer._manager, layer._table)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: keys and values as dense tensors, and all that is not kept in blocks."""
        state = {name: it for name, it in vars(self).items() if name not in TieredLayer.ATTRIBUTES}
        held = () if self._table is None else tuple(one.materialize() for one in self._handles())
        own = (self._owned, self._layer_idx, held, self._assigned)
        return {"tiered": own, **state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owned, layer_idx, held, assigned = state.pop("tiered")
        TieredLayer.__init__(self, owned, layer_idx)
        self.__dict__.update(state)
        if held:
            self.keys, self.values = held
        self._assigned = assigned

    def __copy__(self) -> "TieredLayer":
        return self.fork(OwnedTables(self._owned.pool))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredLayer":
        return self.__copy__()  # what is shared never changes

    def _handles(self, num_new_tokens: int = 0) -> tuple[PagedStates, PagedStates]:
        manager, table = self._manager, self._table
        assert manager is not None and table is not None
        snapshot = Snapshot(manager, table, self._owned, num_new_tokens)
        if len(self._snapshots) >= MAX_DEAD_SNAPSHOTS:
            self._snapshots = [known for known in self._snapshots if known() is not None]
        self._snapshots.append(weakref.ref(snapshot))
        return snapshot.handles()

    def _detach_snapshots(self) -> None:
        """Before the table changes otherwise than by appending: handles keep what they saw."""
        for known in self._snapshots:
            if (snapshot := known()) is not None:
                snapshot.detach()
        self._snapshots.clear()

    def _in_one_dtype(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values in the dtype of this layer, which becomes a wider one if need be."""
        table = self._table
        assert table is not None
        _check_states(key_states, value_states)
        held = table.layout.dtype
        new = torch.promote_types(key_states.dtype, value_states.dtype)
        wider = torch.promote_types(new, held)
        # Where autocast does not see to it, the queries would have another dtype than the keys.
        is_too_narrow = wider == held != new
        if is_too_narrow and not torch.is_autocast_enabled(key_states.device.type):
            raise self._misfit(key_states, value_states)
        if _shape(key_states, value_states) != self._shape or key_states.device != self.device:
            raise self._misfit(key_states, value_states)
        if wider != held:
            self._widen(wider)
        return key_states.to(wider), value_states.to(wider)

    def _widen(self, dtype: torch.dtype) -> None:
        """Hold all tokens in a wider dtype from now on: without loss, and chunk by chunk."""
        narrow, old, batch = self._manager, self._table, self._num_rows
        assert narrow is not None and old is not None
        snapshot = Snapshot(narrow, old, self._owned)
        with narrow.lock:
            keys, values = next(snapshot.chunks("keys", "values"))
            wide = self._owned.pool.manager(keys, values, dtype)
            with wide.lock:
                table = wide.new_table(self._layer_idx, batch)
                try:
                    for keys, values in snapshot.chunks("keys", "values"):
                        wide.append(table, keys.to(dtype), values.to(dtype))
                except BaseException:
                    wide.drop_table(table)
                    raise
            self._go_on_with(wide, table)

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        assert self._table is not None
        try:
            dtype = torch.promote_types(key_states.dtype, value_states.dtype)
            keys, values = key_states.to(dtype), value_states.to(dtype)
            checks.check_new_tokens(keys, values, self._table.layout, self._table.batch)
        except UnsupportedInputError:
            return False
        return key_states.device == self.device

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        assert self._table is not None
        layout = self._table.layout
        return self._table.batch, layout.kv_heads, layout.key_dim, layout.value_dim

    def _misfit(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> UnsupportedInputError:
        """What does not fit, in the words of a cache's user."""
        _check_states(key_states, value_states)
        got = _shape(key_states, value_states)
        return UnsupportedInputError(
            f"layer {self._layer_idx} holds (batch, kv_heads, key head_dim, value head_dim) = "
            f"{self._shape} in {self.dtype} on {self.device}, but got {got} in {key_states.dtype} "
            f"on {key_states.device}: use one cache per model and batch (batch_repeat_interleave "
            "or batch_select_indices change the batch, reset() empties the cache)"
        )


class TieredHybridLayer(TieredLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with full attention, kept in blocks, and linear states, kept as transformers does
    (Falcon-H1, Zamba2)."""

    def __init__(self, owned: OwnedTables, layer_idx: int, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        TieredLayer.__init__(self, owned, layer_idx)

    @classmethod
    def around(
        cls, layer: TieredLayer | LinearAttentionLayer, owned: OwnedTables, layer_idx: int
    ) -> "TieredHybridLayer":
        """What `layer` holds of the one kind, with room for the other."""
        hybrid = cls(owned, layer_idx)
        hybrid.__dict__.update(vars(layer))
        return hybrid

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return LinearAttentionCacheLayerMixin.is_croppable.fget(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Positional arguments come from attention, keywords from the linear states (as in
        transformers' own class)."""
        if args:
            TieredLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        TieredLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from both; raises RuntimeError unless past states were recorded."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TieredLayer.crop(self, tokens_to_remove)

    def select_rows(self, rows: list[int]) -> None:
        """Make sequence `i` what sequence `rows[i]` was."""
        TieredLayer.select_rows(self, rows)
        LinearAttentionLayer.reorder_cache(self, torch.tensor(rows))

    def fork(self, owned: OwnedTables) -> "TieredHybridLayer":
        """The same tokens and states in another cache; full blocks are shared, states copied."""
        tiered = TieredLayer.fork(self, owned)
        hybrid = TieredHybridLayer.around(tiered, owned, self._layer_idx)
        for name in vars(self).keys() - vars(tiered).keys():
            setattr(hybrid, name, copy.deepcopy(getattr(self, name)))
        return hybrid


def rows_of(indices: Any, batch: int) -> list[int]:
    """The rows of a batch that `indices` select (whatever may stand in the first place of
    `tensor[indices, ...]`). Raises UnsupportedInputError where that leaves no batch."""
    try:
        rows = torch.arange(batch)[indices, ...]
    except (IndexError, TypeError) as error:
        raise UnsupportedInputError(f"indices {indices!r} of a batch of {batch}: {error}") from None
    if rows.dim() != 1 or not len(rows):
        raise UnsupportedInputError(
            f"indices {indices!r} of a batch of {batch} leave {list(rows.shape)} sequences: "
            "expected a batch of at least one"
        )
    return rows.tolist()


def _shape(key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[int, int, int, int]:
    """(batch, kv_heads, key head_dim, value head_dim)"""
    batch, kv_heads, _, key_dim = key_states.shape
    return batch, kv_heads, key_dim, value_states.shape[3]


def _check_states(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    if (
        key_states.dim() != 4
        or value_states.dim() != 4
        or key_states.shape[:3] != value_states.shape[:3]
        or key_states.device != value_states.device
        or not (key_states.is_floating_point() and value_states.is_floating_point())
    ):
        raise UnsupportedInputError(
            f"keys {_describe(key_states)} and values {_describe(value_states)}: expected two "
            "floating-point tensors [batch, kv_heads, tokens, head_dim] on one device"
        )


def _are_alike(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether these can be the keys and values of one layer."""
    return (keys.shape[:3], keys.dtype, keys.device) == (
        values.shape[:3],
        values.dtype,
        values.device,
    )


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
