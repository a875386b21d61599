"""Blocks between a cache and a store: how a prefix that is found becomes the beginning of a cache,
and how full blocks of a cache are handed to the publisher.

A token block of the store is one column of all layers together; a cache has a table for each layer.
What is found is put into the tables as cold blocks of their read-only rung: nothing is loaded until
it is attended. What is published is forked first, so that it stays, wherever it goes meanwhile.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.integration.cache_layers import OwnedTables, TieredLayer
from hf_tiered_cache.integration.model_key import compute_device, layer_devices, model_space
from hf_tiered_cache.integration.nameless import look_at
from hf_tiered_cache.integration.token_record import TokenRecord, Told
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.store import keys
from hf_tiered_cache.store.block_store import BlockStore, LayerData, TokenBlock
from hf_tiered_cache.store.files import DTYPES, OpenBlock

logger = logging.get_logger(__name__)

MANY_TOKENS = 32  # of a forward that takes much longer than a look at the weights
_DTYPES = {number: getattr(torch, name) for name, number in DTYPES.items()}


class StoredPrefix:
    """What a cache has to do with its store: the ids it holds, the model's namespace, and how much
    of it was handed to the store."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.salt = store.salt
        self.record = TokenRecord()
        self.space: bytes | None = None  # of the model whose tokens are held
        self.restored_tokens = 0
        self.is_publishing = False  # as forwards go on
        self._published_tokens = 0  # whose full blocks need not be looked at again
        self._asked: set[bytes] = set()  # of the sequence held: asking twice would make them "hot"
        self._stamp: tuple[Any, ...] | None = None  # of the model when `space` was known last

    def copy(self) -> "StoredPrefix":
        """The same, for a fork of the cache."""
        other = StoredPrefix(self.store)
        other.salt = self.salt
        other.record = self.record.copy()
        other.space, other.restored_tokens = self.space, self.restored_tokens
        other._published_tokens, other._asked = self._published_tokens, set(self._asked)
        other._stamp = self._stamp
        return other

    def reset(self) -> None:
        """The cache is empty."""
        self.record.forget()
        self.space, self.restored_tokens, self._published_tokens = None, 0, 0
        self._asked.clear()
        self._stamp = None

    def crop(self, num_tokens: int) -> None:
        """The cache holds the first tokens only; what comes next may be others."""
        self.record.crop(num_tokens)
        self.restored_tokens = min(self.restored_tokens, num_tokens)
        self._published_tokens = min(self._published_tokens, num_tokens)

    def select(self, rows: list[int]) -> None:
        """Row `i` is what row `rows[i]` was."""
        self.record.select(torch.tensor(rows))  # what was looked at of all rows was of these

    def cut_what_is_held(self, kwargs: dict[str, Any], held: int) -> None:
        """Where a forward is given the whole sequence, as its positions tell, and `held` tokens of
        it are in the cache: give it only the rest. Raises UnsupportedInputError where the ids are
        others, or logits of what is held are asked for."""
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        if not held or not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
            return
        num_new = ids.shape[1] - held
        if num_new <= 0 or int(positions.reshape(-1)[0]) != 0:
            return
        known, keep = self.record.ids, kwargs.get("logits_to_keep", 0)
        is_known = known is not None and torch.equal(ids[:, :held].cpu(), known)
        if not (is_known and isinstance(keep, int) and 0 < keep <= num_new):
            raise UnsupportedInputError(
                f"a sequence of {ids.shape[1]} tokens with positions from 0 came to a cache that"
                f" holds {held} already: give the model only the tokens behind those"
            )
        kwargs["input_ids"], kwargs["position_ids"] = ids[:, held:], positions[..., held:]

    def told(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], held: int
    ) -> Told:
        """What a forward of `model` is about to add."""
        if held == 0:
            self.reset()
        told = self.record.told(model, args, kwargs, held)
        if told.ids is not None and (why := self._why_other(model, told.ids.shape[1] - held)):
            told.ids, told.reason = None, why
        return told

    def _why_other(self, model: torch.nn.Module, num_new: int) -> str:
        """Why what `model` adds does not belong behind what is held; empty where it does. A change
        through `weight.data` is only found by samples of all weights, which are taken where there
        is much to compute besides, or where `generate` begins."""
        why, stamp = look_at(model)
        if why:
            return why
        if self._stamp != stamp or num_new >= MANY_TOKENS:
            space = model_space(model, self.salt)
            if self.space not in (None, space):
                return "the model changed while the cache was in use"
            self.space, self._stamp = space, stamp
        return ""

    def begin_publishing(self) -> None:
        """Full blocks are published as forwards go on; the first looks at the model anew."""
        self.is_publishing, self._stamp = True, None

    def begins_with(self, ids: torch.Tensor) -> None:
        """The cache holds these tokens, from the store."""
        self.restored_tokens = ids.shape[1]
        if self.restored_tokens:
            self.record.set(ids)

    def check_same(self, input_ids: Any) -> None:
        """Raise UnsupportedInputError unless the tokens held begin like `input_ids`."""
        ids = torch.as_tensor(input_ids).detach().cpu()
        ids = ids[None] if ids.dim() == 1 else ids
        held = self.record.ids
        if held is None:
            return
        common = min(held.shape[1], ids.shape[1])
        if ids.shape[0] != held.shape[0] or not torch.equal(ids[:, :common], held[:, :common]):
            raise UnsupportedInputError(
                f"input_ids {list(ids.shape)} are not the tokens that this cache holds"
                f" ({list(held.shape)}): publish() without them, or pass what generate returned"
            )

    def find(
        self, ids: torch.Tensor, model: torch.nn.Module, layers: Sequence[Any], asked: int | None
    ) -> list[OpenBlock]:
        """The blocks of the longest prefix of `ids` (one row) that are there and fit `layers`; at
        least one token is left to be computed. asked: tokens in a block, where the cache's config
        told."""
        if why := why_not_stored(layers) or look_at(model).why:
            self.store.bypass(why)
            return []
        self.space = space = model_space(model, self.salt)
        block_tokens = asked or _default_block_tokens(model)
        given = ids[: max(0, len(ids) - 1)].tolist()
        found = self.store.find(space, keys.block_keys(space, given, block_tokens))
        return found[: _num_fitting(found, len(layers), block_tokens)]

    def names(self, layers: Sequence[Any], owned: OwnedTables) -> tuple[bytes, list[bytes]] | None:
        """(the namespace, the keys of the full blocks of the first row); None where they have no
        name."""
        block_tokens = self._block_tokens(owned)
        ids, space = self.record.ids, self.space
        if self._why_unnamed(layers, owned) or not block_tokens or ids is None or space is None:
            return None
        return space, keys.block_keys(space, ids[0].tolist(), block_tokens)

    def _why_unnamed(self, layers: Sequence[Any], owned: OwnedTables) -> str:
        """Why the tokens held do not tell what the blocks hold; empty where they do."""
        if reason := self.record.reason or why_not_stored(layers):
            return reason
        if owned.was_assigned:
            return "keys or values were assigned, or layers changed one by one"
        held = [owned.table(number) for number in range(len(layers))]
        lengths = {0 if one is None else one[1].num_tokens for one in held}
        if lengths != {self.record.num_tokens}:
            return "tokens came otherwise than by a forward of a model"
        return ""

    def _block_tokens(self, owned: OwnedTables) -> int:
        """Tokens in a block, the same in all layers; 0 where there are none, or they differ."""
        sizes = {table.layout.block_tokens for table in owned.tables}
        return sizes.pop() if len(sizes) == 1 else 0

    def published(
        self, layers: Sequence[Any], owned: OwnedTables, model: torch.nn.Module | None
    ) -> "Published | None":
        """The full blocks that the store lacks, forked; None where there are none, or they have no
        name."""
        if why := self._why_unnamed(layers, owned):
            self.store.bypass(why)
            return None
        block_tokens = self._block_tokens(owned)
        if not block_tokens or self.record.ids is None or self.space is None:
            return None
        num_full = self.record.num_tokens // block_tokens
        first = min(self._published_tokens // block_tokens, num_full)
        self._published_tokens = num_full * block_tokens
        if first == num_full:
            return None
        if model is not None and (
            look_at(model).why or model_space(model, self.salt) != self.space
        ):
            self.record.forget("the model changed while the cache was in use")
            return None
        names = [keys.block_keys(self.space, row.tolist(), block_tokens) for row in self.record.ids]
        wanted: dict[bytes, tuple[int, int]] = {}
        for column in range(first, num_full):
            for row, chain in enumerate(names):
                key = chain[column]
                if key not in self._asked and self.store.is_wanted(self.space, key):
                    wanted[key] = (row, column)
                self._asked.add(key)
        if not wanted:
            return None
        return Published(self.store, self.space, owned, len(layers), names, [*wanted.values()])


class Published:
    """Blocks of a cache on their way to a store, in forks of its tables."""

    def __init__(
        self,
        store: BlockStore,
        space: bytes,
        owned: OwnedTables,
        num_layers: int,
        names: Sequence[Sequence[bytes]],
        wanted: Sequence[tuple[int, int]],
    ) -> None:
        """names: the keys of each row. wanted: (row, column) of the blocks to be written."""
        self._store = store
        self._space = space
        self._names = names
        self._wanted = wanted
        self._num_layers = num_layers
        self._is_dropped = False
        self._forks = OwnedTables(owned.pool)
        for number in range(num_layers):
            held = owned.table(number)
            assert held is not None
            manager, table = held
            with manager.lock:
                self._forks.add(number, manager, manager.fork(table))

    @property
    def num_bytes(self) -> int:
        """Bytes to be written."""
        size = sum(table.layout.num_bytes for table in self._forks.tables)
        return size * len(self._wanted)

    def run(self) -> None:
        """Write them, those before others first; then let the forks go."""
        try:
            stopped: set[int] = set()
            for row, column in self._wanted:
                if self._is_dropped:
                    break
                if row not in stopped and not self._write(row, column):
                    stopped.add(row)
        finally:
            self._forks.close()

    def _write(self, row: int, column: int) -> bool:
        chain = self._names[row]
        parent = chain[column - 1] if column else keys.root_key(self._space)
        layers = [self._layer_data(number, row, column) for number in range(self._num_layers)]
        block = TokenBlock(chain[column], column, layers[0].shape[1], layers)
        return self._store.put(self._space, parent, [block]) == 1

    def _layer_data(self, number: int, row: int, column: int) -> LayerData:
        held = self._forks.table(number)
        assert held is not None
        manager, table = held
        layout = manager.layout
        data = torch.empty(layout.num_bytes, dtype=torch.uint8)
        manager.export(table, table.rows[row][column], data)
        data[layout.data_bytes :] = 0
        shape = (layout.kv_heads, layout.block_tokens, layout.key_dim, layout.value_dim)
        return LayerData(number, _dtype_name(layout.dtype), shape, data.numpy().data)

    def submit(self) -> int:
        """Let the store's thread write them; the number of blocks, 0 where too much waits."""
        keys = frozenset(self._names[row][column] for row, column in self._wanted)
        pool = self._forks.pool
        if self._store.publish(self.num_bytes, self.run, keys=keys, drop=self.drop, owner=pool):
            return len(self._wanted)
        self._forks.close()
        return 0

    def drop(self) -> None:
        """Write nothing more. From any thread; `run` lets the forks go."""
        self._is_dropped = True


def restore_layers(
    found: Sequence[OpenBlock],
    layers: Sequence[TieredLayer],
    model: torch.nn.Module,
    num_rows: int,
) -> int:
    """Let empty layers begin with what was found; tokens. Where an error ends it, they are empty
    again."""
    if not found:
        return 0
    devices = layer_devices(model)
    try:
        for number, layer in enumerate(layers):
            device = devices.get(number, compute_device(model))
            layer.begin_with(_layout(found[0], number), device, found, number, num_rows)
    except BaseException:
        for layer in layers:
            layer.reset()
        raise
    return len(found) * found[0].header.num_tokens


def why_not_stored(layers: Sequence[Any]) -> str:
    """Why a cache with these layers cannot be kept in a store; empty where it can."""
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not TieredLayer})
    if others:
        return f"layers of other kinds than full attention are not stored ({', '.join(others)})"
    return ""


