"""Where blocks are: which block holds which tokens, in which slot of which tier, shared by whom.

Pure bookkeeping: knows no bytes, no devices, no files and moves nothing. A `BlockTable` is one
layer's view: for every sequence (batch row) the list of its blocks, token `t` of the row standing
in block `t // block_tokens`. All rows of a table hold the same number of tokens, as a batch in
transformers does.

Full blocks are immutable, so rows, tables and forks of a whole cache share them by reference
count; only a filling block is ever copied, and only when a sharer writes.
"""

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from hf_tiered_cache.errors import BlockStateError
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers.base import DONE, Transfer

DEVICE = 0  # rung of the device tier; larger rungs lie lower


class KVBlock:
    """One block: who shares it and its slot in each tier (None where it has no copy).

    A block with a device slot is resident, one without is cold. A copy in a lower tier is
    immutable; `store` is its transfer, which must be done before the copy may be relied on.
    """

    __slots__ = ("layer", "index", "ref_count", "slots", "store", "__weakref__")

    def __init__(self, layer: int, index: int, num_tiers: int) -> None:
        self.layer = layer
        self.index = index  # position in its sequence: first token // block_tokens
        self.ref_count = 1
        self.slots: list[int | None] = [None] * num_tiers
        self.store: Transfer = DONE

    @property
    def is_resident(self) -> bool:
        return self.slots[DEVICE] is not None

    @property
    def is_stored(self) -> bool:
        """A lower tier holds a copy or is receiving one: the device copy can be dropped."""
        return any(slot is not None for slot in self.slots[DEVICE + 1 :])

    def __repr__(self) -> str:
        return f"KVBlock(layer={self.layer}, index={self.index}, slots={self.slots})"


@dataclass(frozen=True)
class Run:
    """Columns [first, last) of a table that are all resident, or all (partly) cold."""

    first: int
    last: int
    is_resident: bool


@dataclass(frozen=True)
class Placement:
    """Where a table's blocks are now: device slots for the kernels, and runs for the streaming."""

    version: int
    slots: torch.Tensor  # int32 [batch, num_blocks], -1 where cold
    runs: tuple[Run, ...]  # in block order
    is_writable: bool  # filling blocks are: unshared, resident, in no queue of demotion


