"""`TieredCache`: transformers' Cache API in the words of this package.

The words and signatures of transformers end here, in `cache_layers.py` and in `attention.py`.
"""

import contextlib
import copy
import html
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Never

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hf_tiered_cache.blocks.assembly import BlockMemory
from hf_tiered_cache.blocks.selection import RESIDENT_ONLY, SelectionPolicy
from hf_tiered_cache.config import NO_PACKING, TieredCacheConfig
from hf_tiered_cache.errors import (
    CacheInUseError,
    ClosedCacheError,
    ConfigError,
    OutOfBlocksError,
    UnsupportedInputError,
)
from hf_tiered_cache.integration import attention, forwards, planning, saved, untiered
from hf_tiered_cache.integration.cache_layers import (
    OwnedTables,
    TieredHybridLayer,
    TieredLayer,
    rows_of,
)
from hf_tiered_cache.integration.compat import DummyLayer
from hf_tiered_cache.integration.forward_guard import RESET, ForwardGuard
from hf_tiered_cache.integration.paged_states import ModelIdentity
from hf_tiered_cache.integration.savepoint import Savepoint
from hf_tiered_cache.integration.stored_prefix import StoredPrefix, one_row, restore_layers
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.observe.metrics import CacheStats, Counters, SpeculationCounters
from hf_tiered_cache.planner.prediction import Plan
from hf_tiered_cache.sizes import AUTO
from hf_tiered_cache.store.block_store import BlockStore


