"""Where the blocks of a context will lie under a budget, as `TieredCache.stats()` will show them.

Counts only, by the laws of `blocks`: a device holds what is left of its slots beside staging, the
oldest blocks lie lowest, and as many blocks as a forward may ask for are kept free or have a copy
below, so that a decode step need not wait for a store.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_tiered_cache.errors import OutOfBlocksError
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.tiers import DiskTier, HostTier
from hf_tiered_cache.tiers.slots import committed_slots

HOST, DISK = HostTier.name, DiskTier.name
LEAST_STAGING = 2  # columns: one is attended while one loads


@dataclass(frozen=True)
class CacheShape:
    """What is kept in blocks: layers of one layout, `batch` sequences."""

    layout: BlockLayout
    num_layers: int
    batch: int = 1

    @property
    def column_blocks(self) -> int:
        """Blocks of all layers and sequences that hold the same tokens."""
        return self.num_layers * self.batch

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token of one sequence, in all layers."""
        return self.layout.data_bytes // self.layout.block_tokens * self.num_layers

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of a context in all layers and sequences."""
        return self.layout.num_blocks(num_tokens) * self.column_blocks


@dataclass(frozen=True)
class TierSizes:
    """Bytes of each rung; those of host and disk are 0 where there is none."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    staging_slots: int
    group_columns: int = 1  # blocks of a sequence that the device's attention takes at once
    device_is_host: bool = True  # else the device's budget is taken at once
    record_bytes: int | None = None  # of a block on disk, where that is less than its bytes


@dataclass(frozen=True)
class TierPlacement:
    """One tier: `home_blocks` are read from here, `blocks` with the copies of those above."""

    name: str
    home_blocks: int
    blocks: int
    block_bytes: int  # of each, here
    used_bytes: int  # held of the budget
    budget_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where every block of a context lies."""

    shape: CacheShape
    num_tokens: int
    staging_slots: int  # kept for cold blocks, of the device's
    tiers: tuple[TierPlacement, ...]  # from the device down

    def home_bytes(self, name: str) -> int:
        """Bytes that are read from a tier for each token, packed where they lie packed."""
        return sum(t.home_blocks * t.block_bytes for t in self.tiers if t.name == name)

    @property
    def resident_bytes(self) -> int:
        return self.tiers[0].home_blocks * self.shape.layout.num_bytes

    @property
    def cold_bytes(self) -> int:
        """Bytes with no copy on the device."""
        below = sum(tier.home_blocks for tier in self.tiers[1:])
        return below * self.shape.layout.num_bytes

    @property
    def staging_bytes(self) -> int:
        return self.staging_slots * self.shape.layout.num_bytes


def place(shape: CacheShape, num_tokens: int, sizes: TierSizes, chunk: int) -> Placement:
    """The placement once `num_tokens` of every sequence were written, `chunk` at a time, and stores
    have ended. Raises OutOfBlocksError, with the knob, where they do not fit."""
    block_bytes, per_column = shape.layout.num_bytes, shape.column_blocks
    rungs = [
        (name, size)
        for name, size in ((HOST, sizes.host_bytes), (DISK, sizes.disk_bytes))
        if size >= block_bytes
    ]
    most = sizes.device_bytes // block_bytes
    least = LEAST_STAGING * sizes.group_columns * shape.batch if rungs else 0
    if most < per_column + least:
        raise OutOfBlocksError(
            f"device_bytes={format_bytes(sizes.device_bytes)} is too small: {per_column} filling"
            f" blocks and {least} staging blocks of {format_bytes(block_bytes)} must be there: the"
            f" smallest device_bytes that works is {(per_column + least) * block_bytes}"
            f" ({format_bytes((per_column + least) * block_bytes)})"
        )
    staging = min(max(sizes.staging_slots, least), most - per_column) if rungs else 0
    left = shape.num_blocks(num_tokens)
    resident = min(left, most - staging)
    held = resident if sizes.device_is_host else most
    tiers = [
        TierPlacement(
            "device", resident, resident, block_bytes, held * block_bytes, sizes.device_bytes
        )
    ]
    left -= resident
    num_free = most - staging - resident
    ahead = _copies_ahead(shape, num_tokens, chunk, resident, num_free, is_full=left > 0)
    for rung, (name, size) in enumerate(rungs):
        own_bytes = sizes.record_bytes or block_bytes if name == DISK else block_bytes
        slots, is_last = size // own_bytes, rung == len(rungs) - 1
        blocks = min(slots, left + ahead)
        # Copies of what lies above give way only where the tier is the last.
        home = min(left, slots if is_last else max(0, slots - ahead))
        used = _committed(name, blocks, size, own_bytes) * own_bytes
        tiers.append(TierPlacement(name, home, blocks, own_bytes, used, size))
        left -= home
        ahead = max(0, min(per_column - (slots - blocks), home)) if blocks else 0
    if left:
        raise OutOfBlocksError(
            f"no room for {left} blocks ({format_bytes(left * block_bytes)}) of {num_tokens:,}"
            f" tokens: raise {' or '.join(f'{tier.name}_bytes' for tier in reversed(tiers))}"
            + ("" if any(name == DISK for name, _ in rungs) else " or allow disk_bytes")
        )
    return Placement(shape, num_tokens, staging, tuple(tiers))


def _copies_ahead(
    shape: CacheShape, num_tokens: int, chunk: int, resident: int, num_free: int, is_full: bool
) -> int:
    """Blocks on the device that have a copy below: whenever a block became full there were as many
    of these and of free slots as one column has blocks. Their number may differ by a few where a
    layer of the device has none left that could be copied."""
    tokens = shape.layout.block_tokens
    full_columns, filling = divmod(num_tokens, tokens)
    wanted, taken = shape.column_blocks, 0
    if filling and is_full:
        # What fills now took such copies' room: of all layers, where their last tokens filled
        # nothing; else of the last layer only, which made good for those before it.
        taken = wanted if full_columns * tokens % chunk == 0 else shape.batch
    elif filling and full_columns * tokens % chunk == 0:
        num_free += wanted
    return max(0, min(wanted - taken - num_free, resident - (wanted if filling else 0)))


def _committed(name: str, num_used: int, size: int, block_bytes: int) -> int:
    kind: type[HostTier] | type[DiskTier] = HostTier if name == HOST else DiskTier
    step = kind.step_slots(block_bytes, size)
    return committed_slots(num_used, step, size // block_bytes, grows_ahead=name == HOST)


def seen_before(context: int, chunk: int) -> Sequence[tuple[int, int]]:
    """(tokens before, tokens of) each chunk of a prefill."""
    return [(first, min(chunk, context - first)) for first in range(0, context, chunk)]
