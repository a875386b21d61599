"""How the columns of a table come to attention: `ReadingPlan`.

Resident blocks are attended where they lie, cold ones in staging. Where blocks below the device
have addresses, the oldest part of each run of them, as large as the lanes' split says, is attended
where it lies; on a device with in-place attention that part is planned `beside`.

A plan follows from where blocks are, so it is kept with a table's placement and made anew only
after something moved: in decode nearly never.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_tiered_cache.blocks.block_manager import BlockTable, KVBlock, Placement, Run
from hf_tiered_cache.blocks.selection import Columns
from hf_tiered_cache.kernels import ops


@dataclass(eq=False)
class InPlace:
    """Columns [first, last) of a run, attended where they lie."""

    first: int
    last: int
    run: Run
    view: ops.BlockView | None = None  # kept by whoever shows them to kernels

    @property
    def rung(self) -> int:
        """Where they lie."""
        assert self.run.rung is not None
        return self.run.rung

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [batch, last - first], on the run's rung."""
        return self.run.slots[:, self.first - self.run.first : self.last - self.run.first]

    @cached_property
    def slot_list(self) -> list[int]:
        """The same, row by row."""
        return self.slots.flatten().tolist()


@dataclass(frozen=True, eq=False)
class Staging:
    """Columns [first, last) that go through staging at once."""

    first: int
    last: int
    cold: list[KVBlock]  # those to be staged, each once
    num_done: int  # of the plan's cold blocks, with these
    rows: list[list[KVBlock]]  # of these columns
    resident: dict[KVBlock, int]  # slots of those that are on the device


@dataclass(frozen=True, eq=False)
class ReadingPlan:
    """How columns come to attention, in block order."""

    key: tuple[object, ...]  # what it follows from, besides the placement
    parts: list[InPlace | Staging]
    cold: list[KVBlock]  # all that is staged

    @cached_property
    def below(self) -> list[InPlace]:
        """The parts that are attended where they lie, below the device."""
        parts = [part for part in self.parts if isinstance(part, InPlace)]
        return [part for part in parts if not part.run.is_resident]


def reading_plan(
    table: BlockTable,
    placement: Placement,
    selected: Columns,
    has_gaps: bool,
    chunk_blocks: int,
    group_columns: int,
    rungs: Collection[int],
    share: float,
    beside: bool,
) -> ReadingPlan:
    """The plan for the selected columns of a table.

    has_gaps: some of the columns before the last one that is asked for are not among them; they are
    read as they come then, for nobody attends them in groups. chunk_blocks: to be staged at once.
    group_columns: what the device attends begins and ends at multiples of so many columns, or with
    the table; not with `beside`, where the parts below it are attended beside the device. share: of
    each run on one of `rungs`, attended where it lies.
    """
    key = (selected, chunk_blocks, share)
    plan: ReadingPlan | None = placement.plans.get((beside, has_gaps))
    if plan is None or plan.key != key:
        columns = chunk_blocks // max(1, table.batch) // group_columns * group_columns
        if group_columns > 1 and not beside and not has_gaps and selected:
            parts = _groups(placement, selected[-1].stop, group_columns)
        else:
            parts = _runs(placement, selected, rungs, share)
        plan = _cut(table, key, parts, max(group_columns, columns))
        placement.plans[beside, has_gaps] = plan
    return plan


def _cut(
    table: BlockTable,
    key: tuple[object, ...],
    parts: Iterable[InPlace | tuple[int, int]],
    columns: int,
) -> ReadingPlan:
    """Cut what goes through staging into so many columns at once."""
    ready: list[InPlace | Staging] = []
    cold: list[KVBlock] = []
    for part in parts:
        if isinstance(part, InPlace):
            ready.append(part)
            continue
        first, last = part
        for begin in range(first, last, columns):
            end = min(begin + columns, last)
            rows = [row[begin:end] for row in table.rows]
            blocks = list(table.blocks(begin, end))
            staged = [block for block in blocks if not block.is_resident]
            cold += staged
            resident = {block: block.device_slot for block in blocks if block.is_resident}
            ready.append(Staging(begin, end, staged, len(cold), rows, resident))
    return ReadingPlan(key, ready, cold)


def _runs(
    placement: Placement, selected: Columns, rungs: Collection[int], share: float
) -> Iterator[InPlace | tuple[int, int]]:
    """Columns by how they come to attention; those [first, last) go through staging."""
    for run in placement.runs:
        end = run.first  # of what is attended where it lies
        if run.is_resident:
            end = run.last
        elif run.rung in rungs:
            end = run.first + round(share * (run.last - run.first))
        for columns in selected:
            first, last = max(run.first, columns.start), min(run.last, columns.stop)
            cut = min(max(first, end), last)
            if first < cut:
                yield InPlace(first, cut, run)
            if cut < last:
                yield cut, last


def _groups(
    placement: Placement, num_blocks: int, group_columns: int
) -> Iterator[InPlace | tuple[int, int]]:
    """The same with borders between groups of columns only: a group that is partly cold goes
    through staging, and its resident blocks are attended where they lie all the same."""
    group, done = group_columns, 0
    for run in [run for run in placement.runs if run.is_resident]:
        first = -(-run.first // group) * group
        last = num_blocks if run.last >= num_blocks else run.last // group * group
        if first < last:
            if done < first:
                yield done, first
            yield InPlace(first, last, run)
            done = last
    if done < num_blocks:
        yield done, num_blocks
