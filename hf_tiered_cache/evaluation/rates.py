"""How fast this machine's memory and disk give bytes back, and torch multiplies, in a few seconds.

The disk is asked through the disk tier itself, checksums included: what it reads here is what a
decode can be fed with.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.tiers import Budget, DiskTier
from hf_tiered_cache.transfers import Transfer

RECORD_BYTES = 1024 * 1024
NUM_IN_FLIGHT = 16  # records; at queue depth 4 such records reach a disk's rate
MEMORY_BYTES = 512 * 1024 * 1024  # far more than any cache of a processor holds
FILE_BYTES = 512 * 1024 * 1024
MIN_FILE_BYTES = 64 * 1024 * 1024
SECONDS = 1.5  # for each figure
MATMUL_ROWS, MATMUL_WIDTH = 64, 512  # a prefill's shape; larger ones differ as much
MATMUL_ROUNDS = 7


@dataclass(frozen=True)
class DiskRates:
    """Bytes per second. `is_direct`: past the page cache (O_DIRECT)."""

    write: float
    read: float
    is_direct: bool
    num_bytes: int  # written, then read


def memory_read_rate(seconds: float = SECONDS) -> float:
    """Bytes per second of reading RAM with torch's threads; the best of what fits in `seconds`."""
    num_bytes = min(MEMORY_BYTES, free_memory_bytes() // 4)
    numbers = torch.ones(num_bytes // 8, dtype=torch.int64)
    best, begun = 0.0, perf_counter()
    while perf_counter() - begun < seconds or not best:
        start = perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (perf_counter() - start))
    return best


def matmul_slowdown(dtype: torch.dtype) -> float:
    """Time of torch's matmul on the CPU in `dtype` over float32's; far above 1 where the processor
    has no instructions for it (AVX2, bfloat16: 20 to 30; measured, so no processor need be known).

    One thread, and the fastest of rounds in turn: others on the machine do not count.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
        for _ in range(MATMUL_ROUNDS):
            for one, times in seconds.items():
                rows = torch.ones(MATMUL_ROWS, MATMUL_WIDTH, dtype=one)
                weights = torch.ones(MATMUL_WIDTH, MATMUL_WIDTH, dtype=one)
                start = perf_counter()
                torch.nn.functional.linear(rows, weights)
                times.append(perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return min(seconds[dtype]) / min(seconds[torch.float32])


def disk_rates(
    directory: str | os.PathLike[str], is_direct: bool, seconds: float = SECONDS
) -> DiskRates | None:
    """Write records of 1 MiB into an unnamed file of `directory` and read them, each for about
    `seconds`; None where too little space is free. Raises TierIOError, ConfigError."""
    space = os.statvfs(directory)
    num_bytes = min(FILE_BYTES, space.f_bavail * space.f_frsize // 4)
    if num_bytes < MIN_FILE_BYTES:
        return None
    tier = DiskTier(
        RECORD_BYTES,
        Budget("disk", num_bytes),
        directory,
        io="direct" if is_direct else "buffered",
    )
    try:
        memory = torch.randint(0, 256, (NUM_IN_FLIGHT, RECORD_BYTES), dtype=torch.uint8)
        slots = [
            slot for _ in range(num_bytes // RECORD_BYTES) if (slot := tier.allocate()) is not None
        ]
        write, num_written = _rate(tier.write, slots, memory, seconds)
        read, _ = _rate(tier.read, slots[:num_written], memory, seconds)
        return DiskRates(write, read, is_direct, num_written * RECORD_BYTES)
    finally:
        tier.close()


def _rate(
    verb: Callable[..., Transfer], slots: list[int], memory: Tensor, seconds: float
) -> tuple[float, int]:
    """Bytes per second of a verb over the slots, half of the ring in flight while the other half is
    waited for; and how many slots it came to in `seconds`."""
    half = len(memory) // 2
    halves = memory[:half], memory[half:]
    under_way: deque[Transfer] = deque()
    done, start = 0, perf_counter()
    for turn, first in enumerate(range(0, len(slots), half)):
        if len(under_way) == len(halves):
            under_way.popleft().wait()
        batch = slots[first : first + half]
        under_way.append(verb(batch, list(halves[turn % 2][: len(batch)])))
        done += len(batch)
        if perf_counter() - start > seconds:
            break
    for transfer in under_way:
        transfer.wait()
    return done * RECORD_BYTES / (perf_counter() - start), done
