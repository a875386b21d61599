"""What several tests need: managers of a given size, tokens that are told apart, tiny models."""

import copy
import gc
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tiers.faulty_file import FaultyFile
from torch import Tensor

from hf_tiered_cache.blocks.block_manager import BlockTable
from hf_tiered_cache.blocks.block_reader import Chunk
from hf_tiered_cache.blocks.demotion import DemotionPolicy
from hf_tiered_cache.blocks.offload_manager import OffloadManager
from hf_tiered_cache.blocks.selection import ALL, ResidentOnly, SelectionPolicy
from hf_tiered_cache.devices.share import InPlaceShare
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers import Budget, DeviceTier, DiskTier, HostTier
from hf_tiered_cache.transfers import Transfer

BLOCK_TOKENS = 4
LAYOUT = BlockLayout(
    kv_heads=2, key_dim=8, value_dim=4, block_tokens=BLOCK_TOKENS, dtype=torch.float32
)
BLOCK_BYTES = LAYOUT.num_bytes


class RecordingDisk(DiskTier):
    """A disk tier that remembers which slots were read and written, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads: list[list[int]] = []
        self.writes: list[list[int]] = []

    def read(self, slots, out) -> Transfer:
        self.reads.append(list(slots))
        return super().read(slots, out)

    def write(self, slots, data) -> Transfer:
        self.writes.append(list(slots))
        return super().write(slots, data)

    @property
    def read_slots(self) -> list[int]:
        """Every slot read so far, in order."""
        return [slot for slots in self.reads for slot in slots]

    @property
    def file(self) -> FaultyFile:
        """The file below, where faults can be planned (`faulty=True`)."""
        assert isinstance(self._file, FaultyFile)
        return self._file

    def break_every(self, kind: str, fault: Any, calls: int = 1000) -> None:
        """Let the next `calls` calls of a kind ("read", "write", "reserve") play `fault`."""
        next_call = self.file.num_calls[kind]
        for number in range(next_call, next_call + calls):
            self.file.plan[kind, number] = fault

    def heal(self) -> None:
        """No more faults."""
        self.file.plan.clear()


def make_manager(
    folder: Path,
    device_blocks: int,
    disk_blocks: int = 1000,
    staging: int = 2,
    expected_tables: int = 0,
    faulty: bool = False,
    layout: BlockLayout = LAYOUT,
    host_blocks: int = 0,
    cpu_share: float = 0.0,
    group_columns: int = 1,
    demotion: DemotionPolicy | None = None,
) -> OffloadManager:
    """A manager over a poisoned device tier and, unless `disk_blocks` is 0, a recording disk; with
    `host_blocks` a poisoned host tier between them."""
    device = DeviceTier(layout.num_bytes, Budget("device", device_blocks * layout.num_bytes))
    device.poison = True
    tiers: list[Any] = [device]
    if host_blocks:
        tiers.append(HostTier(layout.num_bytes, Budget("host", host_blocks * layout.num_bytes)))
        tiers[-1].poison = True
    if disk_blocks:
        knobs = {"open_file": FaultyFile} if faulty else {}
        budget = Budget("disk", disk_blocks * layout.num_bytes)
        tiers.append(
            RecordingDisk(layout.num_bytes, budget, folder, io="buffered", num_threads=2, **knobs)
        )
    return OffloadManager(
        layout,
        tiers,
        staging,
        expected_tables,
        split=InPlaceShare(cpu_share),
        group_columns=group_columns,
        demotion=demotion,
    )


_token = count(1)


def new_tokens(batch: int, num_tokens: int, layout: BlockLayout = LAYOUT) -> tuple[Tensor, Tensor]:
    """Keys and values that no other token, head or channel has."""
    first = torch.tensor([next(_token) for _ in range(batch * num_tokens)], dtype=layout.dtype)
    token = first.view(batch, 1, num_tokens, 1)
    head = torch.arange(layout.kv_heads, dtype=layout.dtype).view(1, -1, 1, 1) / 4
    keys = token + head + torch.arange(layout.key_dim, dtype=layout.dtype) / 64
    values = -(token + head + torch.arange(layout.value_dim, dtype=layout.dtype) / 64)
    return keys, values


def chunks(
    manager: OffloadManager,
    table: BlockTable,
    scan: Sequence[BlockTable] = (),
    num_tokens: int | None = None,
    selection: SelectionPolicy = ALL,
) -> Iterator[Chunk]:
    """The chunks of one reading."""
    tokens = table.num_tokens if num_tokens is None else num_tokens
    shown = SimpleNamespace(table=table, scan=scan, num_tokens=tokens)
    with manager.read_lock, manager.read(shown, selection) as reading:
        yield from reading.chunks()


@contextmanager
def without_cold_blocks() -> Iterator[None]:
    """Caches made meanwhile lose what is not on the device: what compares tokens must see it."""
    with patch.dict(SelectionPolicy.registry, all=ResidentOnly):
        yield


def read_table(
    manager: OffloadManager, table: BlockTable, scan: list[BlockTable] | None = None
) -> tuple[Tensor, Tensor]:
    """The dense keys and values of a table as they come out of the stream."""
    layout = table.layout
    keys = torch.full((table.batch, layout.kv_heads, table.num_tokens, layout.key_dim), torch.nan)
    values = torch.full((*keys.shape[:3], layout.value_dim), torch.nan)
    next_column = 0
    for chunk in chunks(manager, table, scan or [table]):
        slab = manager.tiers[chunk.rung].slab
        assert chunk.first == next_column, "columns come in order, each once"
        assert chunk.first % manager.group_columns == 0, "chunks begin with a group"
        for offset, slots in enumerate(chunk.slots.long().unbind(1)):
            first = (chunk.first + offset) * layout.block_tokens
            last = min(first + layout.block_tokens, table.num_tokens)
            keys[:, :, first:last] = layout.keys(slab)[slots][:, :, : last - first]
            values[:, :, first:last] = layout.values(slab)[slots][:, :, : last - first]
        next_column += chunk.slots.shape[1]
    assert next_column == table.num_blocks
    return keys, values


@dataclass
class Shadowed:
    """A table and what it should hold, as plain dense tensors."""

    manager: OffloadManager
    table: BlockTable
    keys: Tensor
    values: Tensor

    @classmethod
    def new(cls, manager: OffloadManager, layer: int = 0, batch: int = 1) -> "Shadowed":
        layout = manager.layout
        table = manager.new_table(layer, batch)
        keys = torch.empty(batch, layout.kv_heads, 0, layout.key_dim)
        values = torch.empty(batch, layout.kv_heads, 0, layout.value_dim)
        return cls(manager, table, keys, values)

    def append(self, num_tokens: int) -> None:
        keys, values = new_tokens(self.table.batch, num_tokens)
        self.manager.append(self.table, keys, values)
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)

    def truncate(self, num_tokens: int) -> None:
        self.manager.truncate(self.table, num_tokens)
        self.keys, self.values = self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens]

    def select_rows(self, rows: list[int]) -> None:
        self.manager.select_rows(self.table, rows)
        self.keys, self.values = self.keys[rows], self.values[rows]

    def fork(self) -> "Shadowed":
        table = self.manager.blocks.fork(self.table)
        return Shadowed(self.manager, table, self.keys.clone(), self.values.clone())

    def drop(self) -> None:
        self.manager.drop_table(self.table)

    def check(self, scan: list[BlockTable] | None = None) -> None:
        """The stream gives what was appended, bit for bit."""
        assert self.table.num_tokens == self.keys.shape[2]
        keys, values = read_table(self.manager, self.table, scan)
        assert torch.equal(keys, self.keys)
        assert torch.equal(values, self.values)


RUNGS = "Dhd"


def addresses(table: BlockTable, row: int = 0) -> str:
    """One word per block of a table over three rungs: the letters D, h, d of those it is on."""
    return " ".join(
        "".join(letter for letter, slot in zip(RUNGS, block.slots, strict=True) if slot is not None)
        for block in table.rows[row]
    )


def placement(table: BlockTable, row: int = 0) -> str:
    """One letter per block: D on the device only, b both there and on disk, d on disk only."""
    letters = {(True, False): "D", (True, True): "b", (False, True): "d"}
    return "".join(letters[block.is_resident, block.is_stored] for block in table.rows[row])


def settle(manager: OffloadManager) -> None:
    """Wait for the stores and loads under way."""
    for table in manager.blocks.tables:
        for block in table.blocks():
            for store in block.stores:
                store.wait()


@dataclass
class Footprint:
    """What this process holds of the operating system on behalf of caches."""

    threads: set[str] = field(default_factory=set)
    deleted_files: int = 0

    @classmethod
    def now(cls, collect: bool = True) -> "Footprint":
        """collect: what only cycles of garbage hold does not count."""
        if collect:
            gc.collect()
        names = {t.name for t in threading.enumerate() if "hf_tiered_cache" in t.name}
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue  # the descriptor of the listing itself
        return cls(names, sum("(deleted)" in link for link in links))


def sharpen(model: torch.nn.Module, factor: float = 4.0) -> torch.nn.Module:
    """Make attention of a random model matter: flat logits would hide wrong keys and values."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(factor)
    return model.eval()


def double_copy(model: torch.nn.Module) -> Any:
    """The same model in float64."""
    return copy.deepcopy(model).double()
