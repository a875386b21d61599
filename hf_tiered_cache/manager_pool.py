"""The offload managers of one cache and of its forks, and the budgets they share.

Layers whose blocks have the same shape and device share one manager; a model spread over devices,
or one whose layers differ in heads, has several. All of them draw on the same budgets.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from hf_tiered_cache.block_manager import BlockTable
from hf_tiered_cache.config import Budgets, TieredCacheConfig, free_memory_bytes
from hf_tiered_cache.errors import ClosedCacheError, UnsupportedInputError
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.metrics import Counters, TierStats
from hf_tiered_cache.offload_manager import OffloadManager
from hf_tiered_cache.sizes import AUTO
from hf_tiered_cache.tiers.base import Budget, Tier
from hf_tiered_cache.tiers.device import DeviceTier
from hf_tiered_cache.tiers.disk import DiskTier
from hf_tiered_cache.tiers.host import HostTier
from hf_tiered_cache.tiers.pinning import CudaPinning

# A disk is busy with this much in flight (measured: 1 MiB records reach its rate at queue depth
# 4); twice that keeps it busy while one half is attended.
STAGING_BYTES = 16 * 1024 * 1024
PAGE_CACHE_SHARE = 0.25  # of free memory, for what of the disk tier goes through the page cache
MIN_STAGING_BLOCKS = 2  # one is attended while one loads


class ManagerPool:
    """Makes a manager for each (layout, device) on first use; closed when its last owner leaves.

    `expected_tables`: layers that will be kept in blocks, where the model's config told it, else 0.
    """

    def __init__(self, config: TieredCacheConfig, expected_tables: int = 0) -> None:
        self.config = config
        self.budgets = Budgets.resolve(config)
        self._expected_tables = expected_tables
        self._host = Budget("host", self.budgets.host_bytes)
        self._disk = Budget("disk", self.budgets.disk_bytes)
        self._devices: dict[torch.device, Budget] = {}
        self._managers: dict[tuple[BlockLayout, torch.device], OffloadManager] = {}
        self._num_owners = 1

    @property
    def disk_dir(self) -> Path:
        return self.budgets.disk_dir

    @property
    def managers(self) -> list[OffloadManager]:
        """Every manager made so far."""
        return list(self._managers.values())

    @property
    def is_closed(self) -> bool:
        return self._num_owners == 0

    def manager(self, keys: torch.Tensor, values: torch.Tensor) -> OffloadManager:
        """The manager for blocks of such keys and values (`[batch, kv_heads, tokens, dim]`).

        Raises ClosedCacheError after close, ConfigError when a tier cannot be made.
        """
        if self.is_closed:
            raise ClosedCacheError("this cache is closed: make a new TieredCache")
        dims = max(keys.shape[3], values.shape[3])
        layout = BlockLayout(
            kv_heads=keys.shape[1],
            key_dim=keys.shape[3],
            value_dim=values.shape[3],
            block_tokens=self.config.block_tokens or default_block_tokens(dims, keys.dtype),
            dtype=keys.dtype,
        )
        key = (layout, keys.device)
        if key not in self._managers:
            self._managers[key] = self._make(layout, keys.device)
        return self._managers[key]

    def _make(self, layout: BlockLayout, device: torch.device) -> OffloadManager:
        if device.type != "cpu":
            raise UnsupportedInputError(
                f"keys and values on {device}: this version keeps blocks in CPU memory and on disk "
                "only; move the model to the CPU, or use transformers' DynamicCache on this device"
            )
        budget = self._devices.get(device) or Budget("device", self.budgets.device_bytes)
        self._devices[device] = budget
        tiers: list[Tier] = [DeviceTier(layout.num_bytes, budget, device)]
        is_wanted = device.type != "cpu" or not self.budgets.host_is_auto
        if is_wanted and self._host.limit_bytes >= layout.num_bytes:
            pinning = CudaPinning() if device.type == "cuda" else None
            tiers.append(HostTier(layout.num_bytes, self._host, pinning=pinning))
        if self._disk.limit_bytes >= layout.num_bytes:
            tiers.append(
                DiskTier(
                    layout.num_bytes,
                    self._disk,
                    self.disk_dir,
                    io=self.config.disk_io,
                    page_cache_bytes=int(free_memory_bytes() * PAGE_CACHE_SHARE),
                )
            )
        staging = self._staging_bytes(budget) // layout.num_bytes
        manager = OffloadManager(
            layout, tiers, max(staging, MIN_STAGING_BLOCKS), self._expected_tables
        )
        others = [other for (_, where), other in self._managers.items() if where == device]
        for sharer in [*others, manager] if others else []:
            sharer.share_device()
        return manager

    def _staging_bytes(self, budget: Budget) -> int:
        if self.config.staging_bytes == AUTO:
            return min(STAGING_BYTES, budget.limit_bytes // 4)
        return int(self.config.staging_bytes)

    def counters(self) -> Counters:
        """The totals of all managers."""
        total = Counters()
        for manager in self.managers:
            total = total + manager.counters
        return total

    def tier_stats(self) -> tuple[TierStats, ...]:
        """One row per device, then the host's memory where it is used, then the disk."""
        budgets = self.budgets
        rows = []
        for device, budget in self._devices.items():
            tiers = [m.device_tier for (_, d), m in self._managers.items() if d == device]
            rows.append(_tier_stats("device", tiers, budget, budgets.device_is_auto, str(device)))
        lower = [tier for manager in self.managers for tier in manager.tiers[1:]]
        hosts = [tier for tier in lower if isinstance(tier, HostTier)]
        if hosts:
            kind = " + ".join(dict.fromkeys(tier.memory_kind for tier in hosts))
            rows.append(_tier_stats("host", hosts, self._host, budgets.host_is_auto, kind))
        if self._disk.limit_bytes:
            disks = [tier for tier in lower if isinstance(tier, DiskTier)]
            where = str(self.disk_dir)
            rows.append(_tier_stats("disk", disks, self._disk, budgets.disk_is_auto, where))
        return tuple(rows)

    def share(self) -> "ManagerPool":
        """Count one more owner (a fork); each owner calls `release` once."""
        self._num_owners += 1
        return self

    def release(self, tables: Iterable[tuple[OffloadManager, BlockTable]]) -> None:
        """An owner leaves: its tables are dropped, and after the last one everything is closed.

        May be called by garbage collection, at any moment and in any thread.
        """
        self._num_owners -= 1
        if self._num_owners == 0:
            for manager in self.managers:
                manager.close()
        else:
            for manager, table in tables:
                manager.abandon_table(table)


def _tier_stats(
    name: str, tiers: Iterable[Tier], budget: Budget, is_auto: bool, where: str
) -> TierStats:
    return TierStats(
        name=name,
        blocks=sum(tier.used_slots for tier in tiers),
        used_bytes=budget.used_bytes,
        peak_bytes=budget.peak_bytes,
        budget_bytes=budget.limit_bytes,
        is_auto=is_auto,
        where=where,
    )
