"""A disk of a known rate on any machine: `SlowDisk`.

    SlowDisk.bytes_per_second = 500e6
    TieredCache(extra_tiers={"slow_disk:SlowDisk": "8GiB"}, disk_bytes=0)

Blocks lie in memory, and a read ends when a disk of that rate would have ended it, one after the
other in the order in which they were begun. So a benchmark of a method says the same on machines
with fast and with slow disks, and measures no page cache.
"""

import threading
from queue import SimpleQueue
from time import perf_counter, sleep
from typing import ClassVar

import torch

from hf_tiered_cache.tiers import PooledTier
from hf_tiered_cache.transfers import DONE, Transfer


class SlowDisk(PooledTier, name="slow_disk"):
    """Reads at `bytes_per_second`; writes at once."""

    bytes_per_second: ClassVar[float] = 500e6

    def __init__(self, block_bytes, budget):
        super().__init__(block_bytes, budget)
        self._blocks: dict[int, torch.Tensor] = {}
        self._reads: SimpleQueue[tuple[Transfer, float, float] | None] = SimpleQueue()
        self._free_at = 0.0  # when the last read will have ended
        self._last: Transfer = DONE
        threading.Thread(target=_end_in_time, args=(self._reads,), daemon=True).start()

    def write(self, slots, data):
        self.check_move(slots, data)
        for slot, block in zip(slots, data, strict=True):
            self._blocks[slot] = block.clone()
        return DONE

    def read(self, slots, out):
        self.check_move(slots, out)
        for slot, block in zip(slots, out, strict=True):
            block.copy_(self._blocks[slot])
        began = max(perf_counter(), self._free_at)
        self._free_at = began + len(slots) * self.block_bytes / self.bytes_per_second
        self._last = transfer = Transfer()
        self._reads.put((transfer, began, self._free_at))
        return transfer

    def drain(self):
        super().drain()
        self._last.outlast()

    def free(self, slot):
        super().free(slot)
        self._blocks.pop(slot, None)

    def close(self):
        super().close()
        self._blocks.clear()
        self._reads.put(None)


def _end_in_time(reads: SimpleQueue) -> None:
    while (read := reads.get()) is not None:
        transfer, began, ended = read
        sleep(max(0.0, ended - perf_counter()))
        transfer.end_part(began=began, ended=ended)
