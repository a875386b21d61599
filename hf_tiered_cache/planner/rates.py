"""How fast memory and disk give bytes back here, torch multiplies and the kernels attend, in a few
seconds. The fastest of some rounds counts: what else the machine does is no rate of it.

The disk is asked through the disk tier itself, checksums included: what it reads here is what a
decode can be fed with. Attention is asked through the kernel that will run.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

import torch
from torch import Tensor

from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.planner.placement import CacheShape
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
ATTENTION_BYTES = 256 * 1024 * 1024  # at most, for the probes of attention
ATTENTION_ROUNDS = 5
LINK_BYTES = 64 * 1024 * 1024
PREFILL_QUERIES = 256  # from about 64 up the rate stays the same
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class DiskRates:
    """Bytes per second. `is_direct`: past the page cache (O_DIRECT)."""

    write: float
    read: float
    is_direct: bool
    num_bytes: int  # written, then read
    read_work: float  # processor seconds of reading a byte, of all threads


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
    directory: str | os.PathLike[str],
    is_direct: bool,
    seconds: float = SECONDS,
    record_bytes: int = RECORD_BYTES,
) -> DiskRates | None:
    """Write records into an unnamed file of `directory` and read them, each for about `seconds`;
    None where too little space is free. Raises TierIOError, ConfigError."""
    space = os.statvfs(directory)
    num_bytes = min(FILE_BYTES, space.f_bavail * space.f_frsize // 4)
    if num_bytes < MIN_FILE_BYTES:
        return None
    tier = DiskTier(
        record_bytes,
        Budget("disk", num_bytes),
        directory,
        io="direct" if is_direct else "buffered",
    )
    try:
        in_flight = max(2, NUM_IN_FLIGHT * RECORD_BYTES // record_bytes)
        memory = torch.randint(0, 256, (in_flight, record_bytes), dtype=torch.uint8)
        slots = [
            slot for _ in range(num_bytes // record_bytes) if (slot := tier.allocate()) is not None
        ]
        write, num_written = _rate(tier.write, slots, memory, seconds)
        work = process_time()
        read, num_read = _rate(tier.read, slots[:num_written], memory, seconds)
        work = (process_time() - work) / (num_read * record_bytes)
        return DiskRates(write, read, is_direct, num_written * record_bytes, work)
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
    return done * memory.shape[1] / (perf_counter() - start), done


def link_rate(device: torch.device) -> float:
    """Bytes per second of copies from pinned host memory to a GPU, LINK_BYTES at a time."""
    source = torch.ones(LINK_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)

    def once() -> float:
        torch.cuda.synchronize(device)
        start = perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        return perf_counter() - start

    once()
    return LINK_BYTES / min(once() for _ in range(ATTENTION_ROUNDS))


def attention_rate(
    shape: CacheShape,
    num_tokens: int,
    query_heads: int,
    num_bytes: int,
    device: torch.device | str = "cpu",
) -> float:
    """Bytes of blocks per second that one query of each head attends, layer after layer of such a
    context, over `num_bytes` (at most ATTENTION_BYTES) before a layer comes again."""
    layout, batch = shape.layout, shape.batch
    num_bytes = min(num_bytes, ATTENTION_BYTES, free_memory_bytes() // 4)
    columns = max(1, min(layout.num_blocks(num_tokens), num_bytes // (batch * layout.num_bytes)))
    layers = max(1, num_bytes // (columns * batch * layout.num_bytes))
    blocks = _blocks(layers * batch * columns, layout, device)
    tables = torch.arange(len(blocks), dtype=torch.int32).view(layers, batch, columns)
    views = [ops.BlockView(blocks, table, layout) for table in tables]
    query = _query(batch, query_heads, 1, layout, device)
    tokens = columns * layout.block_tokens
    call = ops.AttentionCall(kv_tokens=tokens, query_start=tokens - 1, scale=layout.key_dim**-0.5)

    def once() -> float:
        start = perf_counter()
        for view in views:
            out = ops.paged_attention(query, view, call, return_lse=False).out
        out.sum().item()  # a GPU is waited for
        return perf_counter() - start

    once()
    seconds = min(once() for _ in range(ATTENTION_ROUNDS))
    return len(blocks) * layout.num_bytes / seconds


def prefill_attention_rate(
    layout: BlockLayout, query_heads: int, device: torch.device | str = "cpu"
) -> float:
    """Multiplications per second of many queries that attend a past, both products counted."""
    columns = layout.num_blocks(PREFILL_TOKENS)
    tokens = columns * layout.block_tokens
    blocks = _blocks(columns, layout, device)
    view = ops.BlockView(blocks, torch.arange(columns, dtype=torch.int32).view(1, -1), layout)
    query = _query(1, query_heads, PREFILL_QUERIES, layout, device)
    start_token = tokens - PREFILL_QUERIES
    call = ops.AttentionCall(kv_tokens=tokens, query_start=start_token, scale=layout.key_dim**-0.5)

    def once() -> float:
        start = perf_counter()
        ops.paged_attention(query, view, call, return_lse=False).out.sum().item()
        return perf_counter() - start

    once()
    pairs = PREFILL_QUERIES * (start_token + PREFILL_QUERIES / 2)
    work = query_heads * (layout.key_dim + layout.value_dim) * pairs
    return work / min(once() for _ in range(3))


def _blocks(number: int, layout: BlockLayout, device: torch.device | str) -> Tensor:
    """uint8 `[number, num_bytes]` of small numbers in the layout's dtype."""
    row = torch.full((layout.num_bytes // layout.dtype.itemsize,), 0.01, dtype=layout.dtype)
    return row.view(torch.uint8).to(device).repeat(number, 1)


def _query(
    batch: int, heads: int, queries: int, layout: BlockLayout, device: torch.device | str
) -> Tensor:
    return torch.randn(batch, heads, queries, layout.key_dim, device=device).to(layout.dtype)