class TieredCache(DynamicCache):
    """A `DynamicCache` whose keys and values lie in blocks over device, memory and disk.

        model.generate(**inputs, past_key_values=TieredCache())

    Exact: the same tokens as `DynamicCache`, and the same bits whatever the budgets are. Full
    attention layers are kept in blocks; sliding-window, linear and state-space layers, which are
    small, keep transformers' own classes (given `config`, as `DynamicCache` does).

    Args:
        config: the model's config; optional. With it windowed and hybrid layers get the cache
            they need, and a budget that is too small is found at the first token.
        device_bytes: on each compute device, blocks and staging together. Sizes are int bytes,
            "4GiB", "1.5GB" or "auto", a share of what is free.
        host_bytes: of host memory between device and disk; 0: none. "auto": none on the CPU. What
            passes between a GPU and the disk takes up to 64 MiB of pinned memory beside it.
        disk_bytes: of the disk tier; 0: none.
        disk_dir: its folder; default: $HF_TIERED_CACHE_DIR, else <HF_HOME>/tiered_cache.
        disk_io: "direct" past the page cache, "buffered" through it, or "auto".
        block_tokens: tokens in a block, a power of two; default: 64 KiB of keys for one head.
        staging_bytes: of device_bytes, for cold blocks passing through.
        cpu_share: share, 0 to 1, of the blocks in host memory that the CPU attends there, or
            "auto".
        extra_tiers: tiers of your own between host memory and disk, from the top down, by name or
            "module:Class", with their bytes (docs/extending.md).
        packing: what blocks are encoded with on disk, losslessly: "none", a codec by name or of
            your own as "module:Class" (docs/extending.md), "auto": "bf16_12bit" for bfloat16 where
            compiled kernels run.
        demotion: which blocks leave a rung first: "by_age", "sinks_and_recent" (for `speculate`),
            or a policy of your own as "module:Class" (docs/extending.md).
        attend: what attention reads: "all", or approximately "resident_only" (what is on the
            device, without loads), or a selection policy of your own (docs/extending.md).
        store: a `BlockStore`: `restore` finds prefixes there, `publish` puts full blocks there
            (docs/reuse.md).
        tiers: all of these as one `TieredCacheConfig` instead; none may then be asked for beside.

    Raises ConfigError for an impossible or unknown value, before anything is allocated.

    A cache may be deep-copied (full blocks are shared), pickled (as its knobs and dense keys and
    values, which are in memory once while it is saved or loaded), closed (`close()` or `with`), and
    is closed when nobody refers to it, its layers or their keys and values any more: no file,
    thread or memory stays.

    A forward through it raises OutOfBlocksError when the tiers are full (before it stores anything
    more), TierIOError when blocks cannot be stored or loaded, CacheInUseError when another thread
    is in the middle of one, ClosedCacheError after `close()`, BackwardError for a gradient. After
    Ctrl-C in the middle of `crop`, a reordering or `reset` it raises TornCacheError until `reset`.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        device_bytes: int | str = AUTO,
        host_bytes: int | str = AUTO,
        disk_bytes: int | str = AUTO,
        disk_dir: str | os.PathLike[str] | None = None,
        disk_io: str = AUTO,
        block_tokens: int | None = None,
        staging_bytes: int | str = AUTO,
        cpu_share: float | str = AUTO,
        extra_tiers: Mapping[str, int | str] | None = None,
        packing: str = NO_PACKING,
        demotion: str = "by_age",
        attend: str = "all",
        store: BlockStore | None = None,
        tiers: TieredCacheConfig | None = None,
        ddp_cache_data: Iterable[Any] | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **unknown: Never,
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
        for name in unknown:
            raise TieredCacheConfig.unknown(name)
        given = TieredCacheConfig(
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            disk_dir=disk_dir,
            disk_io=disk_io,
            block_tokens=block_tokens,
            staging_bytes=staging_bytes,
            cpu_share=cpu_share,
            extra_tiers=extra_tiers,
            packing=packing,
            demotion=demotion,
            attend=attend,
        )
        if tiers is not None and given.asked():
            raise ConfigError(f"give either tiers= or {', '.join(given.asked())}, not both")
        tiers = tiers or given
        layers = DynamicCache(config=config).layers
        tiered_types = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
        num_tiered = sum(type(layer) in tiered_types for layer in layers)
        if store is not None and not isinstance(store, BlockStore):
            raise ConfigError(f"store={store!r}: expected a BlockStore or None")
        self._stored = None if store is None else StoredPrefix(store)
        pool = BlockMemory(tiers, expected_tables=num_tiered, store=store)
        self._own(pool)
        self._allowed(pool.selection)
        self.speculation = SpeculationCounters()
        attention.enable()
        Cache.__init__(self, layers=layers)
        self._num_layers = len(layers)  # as the config told, or 0
        self._records_past = False
        self._holds_approximate = False  # tokens that follow from what a selection left out
        self.saved_ids: torch.Tensor | None = None  # of what `from_pretrained` read
        for layer_idx, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[layer_idx] = TieredLayer(self._owned, layer_idx)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                layers[layer_idx] = TieredHybridLayer(
                    self._owned, layer_idx, layer.number_of_states
                )
        untiered.warn_of_growing(layers)

    def _own(self, pool: BlockMemory) -> None:
        self._owned = OwnedTables(pool)
        self._guard = ForwardGuard()
        self._owned.find_guard = weakref.ref(self._guard)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new tokens and return handles on all; see `TieredLayer.update`.

        Each layer once per forward, in order. When the forward fails, here or anywhere else, all
        layers are put back to what they were before it.
        """
        if torch.compiler.is_compiling():
            return self._update_uncompiled(key_states, value_states, layer_idx, *args, **kwargs)
        if type(layer_idx) is not int or layer_idx < 0:
            layer_idx = self._check_layer(layer_idx)
        with self._in_forward(layer_idx, brings_tokens=True):
            layer = self._layer_with_tokens(layer_idx)
            if isinstance(layer, TieredLayer) and key_states.shape[-2] > 0:
                self._check_order(layer_idx, layer)
            if not (self._owned.selection.is_exact or self._is_drafting):
                self._holds_approximate = True
            try:
                return layer.update(key_states, value_states, *args, **kwargs)
            except OutOfBlocksError:
                # What waits to be written to the store keeps its blocks.
                store = self.store
                if store is None or not store.publisher.drop(self._owned.pool):
                    raise
                return layer.update(key_states, value_states, *args, **kwargs)

    # The slots of a moment are no constants: a compiled model breaks its graph here.
    _update_uncompiled = torch.compiler.disable(update)

    @property
    def store(self) -> BlockStore | None:
        """Where it finds prefixes and puts full blocks."""
        return None if self._stored is None else self._stored.store

    def restore(self, input_ids: Any, model: PreTrainedModel, salt: bytes | None = None) -> int:
        """Begin with the longest prefix of `input_ids` that the store has of this model; the number
        of its tokens, a multiple of `block_tokens`. `generate` then computes only the rest.

        input_ids: ints `[tokens]`, or `[rows, tokens]` with equal rows, which then share what is
        found. At least one token is left to be computed. salt: of this cache from now on, and of
        its forks, in place of the store's. Nothing is loaded before it is attended;
        a block whose bytes turn out to be wrong is a TierIOError of the forward that reads it, and
        is not found again. Raises UnsupportedInputError for other ids, or where the cache holds
        tokens, ConfigError where it has no store.
        """
        stored = self._stored_prefix()
        ids, num_rows = one_row(input_ids)
        if self.get_seq_length():
            raise UnsupportedInputError(
                f"restore() into a cache that holds {self.get_seq_length()} tokens: reset() it, or"
                " make a new one"
            )
        with self._alone():
            stored.reset()
            stored.salt = stored.salt if salt is None else salt
            found = stored.find(ids, model, self.layers, self._block_tokens() or None)
            num_tokens = restore_layers(found, self.layers, model, num_rows)
            stored.begins_with(ids[:num_tokens].expand(num_rows, -1))
        return num_tokens

    def publish(self, input_ids: Any = None, model: PreTrainedModel | None = None) -> int:
        """Hand the full blocks that the store lacks to its publishing thread; the number of blocks.
        `store.flush()` waits until they are written.

        Which tokens are held is known from the forwards that brought them; input_ids: compared with
        that (as far as it goes), where given. model: see to it that its weights are still those the
        tokens were computed with. Blocks of tokens that came otherwise than as plain ids (padding,
        embeddings, positions of one's own) are not published: counted in `store.stats()`, and told
        once. Raises UnsupportedInputError for other ids, ConfigError without a store.
        """
        stored = self._stored_prefix()
        self._check_no_draft("publish()")
        with self._alone():
            if input_ids is not None:
                stored.check_same(input_ids)
            published = stored.published(self.layers, self._owned, model)
        return 0 if published is None else published.submit()

    def block_names(self) -> tuple[bytes, list[bytes]] | None:
        """(the model's namespace, the keys of the full blocks of the first row) as the store names
        them; None where they have no name."""
        return self._stored_prefix().names(self.layers, self._owned)

    def before_forward(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], None] | None:
        """A forward of `model` begins; what is to be done when it went through.

        Assisted decoding of transformers (5.17 to 5.23, with any cache) gives the whole sequence
        once more to a model whose cache holds its beginning: that is cut off here. Raises
        UnsupportedInputError where it cannot be.
        """
        stored = self._stored
        if stored is None or not self._owned.selection.is_exact:  # a draft, which leaves nothing
            return None
        held = self.get_seq_length()
        stored.cut_what_is_held(kwargs, held)
        if stored.is_publishing and held:
            self.publish()  # what was held when the next forward begins will stay
        return stored.told(model, args, kwargs, held).note

    @property
    def restored_tokens(self) -> int:
        """Of the tokens held, those that came from the store."""
        return 0 if self._stored is None else self._stored.restored_tokens

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """While the `with` block runs, full blocks are published when the next forward begins, and
        the last ones behind it, unless it raises."""
        stored = self._stored_prefix()
        stored.begin_publishing()
        try:
            yield
            self.publish()
        finally:
            stored.is_publishing = False

    def _stored_prefix(self) -> StoredPrefix:
        self._check_open()
        if self._stored is None:
            raise ConfigError("this cache has no store: TieredCache(config, store=BlockStore(...))")
        return self._stored

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

    def _check_order(self, layer_idx: int, layer: TieredLayer) -> None:
        """Raise UnsupportedInputError if the layer already has this forward's tokens."""
        first = self._owned.first_layer
        if first is None or first >= layer_idx:
            return
        num_tokens = layer.get_seq_length()
        if num_tokens and num_tokens == self.layers[first].get_seq_length():
            raise UnsupportedInputError(
                f"out of order: layer {layer_idx} holds {num_tokens} tokens, as many as layer "
                f"{first}; expected fewer: every layer is updated once per forward, in order, "
                f"layer {first} first"
            )

    def _layer_with_tokens(self, layer_idx: int) -> Any:
        """The layer for an `update`; made, or made to hold tokens too, where no config told."""
        if layer_idx >= len(self.layers):
            self._add_layers(layer_idx)
        layer = self.layers[layer_idx]
        if not self._num_layers and not isinstance(layer, TieredLayer):
            if isinstance(layer, DummyLayer):
                layer = TieredLayer(self._owned, layer_idx)
            else:
                layer = TieredHybridLayer.around(layer, self._owned, layer_idx)
            self.layers[layer_idx] = layer
        return layer

    def _layer_with_states(self, layer_idx: int, state_idx: int = 0) -> None:
        """See to it that the layer can keep linear states, where no config told."""
        if self._num_layers:
            return
        if layer_idx >= len(self.layers):
            self._add_layers(layer_idx)
        layer = self.layers[layer_idx]
        if isinstance(layer, DummyLayer) or not isinstance(layer, LinearAttentionCacheLayerMixin):
            if isinstance(layer, TieredLayer):
                layer = TieredHybridLayer.around(layer, self._owned, layer_idx)
            else:
                layer = LinearAttentionLayer()
            layer.record_past = self._records_past
            self.layers[layer_idx] = layer
        if state_idx >= layer.number_of_states:
            more = LinearAttentionLayer(number_of_states=state_idx + 1)
            for name, states in vars(more).items():
                if isinstance(states, dict):
                    setattr(layer, name, states | getattr(layer, name))
            layer.number_of_states = state_idx + 1

    def _add_layers(self, layer_idx: int) -> None:
        """Up to `layer_idx`, empty: what they hold is seen when they are used. One that never is
        (without attention) stays transformers' placeholder."""
        if self._num_layers:
            raise UnsupportedInputError(
                f"layer {layer_idx} of a cache made for {self._num_layers} layers: this is another "
                "model's cache; make one with TieredCache(config=model.config)"
            )
        while len(self.layers) <= layer_idx:
            placeholder = DummyLayer()
            placeholder.is_initialized = False  # Mllama would read its keys
            self.layers.append(placeholder)

    def _last_layer(self) -> int:
        """The layer that ends a forward; in a first one without config, as the model tells."""
        last = max(
            (i for i, it in enumerate(self.layers) if not isinstance(it, DummyLayer)), default=0
        )
        if self._num_layers or self._guard.has_seen_all:
            return last
        return max(last, self._owned.model.num_layers - 1)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The convolution state of a linear layer, None before the first."""
        with self._in_forward(layer_idx):
            self._layer_with_states(layer_idx, state_idx)
            return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Store a linear layer's new convolution states; transformers' own layers keep them."""
        with self._in_forward(layer_idx):
            self._layer_with_states(layer_idx, state_idx)
            return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The recurrent state of a linear layer, None before the first."""
        with self._in_forward(layer_idx):
            self._layer_with_states(layer_idx, state_idx)
            return super().get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Store a linear layer's new recurrent state; transformers' own layers keep it."""
        with self._in_forward(layer_idx):
            self._layer_with_states(layer_idx, state_idx)
            return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Store the new keys `[batch, tokens, index_head_dim]` by which a layer chooses what it
        attends, and return all; transformers' own layers keep them.

        Raises UnsupportedInputError where no config told that the layer would have any.
        """
        with self._in_forward(layer_idx):
            if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], TieredLayer):
                raise UnsupportedInputError(
                    f"layer {layer_idx} chooses what it attends by an indexer, which a cache must "
                    "know before: make it with TieredCache(config=model.config)"
                )
            return super().update_indexer(indexer_key_states, layer_idx)

    def activate_past_recording(self) -> None:
        """Let linear and windowed layers keep what `crop` may have to bring back."""
        self._records_past = True  # also of layers still to be made
        super().activate_past_recording()

    def end_past_recording(self) -> None:
        """Let linear and windowed layers keep no more than they need again."""
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            self.crop(0)  # to their own size
        self._records_past = False
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether a layer keeps what `crop` may have to bring back."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return getattr(layer, "record_past", False)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by a layer; by default by the first one that holds any."""
        self._guard.join(self._savepoint)
        if forwards.current() is None:
            forwards.note_measured(self)
        if 0 < layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], DummyLayer):
            return 0  # it may still come to hold some: transformers would refuse
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the keys that `query_length` new tokens of a layer will attend."""
        self._guard.join(self._savepoint)
        return super().get_mask_sizes(query_length, layer_idx)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing: loads run ahead of attention by themselves."""

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing: blocks are demoted one by one as room is needed."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every layer (a count at most 0).

        Raises before anything changed: UnsupportedInputError for another count, and what
        transformers' own layers raise when they cannot go back.
        """
        if tokens_to_remove > 0:
            raise UnsupportedInputError(
                f"crop({tokens_to_remove}): expected 0 or a negative count of tokens to remove"
            )
        with self._alone("crop"):
            self._check_whole()
            was_assigned = self._owned.was_assigned
            # Those that may refuse come first.
            for layer in sorted(self.layers, key=lambda layer: type(layer) is TieredLayer):
                layer.crop(tokens_to_remove)
            self._owned.was_assigned = was_assigned  # all layers were cropped alike
            if self._stored is not None:
                self._stored.crop(super().get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search; tiered layers share blocks instead of copying."""
        self._select_rows(beam_idx.tolist())  # once: on a device tensor this waits for the device

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times; tiered layers share blocks instead of copying."""
        batch = self._num_rows()
        self._select_rows([row for row in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` (anything that indexes a dimension), in that order."""
        if batch := self._num_rows():
            self._select_rows(rows_of(indices, batch))

    def _select_rows(self, rows: list[int]) -> None:
        with self._alone("reorder_cache"):
            self._check_whole()
            if not self._num_rows():
                return  # as every layer of transformers does
            index = torch.tensor(rows, dtype=torch.long)
            for layer in sorted(self.layers, key=lambda layer: not isinstance(layer, TieredLayer)):
                if isinstance(layer, TieredLayer):
                    layer.select_rows(rows)  # the first one raises if a row does not exist
                else:
                    layer.reorder_cache(index)
            if self._stored is not None:
                self._stored.select(rows)

    def _check_whole(self) -> None:
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.check_whole()

    def _num_rows(self) -> int:
        """Sequences held by whichever layer holds any; 0 while none does."""
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                if layer.get_seq_length():
                    return layer.batch_size
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                for state in states:
                    if state is not None:
                        return state.shape[0]
            elif not isinstance(layer, DummyLayer) and layer.get_seq_length():
                return layer.keys.shape[0]
        return 0

    def reset(self) -> None:
        """Forget everything; the cache is free for another batch and model."""
        self._guard.give_up()
        with self._alone(RESET):
            super().reset()
            self._holds_approximate = False
            if self._stored is not None:
                self._stored.reset()

    def _in_forward(self, layer_idx: int, brings_tokens: bool = False) -> ForwardGuard:
        """While a forward is at this layer. Raises CacheInUseError."""
        return self._guard.admit(layer_idx, self._last_layer, self._savepoint, brings_tokens)

    def _alone(self, change: str | None = None) -> ForwardGuard:
        """While all layers are read, or changed by `change`, at once. Raises CacheInUseError."""
        return self._guard.admit_alone(self._last_layer, change)

    def attending(self, selection: str) -> "_Attending":
        """Let attention read what this selection policy chooses (`attend=`) in forwards through
        this cache within the `with` block. Raises ConfigError for an unknown one.

        Tensors that an operation of torch builds of a layer's keys and values stay whole. What the
        forwards append follows from what they attended, so a cache with a store refuses a policy
        that is not exact (ConfigError).
        """
        return _Attending(self, self._allowed(SelectionPolicy.by_name(selection)()))

    def _allowed(self, selection: SelectionPolicy) -> SelectionPolicy:
        """The policy; raises ConfigError where what it leads to would be put into a store."""
        if self._stored is not None and not selection.is_exact:
            raise ConfigError(
                f"attend={selection.name!r} with a store: what approximate attention leads to must"
                " not be found by others; leave out store= or attend="
            )
        return selection

    def drafting(self) -> "_Drafting":
        """Let forwards within the `with` block guess: they attend only what is on the device, load
        nothing, and what they append is dropped at the end. `speculate` drafts so.

        Meanwhile copying, pickling, saving and publishing raise CacheInUseError.
        """
        return _Drafting(self, RESIDENT_ONLY)

    @property
    def _is_drafting(self) -> bool:
        return self._owned.selection is RESIDENT_ONLY  # `attending` makes another one

    def _check_no_draft(self, act: str) -> None:
        if self._is_drafting:
            raise CacheInUseError(
                f"{act} while the cache is drafting: its last tokens are guesses; leave the"
                " drafting() block first"
            )

    def _savepoint(self) -> Savepoint:
        return Savepoint(self.layers, self._owned)

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must not compile around a cache that moves blocks."""
        return False

    @property
    def is_closed(self) -> bool:
        """Whether `close()` was called; there is no way back."""
        return self._owned.is_closed

    def plan(
        self, model: PreTrainedModel, context: int | None = None, *, chunk: int = planning.CHUNK
    ) -> Plan:
        """Predict, by rates measured now in some seconds, how fast `model` prefills and decodes
        behind `context` tokens (default: those held) with the budgets of this cache, which is not
        touched. `print(describe(plan))`: `hf_tiered_cache.planner.report`.

        chunk: tokens of a prefill forward. Raises OutOfBlocksError for a context that would not
        fit, ConfigError for budgets that are not to be had a second time, UnsupportedInputError for
        a model that cannot be planned for, or where the cache is empty and no context is given.
        """
        self._check_open()
        context = context or self.get_seq_length()
        if not context:
            raise UnsupportedInputError("an empty cache: give plan(model, context=...) in tokens")
        batch = self._num_rows() or 1
        return planning.plan_for(model, self._owned.pool.config, context, batch=batch, chunk=chunk)

    def stats(self) -> CacheStats:
        """What lies where and what it cost so far: a frozen snapshot."""
        self._guard.settle()
        pool = self._owned.pool
        tables = self._owned.tables
        first = tables[0] if tables else None
        other = untiered.measure(self.layers)
        return CacheStats(
            num_tokens=max([table.num_tokens for table in tables] + [other.num_tokens]),
            batch=first.batch if first else self._num_rows(),
            num_layers=len(tables),
            untiered_layers=other.num_layers,
            untiered_tokens=other.num_tokens,
            untiered_bytes=other.num_bytes,
            block_tokens=first.layout.block_tokens if first else self._block_tokens(),
            block_bytes=first.layout.num_bytes if first else 0,
            cold_blocks=sum(manager.num_cold_blocks() for manager in pool.managers),
            kernel=" + ".join(pool.kernels()) or ops.backend(),
            tiers=pool.tier_stats(),
            lanes=pool.lane_stats(),
            counters=pool.counters(),
            attend=self._owned.selection.name,
            is_exact=self._owned.selection.is_exact and not self._holds_approximate,
            speculation=replace(self.speculation),
        )

    @property
    def begins_cold(self) -> bool:
        """Whether the first block of some layer has left the device."""
        rows = (row for table in self._owned.tables for row in table.rows if row)
        return any(not row[0].is_resident for row in rows)

    def counters(self) -> Counters:
        """The running totals alone; `stats()` has them too, and looks through all blocks."""
        return self._owned.pool.counters()

    def _check_open(self) -> None:
        if self.is_closed:
            raise ClosedCacheError("this cache is closed: make a new TieredCache")

    def _block_tokens(self) -> int:
        return self._owned.pool.config.block_tokens or 0

    def close(self) -> None:
        """Give memory, files and threads back; using the cache afterwards raises. Idempotent."""
        self._owned.close()

    def __enter__(self) -> "TieredCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        self._guard.join(self._savepoint)
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        tokenizer: Any = None,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write what the cache holds into a folder, for `from_pretrained` in another process.

        model: that computed it. input_ids: `[batch, tokens]`, of all tokens it holds. tokenizer:
        that made them, to be checked as well. push_to_hub: upload the folder to `repo_id`; `hub`
        goes to `huggingface_hub.upload_folder` (token, private repositories, ...).

        Dense, a layer in memory at a time. Raises UnsupportedInputError, before anything is
        written, for other ids than it holds, and for layers other than full and sliding-window
        attention.
        """
        self._check_open()
        self._check_no_draft("save_pretrained()")
        with self._alone():
            self._check_whole()
            held = [self._num_rows(), super().get_seq_length()]
            if list(input_ids.shape) != held:
                raise UnsupportedInputError(
                    f"input_ids {list(input_ids.shape)}: expected the ids of the {held} "
                    "[batch, tokens] that the cache holds (generate leaves out the last token)"
                )
            if push_to_hub and repo_id is None:
                raise ConfigError("push_to_hub=True: expected repo_id='owner/name' beside it")
            saved.save(self.layers, directory, model, input_ids, tokenizer)
        if push_to_hub and repo_id is not None:
            saved.push(directory, repo_id, **hub)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: Any = None,
        **knobs: Any,
    ) -> "TieredCache":
        """A cache that `save_pretrained` wrote: a folder, or a repository of the hub.

        knobs: of the new cache, as `TieredCache` takes them. Its `saved_ids` are the ids it holds:
        what `generate` is given must begin with them. Raises UnsupportedInputError if it was
        computed with another model, or by another tokenizer than the given one, and names the
        difference; TierIOError if the folder is unfinished or damaged; OutOfBlocksError.
        """
        folder = saved.local_folder(name)
        cache = cls(model.config, **knobs)
        try:
            cache.saved_ids = saved.load(cache.layers, folder, model, tokenizer)
        except BaseException:
            cache.close()
            raise
        return cache

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the knobs, and every layer's keys and values as dense tensors."""
        self._check_open()
        self._check_no_draft("pickling")
        with self._alone():
            return {name: value for name, value in vars(self).items() if name != "_guard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._guard = ForwardGuard()
        self._owned.find_guard = weakref.ref(self._guard)
        attention.enable()

    def __copy__(self) -> "TieredCache":
        """The same cache under another name, as a shallow copy of any cache is."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        self._check_open()
        self._check_no_draft("copying")
        with self._alone():
            fork = self.__class__.__new__(self.__class__)
            memo[id(self)] = fork
            for name, value in vars(self).items():
                if name not in ("_owned", "_guard", "_stored", "layers"):
                    setattr(fork, name, copy.deepcopy(value, memo))
            fork._own(self._owned.pool)
            fork._stored = None if self._stored is None else self._stored.copy()
            fork._owned.model = ModelIdentity(self._owned.model)
            fork._owned.was_assigned = self._owned.was_assigned
            fork.layers = [
                layer.fork(fork._owned)
                if isinstance(layer, TieredLayer)
                else copy.deepcopy(layer, memo)
                for layer in self.layers
            ]
        return fork

    def __repr__(self) -> str:
        if self.is_closed:
            state = "closed"
        elif self._guard.unfinished:
            state = f"torn: {self._guard.unfinished}() was interrupted"
        else:
            state = f"{self.get_seq_length()} tokens"
        return f"{type(self).__name__}({state}, {len(self.layers)} layers)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.stats()}" if not self.is_closed else repr(self)

    def _repr_html_(self) -> str:
        """For notebooks."""
        name = f"<b>{html.escape(repr(self))}</b>"
        return name if self.is_closed else name + self.stats()._repr_html_()


class _Attending:
    """While it is entered, a cache attends by another selection.

    A class, not a generator: an interrupt must find either nothing changed or `__exit__` due.
    """

    def __init__(self, cache: TieredCache, selection: SelectionPolicy) -> None:
        self._cache = cache
        self._selection = selection

    def __enter__(self) -> None:
        self._before = self._cache._owned.selection
        self._cache._owned.selection = self._selection  # last, see above

    def __exit__(self, *exc: object) -> None:
        self._cache._owned.selection = self._before


class _Drafting(_Attending):
    """As above, and what was appended meanwhile is dropped."""

    def __enter__(self) -> None:
        self._cache._check_open()
        self._savepoint = self._cache._savepoint()
        self._before = self._cache._owned.selection
        self._cache._owned.selection = self._selection

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        with self._cache._alone("drafting"):
            self._savepoint.restore(forwards.Forward())