def one_row(input_ids: Any) -> tuple[torch.Tensor, int]:
    """(the ids of one row, the number of rows) of ids `[tokens]` or `[rows, tokens]`, all rows
    equal. Raises UnsupportedInputError."""
    ids = torch.as_tensor(input_ids).detach().cpu()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point() or not ids.shape[0]:
        raise UnsupportedInputError(
            f"input_ids of shape {list(ids.shape)} and {ids.dtype}: expected ints [tokens] or"
            " [rows, tokens]"
        )
    if not bool((ids == ids[:1]).all()):
        raise UnsupportedInputError(
            "restore() of a batch whose rows differ: what is found would have another length in"
            " each row; give each row a cache of its own"
        )
    return ids[0], ids.shape[0]


def _default_block_tokens(model: torch.nn.Module) -> int:
    """Tokens in a block as the layers of a model will have it, where nothing was asked."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = next((it.dtype for it in model.parameters()), torch.float32)
    device = compute_device(model).type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return default_block_tokens(dim, dtype)


def _num_fitting(found: Sequence[OpenBlock], num_layers: int, block_tokens: int) -> int:
    """How many of the blocks, from the first, have just these layers."""
    if not found or found[0].header.table["layer"].tolist() != list(range(num_layers)):
        return 0
    alike = (found[0].header.shapes, block_tokens)
    for number, block in enumerate(found):
        if (block.header.shapes, block.header.num_tokens) != alike:
            return number
    return len(found)


def _layout(block: OpenBlock, layer: int) -> BlockLayout:
    extent = block.header.extent(layer)
    kv_heads, block_tokens, key_dim, value_dim = extent.shape
    return BlockLayout(kv_heads, key_dim, value_dim, block_tokens, _DTYPES[extent.dtype])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