@dataclass(eq=False)
class BlockTable:
    """The blocks of one layer: `rows[row][index]`, `num_tokens` tokens in every row."""

    layer: int
    layout: BlockLayout
    rows: list[list[KVBlock]]
    num_tokens: int = 0
    placement: Placement | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def num_blocks(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def is_filling(self) -> bool:
        """The last block of every row has room left."""
        return self.num_tokens % self.layout.block_tokens != 0

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[KVBlock]:
        """Every distinct block of columns [first, last), column by column."""
        for column in zip(*(row[first:last] for row in self.rows), strict=True):
            if len(column) == 1:
                yield column[0]
            else:
                yield from dict.fromkeys(column)


class KVBlockManager:
    """Creates, shares and drops blocks of one shape. The caller fills the slots and frees those
    handed back.

    `num_tiers` counts the device. Every change of a block's address goes through `move`; it, and
    every change of who shares a block, makes the placements of its layer stale. Resident full
    blocks are queued for demotion, oldest first, as *dirty* (no copy below) or *clean* (a copy
    below exists or is under way).
    """

    def __init__(self, num_tiers: int) -> None:
        self.num_tiers = num_tiers
        self._tables: weakref.WeakSet[BlockTable] = weakref.WeakSet()
        self._versions: dict[int, int] = {}
        self._dirty: dict[int, OrderedDict[KVBlock, None]] = {}
        self._clean: dict[int, OrderedDict[KVBlock, None]] = {}

    def new_table(self, layer: int, layout: BlockLayout, batch: int) -> BlockTable:
        """An empty table of `batch` rows."""
        table = BlockTable(layer, layout, [[] for _ in range(batch)])
        self._tables.add(table)
        self._dirty.setdefault(layer, OrderedDict())
        self._clean.setdefault(layer, OrderedDict())
        return table

    def append_block(self, table: BlockTable, row: int, slot: int) -> KVBlock:
        """Add a block in device slot `slot` behind the last one of `row`."""
        block = KVBlock(table.layer, len(table.rows[row]), self.num_tiers)
        block.slots[DEVICE] = slot
        table.rows[row].append(block)
        self._touch(table.layer)
        return block

    def advance(self, table: BlockTable, num_tokens: int) -> list[KVBlock]:
        """Count `num_tokens` more tokens, already written; return the blocks that became full."""
        first_full = table.num_tokens // table.layout.block_tokens
        table.num_tokens += num_tokens
        last_full = table.num_tokens // table.layout.block_tokens
        if table.num_tokens > table.num_blocks * table.layout.block_tokens:
            raise BlockStateError(f"{table.num_tokens} tokens in {table.num_blocks} blocks")
        if first_full == last_full:
            return []
        full = list(table.blocks(first_full, last_full))
        self._dirty[table.layer].update(dict.fromkeys(full))
        return full

    def move(self, block: KVBlock, tier: int, slot: int | None) -> int | None:
        """Set the block's slot in a tier (None: no copy there); return the slot it had."""
        old, block.slots[tier] = block.slots[tier], slot
        if tier == DEVICE:
            self._touch(block.layer)
            if slot is None:
                self._unqueue(block)
        elif block in self._dirty[block.layer] and block.is_stored:
            self._unqueue(block)
            self._clean[block.layer][block] = None
        elif block in self._clean[block.layer] and not block.is_stored:
            self._unqueue(block)
            dirty = self._dirty[block.layer]
            dirty[block] = None
            dirty.move_to_end(block, last=False)  # stores begin with the oldest: it still is
        return old

    def is_demotable(self, block: KVBlock) -> bool:
        """The block waits in a queue of demotion: it is full and resident."""
        return block in self._dirty[block.layer] or block in self._clean[block.layer]

    def start_filling(self, block: KVBlock) -> None:
        """Take a block out of the queues of demotion: tokens will be written into it."""
        self._unqueue(block)
        self._touch(block.layer)

    def replace_last(self, table: BlockTable, row: int, slot: int) -> tuple[KVBlock, KVBlock]:
        """Give `row` its own last block in device slot `slot` instead of a shared one.

        Returns (the shared block, the new one); the caller copies the bytes.
        """
        shared = table.rows[row][-1]
        if shared.ref_count < 2:
            raise BlockStateError(f"{shared} is not shared")
        shared.ref_count -= 1
        own = KVBlock(table.layer, shared.index, self.num_tiers)
        own.slots[DEVICE] = slot
        table.rows[row][-1] = own
        self._touch(table.layer)
        return shared, own

    def truncate(self, table: BlockTable, num_tokens: int) -> list[KVBlock]:
        """Keep the first `num_tokens` tokens of every row; return the blocks nobody holds now."""
        if not 0 <= num_tokens <= table.num_tokens:
            raise BlockStateError(f"truncate {table.num_tokens} tokens to {num_tokens}")
        keep = table.layout.num_blocks(num_tokens)
        dropped: list[KVBlock] = []
        for row in table.rows:
            dropped += self._release(row[keep:])
            del row[keep:]
        table.num_tokens = num_tokens
        self._touch(table.layer)
        return dropped

    def select_rows(self, table: BlockTable, rows: Sequence[int]) -> list[KVBlock]:
        """Make row `i` what row `rows[i]` was (any length, repeats allowed), sharing blocks.

        Returns the blocks nobody holds now. No bytes move.
        """
        chosen = [list(table.rows[row]) for row in rows]
        for row in chosen:
            for block in row:
                block.ref_count += 1
        dropped: list[KVBlock] = []
        for row in table.rows:
            dropped += self._release(row)
        table.rows = chosen
        self._touch(table.layer)
        return dropped

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks; neither notices what is written to the other."""
        for row in table.rows:
            for block in row:
                block.ref_count += 1
        copy = BlockTable(
            table.layer, table.layout, [list(row) for row in table.rows], table.num_tokens
        )
        self._tables.add(copy)
        self._touch(table.layer)
        return copy

    def drop_table(self, table: BlockTable) -> list[KVBlock]:
        """Forget a table; return the blocks nobody holds now."""
        dropped = [block for row in table.rows for block in self._release(row)]
        table.rows, table.num_tokens, table.placement = [], 0, None
        self._tables.discard(table)
        return dropped

    def placement(self, table: BlockTable) -> Placement:
        """Where the table's blocks are now; rebuilt only after something of its layer moved."""
        version = self._versions.get(table.layer, 0)
        if table.placement is None or table.placement.version != version:
            table.placement = self._place(table, version)
        return table.placement

    def next_to_demote(self, may_store: bool) -> KVBlock | None:
        """The oldest resident full block of the layer that has most of them; one with a copy below
        unless `may_store`.

        Taking from the fullest layer keeps the share of every layer the same, which spreads the
        loads evenly over a forward.
        """
        layers = [layer for layer in self._dirty if may_store or self._clean[layer]]
        layer = max(layers, key=self.num_demotable, default=None)
        if layer is None:
            return None
        return _oldest(self._clean[layer]) or _oldest(self._dirty[layer])

    def next_to_store(self) -> KVBlock | None:
        """The oldest dirty block of the layer that has most of them."""
        layer = max(self._dirty, key=lambda layer: len(self._dirty[layer]), default=None)
        return None if layer is None else _oldest(self._dirty[layer])

    def num_demotable(self, layer: int) -> int:
        """Resident full blocks of a layer."""
        return len(self._dirty[layer]) + len(self._clean[layer])

    @property
    def num_clean(self) -> int:
        """Resident full blocks whose device copy can be dropped without a store."""
        return sum(map(len, self._clean.values()))

    @property
    def num_dirty(self) -> int:
        """Resident full blocks that have no copy below."""
        return sum(map(len, self._dirty.values()))

    @property
    def tables(self) -> list[BlockTable]:
        """Every live table, by layer."""
        return sorted(self._tables, key=lambda table: table.layer)

    @property
    def num_layers(self) -> int:
        """Layers that have a table; those of forks are the same ones."""
        return len({table.layer for table in self._tables})

    @property
    def max_batch(self) -> int:
        """Rows of the widest table."""
        return max((table.batch for table in self._tables), default=0)

    def check_integrity(self) -> None:
        """Verify every law of this room; raises `BlockStateError` naming the broken one."""
        holders: dict[KVBlock, int] = {}
        for table in self._tables:
            for row in table.rows:
                if len(row) != table.layout.num_blocks(table.num_tokens):
                    raise BlockStateError(f"{len(row)} blocks for {table.num_tokens} tokens")
                for index, block in enumerate(row):
                    holders[block] = holders.get(block, 0) + 1
                    if (block.layer, block.index) != (table.layer, index):
                        raise BlockStateError(f"{block} stands at {(table.layer, index)}")
                    if all(slot is None for slot in block.slots):
                        raise BlockStateError(f"{block} is nowhere")
                    is_full = index < table.num_tokens // table.layout.block_tokens
                    if is_full and block.is_resident and not self.is_demotable(block):
                        raise BlockStateError(f"{block} is full and would never be demoted")
            placement = self.placement(table)
            is_writable = self._place(table, placement.version).is_writable
            if table.is_filling and placement.is_writable and not is_writable:
                raise BlockStateError(f"layer {table.layer}: the filling blocks are not its own")
            expected = _device_slots(table)
            if placement.slots.tolist() != expected:
                raise BlockStateError(f"placement {placement.slots.tolist()} is not {expected}")
            runs = [run.is_resident for run in placement.runs for _ in range(run.first, run.last)]
            if runs != [min(column) >= 0 for column in zip(*expected, strict=True)]:
                raise BlockStateError(f"runs {placement.runs} are not those of {expected}")
        for block, count in holders.items():
            if block.ref_count != count:
                raise BlockStateError(f"{block} has ref_count {block.ref_count}, {count} holders")
        for layer, queue in [*self._dirty.items(), *self._clean.items()]:
            for block in queue:
                if block not in holders or not block.is_resident or block.layer != layer:
                    raise BlockStateError(f"{block} waits for demotion but is not there")
                if (block in self._clean[layer]) != block.is_stored:
                    raise BlockStateError(f"{block} is in the wrong queue of demotion")
        for tier in range(self.num_tiers):
            slots = [slot for block in holders if (slot := block.slots[tier]) is not None]
            if len(slots) != len(set(slots)):
                raise BlockStateError(f"two blocks share a slot of tier {tier}: {sorted(slots)}")

    def _touch(self, layer: int) -> None:
        self._versions[layer] = self._versions.get(layer, 0) + 1

    def _unqueue(self, block: KVBlock) -> None:
        self._dirty[block.layer].pop(block, None)
        self._clean[block.layer].pop(block, None)

    def _release(self, blocks: Iterable[KVBlock]) -> list[KVBlock]:
        dropped = []
        for block in blocks:
            block.ref_count -= 1
            if block.ref_count == 0:
                self._unqueue(block)
                dropped.append(block)
        return dropped

    def _place(self, table: BlockTable, version: int) -> Placement:
        slots = _device_slots(table)
        runs: list[Run] = []
        first = 0
        resident = [min(column) >= 0 for column in zip(*slots, strict=True)]
        for index in range(1, len(resident) + 1):
            if index == len(resident) or resident[index] != resident[first]:
                runs.append(Run(first, index, resident[first]))
                first = index
        tensor = torch.tensor(slots, dtype=torch.int32).view(table.batch, table.num_blocks)
        last_blocks = [row[-1] for row in table.rows if row]
        is_writable = all(
            block.ref_count == 1 and block.is_resident and not self.is_demotable(block)
            for block in last_blocks
        )
        return Placement(version, tensor, tuple(runs), is_writable)


def _device_slots(table: BlockTable) -> list[list[int]]:
    """Device slots by row, -1 where cold."""
    return [
        [-1 if (slot := block.slots[DEVICE]) is None else slot for block in row]
        for row in table.rows
    ]


def _oldest(queue: OrderedDict[KVBlock, None]) -> KVBlock | None:
    return next(iter(queue), None)
