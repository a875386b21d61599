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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from hf_tiered_cache.errors import (
    BlockStateError,
    TieredCacheError,
    TierIOError,
    TornBooksError,
)
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.transfers import DONE, Transfer

DEVICE = 0  # rung of the device tier; larger rungs lie lower

Queue = OrderedDict["KVBlock", None]


class KVBlock:
    """One block: who shares it and its slot in each tier (None where it has no copy).

    A block with a device slot is resident, one without is cold. A copy in a lower tier is
    immutable; `stores` holds, by rung, the transfer that brings it there, which must be done before
    the copy may be relied on. The highest copy of a block is always there.
    """

    __slots__ = ("layer", "index", "ref_count", "slots", "stores", "__weakref__")

    def __init__(self, layer: int, index: int, num_tiers: int) -> None:
        self.layer = layer
        self.index = index  # position in its sequence: first token // block_tokens
        self.ref_count = 1
        self.slots: list[int | None] = [None] * num_tiers
        self.stores: list[Transfer] = [DONE] * num_tiers

    @property
    def is_resident(self) -> bool:
        return self.slots[DEVICE] is not None

    @property
    def device_slot(self) -> int:
        """The slot of a resident block."""
        slot = self.slots[DEVICE]
        assert slot is not None, f"{self} is not resident"
        return slot

    @property
    def highest(self) -> int:
        """The rung of its highest copy."""
        for rung, slot in enumerate(self.slots):  # no generator: asked for every block of a table
            if slot is not None:
                return rung
        raise BlockStateError(f"{self} is nowhere")

    @property
    def is_stored(self) -> bool:
        """A lower tier holds a copy or is receiving one: the device copy can be dropped."""
        return self.copy_below(DEVICE) is not None

    def copy_below(self, rung: int) -> int | None:
        """The highest rung below `rung` that holds a copy or is receiving one."""
        for lower in range(rung + 1, len(self.slots)):
            if self.slots[lower] is not None:
                return lower
        return None

    def settle_stores(self) -> None:
        """Give up the copies whose store failed; all have ended."""
        for rung, store in enumerate(self.stores):
            try:
                store.wait()
            except TierIOError:
                self.slots[rung] = None
            self.stores[rung] = DONE

    def __repr__(self) -> str:
        return f"KVBlock(layer={self.layer}, index={self.index}, slots={self.slots})"


@dataclass(frozen=True, eq=False)
class Waiting:
    """The full blocks on a rung that may leave it, by layer, in the order in which they came."""

    rung: int
    dirty: dict[int, Queue] = field(default_factory=dict)  # no copy below
    clean: dict[int, Queue] = field(default_factory=dict)  # a copy below exists or is under way

    def __contains__(self, block: KVBlock) -> bool:
        return block in self.dirty[block.layer] or block in self.clean[block.layer]

    def __iter__(self) -> Iterator[KVBlock]:
        for queue in (*self.dirty.values(), *self.clean.values()):
            yield from queue

    def without(self, layers: Collection[int]) -> "Waiting":
        """The same with nothing of these layers."""
        dirty, clean = (
            {one: OrderedDict() if one in layers else queue for one, queue in queues.items()}
            for queues in (self.dirty, self.clean)
        )
        return Waiting(self.rung, dirty, clean)

    @property
    def num_dirty(self) -> int:
        return sum(map(len, self.dirty.values()))

    @property
    def num_clean(self) -> int:
        return sum(map(len, self.clean.values()))


@dataclass(frozen=True, eq=False)
class Run:
    """Columns [first, last) of a table whose blocks all lie on one rung, their highest; None: the
    rows of a column differ."""

    first: int
    last: int
    rung: int | None
    rows: list[list[KVBlock]] = field(repr=False)  # of the table

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [batch, last - first] on that rung, else on the device (-1 where cold). Made when
        asked for: what goes through staging is attended in other slots."""
        rung = DEVICE if self.rung is None else self.rung
        return _slots([row[self.first : self.last] for row in self.rows], rung)

    @property
    def is_resident(self) -> bool:
        return self.rung == DEVICE


@dataclass
class Placement:
    """Where a table's blocks are now.

    Does not change, but for `view` and `plans`: there whoever shows the blocks to the kernels
    keeps what it made of them.
    """

    version: int
    rows: list[list[KVBlock]] = field(repr=False)  # of the table
    runs: tuple[Run, ...]  # in block order
    is_writable: bool  # filling blocks are: unshared, resident, in no queue of demotion
    view: Any = None
    plans: dict[tuple[bool, bool], Any] = field(default_factory=dict)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [batch, num_blocks] on the device, -1 where cold."""
        return _slots(self.rows, DEVICE)


