"""The offload managers of one cache and of its forks, and the budgets they share.

Layers whose blocks have the same shape and device share one manager; a model spread over devices,
or one whose layers differ in heads, has several. All of them draw on the same budgets.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_tiered_cache.blocks.block_manager import BlockTable
from hf_tiered_cache.blocks.demotion import DemotionPolicy
from hf_tiered_cache.blocks.offload_manager import OffloadManager
from hf_tiered_cache.blocks.selection import SelectionPolicy
from hf_tiered_cache.config import (
    AUTO_DEVICE_SHARE,
    NO_PACKING,
    Budgets,
    TieredCacheConfig,
    free_memory_bytes,
    tier_knob,
)
from hf_tiered_cache.devices import Device, has_accelerator
from hf_tiered_cache.devices.share import InPlaceShare
from hf_tiered_cache.errors import ClosedCacheError, ConfigError
from hf_tiered_cache.kernels.worker import PROBE_ROUNDS
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.observe.metrics import Counters, LaneStats, TierStats
from hf_tiered_cache.sizes import AUTO
from hf_tiered_cache.store.block_store import BlockStore
from hf_tiered_cache.tiers.base import Budget, Surroundings, Tier
from hf_tiered_cache.tiers.codecs import Bf16TwelveBit, Codec
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.tiers.device_side import BounceRing, behind_lane
from hf_tiered_cache.tiers.disk import DiskTier
from hf_tiered_cache.tiers.disk.store_tier import StoreTier
from hf_tiered_cache.tiers.host import HostTier

logger = logging.get_logger(__name__)

# A disk is busy with this much in flight (measured: 1 MiB records reach its rate at queue depth
# 4); twice that keeps it busy while one half is attended.
STAGING_BYTES = 16 * 1024 * 1024
# A GPU's link carries this much in a few milliseconds, about the time of one token's other work.
STAGING_SHARE = 0.25  # of the device's budget, at most
LANE_STAGING_BYTES = 256 * 1024 * 1024
# Pinned, for what passes between a GPU and the disk, or pageable memory: at most this for blocks of
# one shape on one device (or two blocks), whatever host_bytes says.
BOUNCE_BYTES = 64 * 1024 * 1024
PROBE_BYTES = 1024 * 1024 * 1024  # attended to measure the CPU's rate; some caches hold 512 MiB
PAGE_CACHE_SHARE = 0.25  # of free memory, for what of the disk tier goes through the page cache
MIN_STAGING_BLOCKS = 2  # one is attended while one loads


class BlockMemory:
    """Makes a manager for each (layout, device) on first use; closed when its last owner leaves.
    Owners are the caches that share blocks: one and its forks.

    `expected_tables`: layers that will be kept in blocks, where the model's config told it, else 0.
    `store`: blocks of it may be among them; each manager then has a read-only last rung.
    Raises ConfigError for a config that cannot be had here.
    """

    def __init__(
        self,
        config: TieredCacheConfig,
        expected_tables: int = 0,
        store: BlockStore | None = None,
    ) -> None:
        self.config = config
        self._store = store
        self._stored = Budget("store", 0)
        self._store_tiers: dict[OffloadManager, StoreTier] = {}
        self.budgets = Budgets.resolve(config, device_is_host=not has_accelerator())
        self._demotion = DemotionPolicy.by_name(config.demotion)
        self.selection = SelectionPolicy.by_name(config.attend)()
        _codec_kind(config.packing)  # raises
        self._expected_tables = expected_tables
        self._lower = self._lower_budgets()
        self._bounce = Budget("bounce", 0)  # grows by a ring for each manager behind a lane
        self._places: dict[torch.device, _Place] = {}
        self._managers: dict[tuple[BlockLayout, torch.device], OffloadManager] = {}
        self._owners: dict[int, Mapping[int, _Owned]] = {}  # by identity
        self._has_ended = False

    def _lower_budgets(self) -> list[tuple[type[Tier], Budget]]:
        """The kinds of tiers below a device, from the top down, each with its budget."""
        sizes = self.budgets
        extra = [
            (kind, Budget(kind.name, int(size), knob=tier_knob(given)))
            for given, size in (self.config.extra_tiers or {}).items()
            for kind in [Tier.by_name(given)]
        ]
        lower: list[tuple[type[Tier], Budget]] = [
            (HostTier, Budget("host", sizes.host_bytes, is_auto=sizes.host_is_auto)),
            *extra,
            (DiskTier, Budget("disk", sizes.disk_bytes, is_auto=sizes.disk_is_auto)),
        ]
        asked = [(kind, budget) for kind, budget in lower if budget.limit_bytes]
        for kind, budget in asked[:-1]:
            if not kind.has_addresses:
                raise ConfigError(
                    f"{budget.knob}: the blocks of a {kind.name!r} tier have no addresses, so"
                    f" nothing may lie below it: set {asked[-1][1].knob} to 0"
                )
        return asked

    def __reduce__(self) -> tuple[Any, ...]:
        # What was asked for, still empty.
        return BlockMemory, (self.config, self._expected_tables, self._store)

    @property
    def disk_dir(self) -> Path:
        return self.budgets.disk_dir

    @property
    def managers(self) -> list[OffloadManager]:
        """Every manager made so far."""
        return list(self._managers.values())

    @property
    def is_closed(self) -> bool:
        return self._has_ended

    def manager(
        self, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> OffloadManager:
        """The manager for blocks of such keys and values (`[batch, kv_heads, tokens, dim]`), held
        in `dtype`.

        Raises ClosedCacheError after close, ConfigError when a tier cannot be made.
        """
        dims = max(keys.shape[3], values.shape[3])
        layout = BlockLayout(
            kv_heads=keys.shape[1],
            key_dim=keys.shape[3],
            value_dim=values.shape[3],
            block_tokens=self.config.block_tokens or default_block_tokens(dims, dtype),
            dtype=dtype,
        )
        return self.manager_of(layout, keys.device)

    def manager_of(self, layout: BlockLayout, device: torch.device) -> OffloadManager:
        """The manager for blocks of that layout; raises what `manager` does."""
        if self.is_closed:
            raise ClosedCacheError("this cache is closed: make a new TieredCache")
        key = (layout, device)
        if key not in self._managers:
            self._managers[key] = self._make(layout, device)
        return self._managers[key]

    def _make(self, layout: BlockLayout, device: torch.device) -> OffloadManager:
        place = self._places.get(device) or self._new_place(device)
        lane = place.device.copy_lane
        tier = DeviceTier(layout.num_bytes, place.budget, device, lane)
        staging = staging_slots(
            self.config, place.budget.limit_bytes, layout.num_bytes, has_lane=lane is not None
        )
        lower = self._lower_tiers(layout, place.device)
        stored = None
        if self._store is not None:
            stored = StoreTier(layout.num_bytes, self._stored, self._store.put_away)
            lower.append(stored)
        split = InPlaceShare(1.0 if self.config.cpu_share == AUTO else float(self.config.cpu_share))
        if lane is not None and lower:
            ring = self._bounce_ring(layout, place.device, staging)
            lower = [behind_lane(one, lane, ring) for one in lower]
            split = self._split(place.device, tier, ring)
        manager = OffloadManager(
            layout,
            [tier, *lower],
            staging,
            self._expected_tables,
            split=split,
            in_place=place.device.in_place,
            group_columns=place.device.group_columns(layout),
            lock=place.lock,
            demotion=self._demotion(),
        )
        if stored is not None:
            self._store_tiers[manager] = stored
        for (_, where), other in self._managers.items():
            if where == device:
                other.share_device(manager)
                manager.share_device(other)
        return manager

    def store_tier(self, manager: OffloadManager) -> StoreTier:
        """The rung of a manager where blocks of the store are."""
        return self._store_tiers[manager]

    def _new_place(self, device: torch.device) -> "_Place":
        made = Device.kind_of(device)(device)
        size = self.budgets.device_bytes
        if self.budgets.device_is_auto:
            size = int(made.free_bytes() * AUTO_DEVICE_SHARE)
        self._places[device] = place = _Place(
            made, Budget("device", size, is_auto=self.budgets.device_is_auto)
        )
        return place

    def _lower_tiers(self, layout: BlockLayout, device: Device) -> list[Tier]:
        """The rungs below the device, those that were asked for and hold a block at least."""
        around = Surroundings(
            directory=self.disk_dir,
            disk_io=self.config.disk_io,
            page_cache_bytes=int(free_memory_bytes() * PAGE_CACHE_SHARE),
            pinning=device.pinning,
            cpus_near=device.cpus_near,
            codec=codec_for(self.config.packing, layout),
        )
        tiers = [
            kind.from_budget(layout.num_bytes, budget, around)
            for kind, budget in self._lower
            if budget.limit_bytes >= layout.num_bytes
        ]
        return [tier for tier in tiers if tier is not None]

    def _bounce_ring(self, layout: BlockLayout, device: Device, staging: int) -> BounceRing:
        slots = max(MIN_STAGING_BLOCKS, min(staging, BOUNCE_BYTES // layout.num_bytes))
        self._bounce.limit_bytes += slots * layout.num_bytes
        memory = HostTier(
            layout.num_bytes,
            self._bounce,
            pinning=device.pinning,
            near=device.cpus_near,
        )
        return BounceRing(memory, slots)

    def _split(self, device: Device, tier: DeviceTier, ring: BounceRing) -> InPlaceShare:
        """How host blocks are shared between the lanes of a device, as asked for or measured."""
        assert device.copy_lane is not None
        if device.in_place is None:
            if self.config.cpu_share not in (AUTO, 0):
                logger.warning_once(
                    f"cpu_share={self.config.cpu_share} is not followed: for the CPU to attend host"
                    " blocks both compiled cores are needed (a C++ compiler and nvcc); all blocks"
                    " are carried to the device"
                )
            return InPlaceShare(0.0)
        if self.config.cpu_share != AUTO:
            return InPlaceShare(float(self.config.cpu_share))
        slot = tier.allocate()
        if slot is None:
            return InPlaceShare(0.0)
        pinned, target = ring.slab.unbind(), tier.block(slot)
        copy_rate = device.copy_lane.probe(pinned, target)
        # Memory feeds both lanes at once, so the CPU is measured beside a copy that takes longer.
        memory = self._probe_memory(tier.block_bytes)
        device.copy_lane.occupy(pinned, target, (PROBE_ROUNDS + 1) * memory.numel())
        cpu_rate = device.in_place.probe(memory)
        device.copy_lane.settle()
        tier.free(slot)
        return InPlaceShare.measured(copy_rate, cpu_rate)

    def _probe_memory(self, block_bytes: int) -> torch.Tensor:
        """uint8 `[slots, block_bytes]` that no processor's cache holds, where the budget of the
        host's memory, out of which nothing is taken yet, is that large."""
        free = next((budget.free_bytes for kind, budget in self._lower if kind.has_addresses), 0)
        num_bytes = min(PROBE_BYTES, free)
        return torch.empty((max(1, num_bytes // block_bytes), block_bytes), dtype=torch.uint8)

    def counters(self) -> Counters:
        """The totals of all managers."""
        total = Counters()
        for manager in self.managers:
            total = total + manager.counters
        return total

    def tier_stats(self) -> tuple[TierStats, ...]:
        """One row per device, then one for each kind of tier below that is used; then what passes
        between a device and the disk, whose blocks are counted where they stay."""
        tiers = [tier for manager in self.managers for tier in manager.tiers]
        budgets = [place.budget for place in self._places.values()]
        budgets += [budget for _, budget in self._lower]
        rows = [
            _tier_stats(budget, of_it)
            for budget in budgets
            if (of_it := [tier for tier in tiers if tier.budget is budget])
        ]
        if self._bounce.limit_bytes:
            rows.append(_tier_stats(self._bounce, [], where="host memory, passing"))
        return tuple(rows)

    def lane_stats(self) -> tuple[LaneStats, ...]:
        """A row for each lane of each device other than the CPU."""
        rows = []
        for device, place in self._places.items():
            managers = [m for (_, where), m in self._managers.items() if where == device]
            share = managers[0].split.cpu_share if managers else 0.0
            lanes = (
                ("copy lane", 1 - share, place.device.copy_lane),
                ("in-place attention", share, place.device.in_place),
            )
            for name, part, lane in lanes:
                if lane is not None:
                    rows.append(LaneStats(name, part, **vars(lane.measure())))
        return tuple(rows)

    def kernels(self) -> list[str]:
        """The kernel of each kind of device, as `ops.backend` names it."""
        return list(dict.fromkeys(place.device.kernel for place in self._places.values()))

    def add_owner(self, tables: Mapping[int, "_Owned"]) -> None:
        """These tables belong to a cache (by layer; they may change), which calls `release`."""
        self._owners[id(tables)] = tables

    def release(self, tables: Mapping[int, "_Owned"]) -> None:
        """An owner leaves: its tables are dropped, and after the last one everything is closed.

        May be called by garbage collection, at any moment and in any thread; repeatable, should it
        be interrupted.
        """
        self._owners.pop(id(tables), None)
        if self._owners:
            for manager, table in tables.values():
                manager.abandon_table(table)
            return
        self._has_ended = True
        for place in self._places.values():
            place.device.close()  # it reads what is closed next
        for manager in self.managers:
            manager.close()


def staging_slots(
    config: TieredCacheConfig, device_bytes: int, block_bytes: int, *, has_lane: bool
) -> int:
    """Slots that are wished for cold blocks passing through, of a budget on a device with or
    without a copy lane."""
    num_bytes = config.staging_bytes
    if num_bytes == AUTO:
        most = LANE_STAGING_BYTES if has_lane else STAGING_BYTES
        num_bytes = min(most, int(device_bytes * STAGING_SHARE))
    return max(MIN_STAGING_BLOCKS, int(num_bytes) // block_bytes)


_Owned = tuple[OffloadManager, BlockTable]


@dataclass
class _Place:
    """What the managers on one device share."""

    device: Device
    budget: Budget
    lock: threading.RLock = field(default_factory=threading.RLock)


def codec_for(packing: str, layout: BlockLayout) -> Codec | None:
    """What blocks of a layout are encoded with on disk. Raises ConfigError for a codec that was
    asked for and cannot do it."""
    kind = _codec_kind(packing)
    if kind is None:
        return None
    if packing != AUTO:
        return kind(layout)
    if kind.refusal(layout):
        return None
    codec = kind(layout)
    # Plain torch packs at less than a disk's rate.
    pays = codec.encoded_bytes < layout.num_bytes and codec.core_arguments is not None
    return codec if pays else None


def _codec_kind(packing: str) -> type[Codec] | None:
    """The codec that `packing` names; None: there is none. Raises ConfigError."""
    if packing == NO_PACKING:
        return None
    kind: type[Codec] = Bf16TwelveBit if packing == AUTO else Codec.by_name(packing)
    if not kind.exact:
        raise ConfigError(f"packing={packing!r} is approximate; expected a codec that is exact")
    return kind


def _tier_stats(budget: Budget, tiers: Sequence[Tier], where: str = "") -> TierStats:
    return TierStats(
        name=budget.name,
        blocks=sum(tier.used_slots for tier in tiers),
        raw_bytes=sum(tier.used_slots * tier.block_bytes for tier in tiers),
        packed_bytes=sum(tier.used_bytes for tier in tiers),
        used_bytes=budget.used_bytes,
        peak_bytes=budget.peak_bytes,
        budget_bytes=budget.limit_bytes,
        is_auto=budget.is_auto,
        where=where or " + ".join(dict.fromkeys(tier.where for tier in tiers)),
    )