class Changing:
    """While books are being changed, the `with` block; and whether the last change went through.

    What this package raises on purpose leaves the books in order. Anything else (Ctrl-C, which may
    come between any two lines, memory that ran out) leaves them torn, to be mended before they are
    read or changed again. The flag is set before the first change and taken back behind the last,
    so it needs no handler that could itself be interrupted. Blocks do not nest.
    """

    __slots__ = ("_is_under_way", "is_torn")

    def __init__(self) -> None:
        self._is_under_way = False
        self.is_torn = False
        """Told by others: a table died with its blocks, for an interrupt swallowed its drop, or a
        change was interrupted while another one paused."""

    @property
    def was_interrupted(self) -> bool:
        """Whether the books are torn; for whoever changes nothing just now."""
        return self._is_under_way or self.is_torn

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other threads change the books, which are in order at this point of a change. Raises
        TornBooksError behind it when one of them was interrupted."""
        self._is_under_way = False
        try:
            yield
        finally:
            is_torn_now, self._is_under_way = self._is_under_way, True
            self.is_torn |= is_torn_now
        if is_torn_now:
            raise TornBooksError(
                "another thread was interrupted while this one waited for it: call again"
            )

    def __enter__(self) -> None:
        self._is_under_way = True

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None or issubclass(error, TieredCacheError):
            self._is_under_way = False


@dataclass(eq=False)
class BlockTable:
    """The blocks of one layer: `rows[row][index]`, `num_tokens` tokens in every row."""

    layer: int
    layout: BlockLayout
    rows: list[list[KVBlock]]
    changing: Changing = field(repr=False)
    num_tokens: int = 0
    placement: Placement | None = field(default=None, repr=False)
    _make_rows: Callable[[], list[list[KVBlock]]] = field(default=list, repr=False)

    def begin_with(self, make_rows: Callable[[], list[list[KVBlock]]]) -> None:
        """Let the rows be what `make_rows` returns, which is asked when somebody looks."""
        self._make_rows = make_rows
        del self.rows

    def __getattr__(self, name: str) -> Any:
        if name != "rows":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.rows = rows = self._make_rows()  # one step: it may be interrupted before
        return rows

    def __del__(self) -> None:
        if self.rows:
            self.changing.is_torn = True

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
    every change of who shares a block, makes the placements of its layer stale. On every rung but
    the last (where there is one alone, on that), full blocks that have a copy there are `waiting`
    for demotion; whose turn it is says a `DemotionPolicy`.
    """

    def __init__(self, num_tiers: int) -> None:
        self.num_tiers = num_tiers
        self.changing = Changing()
        self._tables: weakref.WeakSet[BlockTable] = weakref.WeakSet()
        self._versions: dict[int, int] = {}
        self.waiting = tuple(Waiting(rung) for rung in range(max(1, num_tiers - 1)))

    def new_table(self, layer: int, layout: BlockLayout, batch: int) -> BlockTable:
        """An empty table of `batch` rows."""
        table = BlockTable(layer, layout, [[] for _ in range(batch)], self.changing)
        self._tables.add(table)
        for waiting in self.waiting:
            waiting.dirty.setdefault(layer, OrderedDict())
            waiting.clean.setdefault(layer, OrderedDict())
        return table

    def append_block(self, table: BlockTable, row: int, slot: int) -> KVBlock:
        """Add a block in device slot `slot` behind the last one of `row`."""
        block = KVBlock(table.layer, len(table.rows[row]), self.num_tiers)
        block.slots[DEVICE] = slot
        table.rows[row].append(block)
        self._touch(table.layer)
        return block

    def adopt(self, table: BlockTable, rung: int, slots: Sequence[int]) -> None:
        """Let an empty table begin with full blocks that lie in these slots of a rung; all rows
        share them. The blocks are made when somebody looks."""
        layer, num_tiers, batch = table.layer, self.num_tiers, table.batch

        def make_rows() -> list[list[KVBlock]]:
            blocks = [KVBlock(layer, index, num_tiers) for index in range(len(slots))]
            for block, slot in zip(blocks, slots, strict=True):
                block.slots[rung] = slot
                block.ref_count = batch
            return [list(blocks) for _ in range(batch)]

        table.begin_with(make_rows)
        table.num_tokens = len(slots) * table.layout.block_tokens  # last: whoever mends goes by it
        self._touch(table.layer)

    def advance(self, table: BlockTable, num_tokens: int) -> list[KVBlock]:
        """Count `num_tokens` more tokens, already written; return the blocks that became full."""
        first_full = table.num_tokens // table.layout.block_tokens
        table.num_tokens += num_tokens
        last_full = table.num_tokens // table.layout.block_tokens
        if table.num_tokens > len(table.rows[0]) * table.layout.block_tokens:
            raise BlockStateError(f"{table.num_tokens} tokens in {table.num_blocks} blocks")
        if first_full == last_full:
            return []
        full = list(table.blocks(first_full, last_full))
        self.waiting[DEVICE].dirty[table.layer].update(dict.fromkeys(full))
        return full

    def move(self, block: KVBlock, tier: int, slot: int | None) -> int | None:
        """Set the block's slot in a tier (None: no copy there); return the slot it had."""
        above = block.slots[:tier]
        old, block.slots[tier] = block.slots[tier], slot
        if all(copy is None for copy in above):
            self._touch(block.layer)
        if slot is None:
            self._unqueue(block, tier)
        elif DEVICE < tier < len(self.waiting):
            self._queue(block, tier)
        for rung in range(tier):
            self._requeue(block, rung)
        return old

    def is_demotable(self, block: KVBlock) -> bool:
        """The block waits in the device's queue of demotion: it is full and resident."""
        return block in self.waiting[DEVICE]

    def start_filling(self, block: KVBlock) -> None:
        """Take a block out of the device's queue of demotion: tokens will be written into it."""
        self._unqueue(block, DEVICE)
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
        was_filling = table.is_filling
        table.num_tokens = num_tokens  # first: whoever mends what was interrupted goes by it
        keep = table.layout.num_blocks(num_tokens)
        if keep == table.num_blocks and (was_filling or not table.is_filling):
            return []  # the last blocks only hold fewer tokens: nothing moved
        dropped: list[KVBlock] = []
        for row in table.rows:
            dropped += self._release(row[keep:])
            del row[keep:]
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
        rows = [list(row) for row in table.rows]
        copy = BlockTable(table.layer, table.layout, rows, self.changing, table.num_tokens)
        self._tables.add(copy)
        self._touch(table.layer)
        return copy

    def drop_table(self, table: BlockTable) -> list[KVBlock]:
        """Forget a table; return the blocks nobody holds now."""
        dropped = [block for row in table.rows for block in self._release(row)]
        table.rows, table.num_tokens, table.placement = [], 0, None
        self._tables.discard(table)
        return dropped

    def forget_places(self) -> None:
        """Keep no view of memory that is about to go."""
        for table in self.tables:
            table.placement = None

    def mend(self) -> list[KVBlock]:
        """Make good what an interrupt left half done, once no transfer is under way: of every table
        the rows and their number of tokens count, everything else follows from them.

        Tables that died hold nothing. Columns without tokens are cut, copies whose store failed are
        given up, holders are counted and queues built anew. Returns the blocks that are held.
        """
        self.changing.is_torn = False
        held: dict[KVBlock, int] = {}
        full: set[KVBlock] = set()
        for table in self.tables:
            for row in table.rows:
                del row[table.layout.num_blocks(table.num_tokens) :]
                for block in row:
                    held[block] = held.get(block, 0) + 1
                full.update(row[: table.num_tokens // table.layout.block_tokens])
            table.placement = None
        for waiting in self.waiting:
            for queue in (*waiting.dirty.values(), *waiting.clean.values()):
                queue.clear()
        for block in sorted(held, key=lambda block: block.index):
            block.ref_count = held[block]
            block.settle_stores()
            for rung in range(len(self.waiting)):
                # One that fills is demoted only if it was full before, and was stored then.
                may_leave = rung > DEVICE or block in full or block.is_stored
                if block.slots[rung] is not None and may_leave:
                    self._queue(block, rung)
        return list(held)

    def placement(self, table: BlockTable) -> Placement:
        """Where the table's blocks are now; rebuilt only after something of its layer moved."""
        version = self._versions.get(table.layer, 0)
        if table.placement is None or table.placement.version != version:
            table.placement = self._place(table, version)
        return table.placement

    def num_demotable(self, rung: int = DEVICE) -> int:
        """Full blocks on a rung (not the last)."""
        return self.waiting[rung].num_clean + self.waiting[rung].num_dirty

    def num_clean_on(self, rung: int) -> int:
        """Full blocks on a rung (not the last) whose copy there can be dropped without a store."""
        return self.waiting[rung].num_clean

    @property
    def num_clean(self) -> int:
        """Copies, on all rungs, that can be dropped without a store."""
        return sum(waiting.num_clean for waiting in self.waiting)

    @property
    def num_dirty(self) -> int:
        """Copies, on all rungs but the last, of full blocks that have none below."""
        return sum(waiting.num_dirty for waiting in self.waiting)

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
            expected = _slots(table.rows, DEVICE).tolist()
            if placement.slots.tolist() != expected:
                raise BlockStateError(f"placement {placement.slots.tolist()} is not {expected}")
            rungs = [run.rung for run in placement.runs for _ in range(run.first, run.last)]
            if rungs != _rungs(table):
                raise BlockStateError(f"runs {rungs} are not those of {_rungs(table)}")
            for run in placement.runs:
                again = Run(run.first, run.last, run.rung, table.rows)
                if not torch.equal(run.slots, again.slots):
                    raise BlockStateError(f"{run} has other slots than its blocks")
        for block, count in holders.items():
            if block.ref_count != count:
                raise BlockStateError(f"{block} has ref_count {block.ref_count}, {count} holders")
        self._check_queues(holders)
        for tier in range(self.num_tiers):
            slots = [slot for block in holders if (slot := block.slots[tier]) is not None]
            if len(slots) != len(set(slots)):
                raise BlockStateError(f"two blocks share a slot of tier {tier}: {sorted(slots)}")

    def _check_queues(self, held: Iterable[KVBlock]) -> None:
        blocks = set(held)
        for waiting in self.waiting:
            rung, clean = waiting.rung, waiting.clean
            for block in waiting:
                if block not in blocks or block.slots[rung] is None or block not in waiting:
                    raise BlockStateError(f"{block} waits for demotion but is not there")
                if (block in clean[block.layer]) == (block.copy_below(rung) is None):
                    raise BlockStateError(f"{block} is in the wrong queue of demotion")
            on_rung = sum(block.slots[rung] is not None for block in blocks)
            if rung != DEVICE and self.num_demotable(rung) != on_rung:
                raise BlockStateError(
                    f"{on_rung} blocks on rung {rung}, {self.num_demotable(rung)} wait for demotion"
                )

    def _touch(self, layer: int) -> None:
        self._versions[layer] = self._versions.get(layer, 0) + 1

    def _queue(self, block: KVBlock, rung: int) -> None:
        """Queue a block that came to a rung."""
        waiting = self.waiting[rung]
        queues = waiting.dirty if block.copy_below(rung) is None else waiting.clean
        queues[block.layer][block] = None

    def _requeue(self, block: KVBlock, rung: int) -> None:
        """See to it that a block, if it is queued on a rung, is in the right queue there."""
        waiting = self.waiting[rung]
        dirty, clean = waiting.dirty[block.layer], waiting.clean[block.layer]
        if block in dirty and block.copy_below(rung) is not None:
            del dirty[block]
            clean[block] = None
        elif block in clean and block.copy_below(rung) is None:
            del clean[block]
            dirty[block] = None
            dirty.move_to_end(block, last=False)  # it came before the others

    def _unqueue(self, block: KVBlock, rung: int) -> None:
        if rung < len(self.waiting):
            self.waiting[rung].dirty[block.layer].pop(block, None)
            self.waiting[rung].clean[block.layer].pop(block, None)

    def _release(self, blocks: Iterable[KVBlock]) -> list[KVBlock]:
        dropped = []
        for block in blocks:
            block.ref_count -= 1
            if block.ref_count == 0:
                for rung in range(self.num_tiers):
                    self._unqueue(block, rung)
                dropped.append(block)
        return dropped

    def _place(self, table: BlockTable, version: int) -> Placement:
        runs: list[Run] = []
        first = 0
        rungs = _rungs(table)
        for index in range(1, len(rungs) + 1):
            if index == len(rungs) or rungs[index] != rungs[first]:
                runs.append(Run(first, index, rungs[first], table.rows))
                first = index
        last_blocks = [row[-1] for row in table.rows if row]
        is_writable = all(
            block.ref_count == 1 and block.is_resident and not self.is_demotable(block)
            for block in last_blocks
        )
        return Placement(version, table.rows, tuple(runs), is_writable)


def _rungs(table: BlockTable) -> list[int | None]:
    """The rung of each column: that of the highest copies of its blocks, None where they differ."""
    rows = [[block.highest for block in row] for row in table.rows]
    if len(rows) == 1:
        return list(rows[0])
    columns = zip(*rows, strict=True)
    return [column[0] if len(set(column)) == 1 else None for column in columns]


def _slots(rows: list[list[KVBlock]], rung: int) -> torch.Tensor:
    """int32 [rows, blocks]: slots on a rung, -1 where there is no copy."""
    slots = [[-1 if (slot := block.slots[rung]) is None else slot for block in row] for row in rows]
    return torch.tensor(slots, dtype=torch.int32).view(len(rows), len(rows[0]) if rows else 0)
