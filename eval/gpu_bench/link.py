"""What the machine gives: the link in pieces and beside other work, the CPU's attention over host
blocks, hand-off, the price of pinning."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil
import torch
from sections import Row, attempted

from gpu_bench.machine import GIB
from gpu_bench.workshop import Bench
from hf_tiered_cache.devices.pinning import CudaPinning
from hf_tiered_cache.kernels import ops

import benchmarking

PIECES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)  # bytes
ROUNDS = 5
SPARE_CPUS = (8, 4, 2, 0)  # that attention leaves to the launching thread and others


def link(bench: Bench) -> Iterator[Row]:
    """All of it, each part on its own."""
    for what, part in (
        ("copies", copies),
        ("a small copy", small_copy),
        ("CPU attention", attention_rows),
        ("hand-off", hand_off),
        ("pinning", pinning_rows),
        ("memory nodes", nodes),
    ):
        yield from attempted(bench, what, part(bench))


def copies(bench: Bench) -> Iterator[Row]:
    """Copy rates of large copies, and of the same bytes in pieces."""
    machine, size = bench.machine, bench.sizes.link_bytes
    near = [torch.zeros(size, dtype=torch.uint8, device=machine.device) for _ in range(2)]
    host = [machine.pinned(size) for _ in range(2)]

    def rate(*pairs: tuple[torch.Tensor, torch.Tensor], piece: int = size) -> float:
        def once() -> float:
            machine.synchronize()
            start = perf_counter()
            for (to, source), stream in zip(pairs, machine.streams(len(pairs)), strict=True):
                with stream:
                    for one, other in zip(to.split(piece), source.split(piece), strict=True):
                        one.copy_(other, non_blocking=True)
            machine.synchronize()
            return perf_counter() - start

        return len(pairs) * size / benchmarking.paired(once, rounds=ROUNDS, warmup=1)[0].median

    down, up = (near[0], host[0]), (host[1], near[1])
    bench.rates["h2d"] = rate(down)
    yield rate_row("copy host to device", bench.rates["h2d"], "50-55")
    yield rate_row("copy device to host", rate(up), "50-55")
    yield rate_row("both directions at once, sum", rate(down, up), "83")
    for piece in PIECES:
        what = f"copy host to device, pieces of {piece / (1 << 20):g} MiB"
        yield rate_row(what, rate(down, piece=piece), "")


def rate_row(what: str, rate: float, predicted: str, note: str = "") -> Row:
    data = {"rate": rate}
    return Row(what, f"{rate / 1e9:.1f} GB/s", predicted=predicted, note=note, data=data)


def small_copy(bench: Bench) -> Iterator[Row]:
    """A query's way to the host (8 KiB), alone and while another stream loads without a pause."""
    machine, size = bench.machine, bench.sizes.link_bytes
    near, far = torch.zeros(size, dtype=torch.uint8, device=machine.device), machine.pinned(size)
    query = torch.zeros(8192, dtype=torch.uint8, device=machine.device)
    letter = machine.pinned(8192)
    (loads,) = machine.streams(1)
    for is_beside in (False, True):
        seconds = []
        for _ in range(ROUNDS):
            machine.synchronize()
            if is_beside:
                with loads:
                    near.copy_(far, non_blocking=True)
            seconds.append(machine.elapsed(lambda: letter.copy_(query, non_blocking=True), 1))
        where = "beside a load" if is_beside else "alone"
        yield Row(
            f"8 KiB device to host, {where}",
            f"{median(seconds) * 1e6:.0f} us",
            note=f"at most {max(seconds) * 1e6:.0f}",
            data={"seconds": seconds},
        )


def attention_rows(bench: Bench) -> Iterator[Row]:
    """The CPU's attention at several numbers of threads, alone and beside a load."""
    machine, size = bench.machine, bench.sizes.link_bytes
    attend = cpu_attention(bench)
    near, far = torch.zeros(size, dtype=torch.uint8, device=machine.device), machine.pinned(size)
    cpus, threads = os.cpu_count() or 1, torch.get_num_threads()
    (loads,) = machine.streams(1)
    try:
        for number in dict.fromkeys(max(1, cpus - spare) for spare in SPARE_CPUS):
            torch.set_num_threads(number)
            attend()
            alone = median(attend() for _ in range(ROUNDS))
            with loads:
                for _ in range(2 * ROUNDS):  # longer than the CPU needs
                    near.copy_(far, non_blocking=True)
            beside = median(attend() for _ in range(3))
            machine.synchronize()
            what = f"CPU attention over host blocks, {number} threads"
            yield rate_row(what, alone, "80-160", f"{beside / 1e9:.1f} beside a load")
    finally:
        torch.set_num_threads(threads)


def cpu_attention(bench: Bench) -> Callable[[], float]:
    """What attends a GiB of host blocks by the CPU, and returns the bytes per second."""
    layout, config = bench.layout, bench.sizes.config
    num_blocks = max(1, bench.sizes.link_bytes // layout.num_bytes)
    blocks = torch.zeros((num_blocks, layout.num_bytes), dtype=torch.uint8)
    view = ops.BlockView(blocks, torch.arange(num_blocks, dtype=torch.int32)[None], layout)
    query = torch.randn(1, config.num_attention_heads, 1, layout.key_dim, dtype=torch.bfloat16)
    scale, tokens = layout.key_dim**-0.5, num_blocks * layout.block_tokens
    call = ops.AttentionCall(kv_tokens=tokens, query_start=tokens - 1, scale=scale)

    def once() -> float:
        start = perf_counter()
        ops.paged_attention(query, view, call)
        return num_blocks * layout.data_bytes / (perf_counter() - start)

    return once


def hand_off(bench: Bench) -> Iterator[Row]:
    seconds = hand_off_seconds(bench)
    yield Row(
        "hand-off GPU -> CPU -> GPU with a synchronisation",
        f"{seconds * 1e6:.0f} us",
        predicted="20-40 us",
        data={"seconds": seconds},
    )


def hand_off_seconds(bench: Bench) -> float:
    """A query goes to the host, a result comes back, and the next kernel waits for it."""
    machine = bench.machine
    query = torch.randn(bench.sizes.config.hidden_size, device=machine.device)
    there, back = machine.pinned(query.nbytes), machine.pinned(query.nbytes)

    def once() -> float:
        machine.synchronize()
        start = perf_counter()
        there.view(torch.float32).copy_(query * 2, non_blocking=True)
        machine.synchronize()
        back.copy_(there)
        query.copy_(back.view(torch.float32), non_blocking=True).mul_(0.5)
        machine.synchronize()
        return perf_counter() - start

    return benchmarking.paired(once, rounds=51, warmup=5)[0].median


def pinning_rows(bench: Bench) -> Iterator[Row]:
    """Seconds per GiB: touching fresh memory, locking it, and torch's own pinned allocation."""
    size = bench.sizes.link_bytes
    start = perf_counter()
    memory = torch.zeros(size, dtype=torch.uint8)
    memory[::4096].fill_(1)
    touched = perf_counter()
    if bench.machine.is_cuda:
        pinning = CudaPinning(bench.machine.device)
        is_locked = pinning.register(memory.data_ptr(), size)
        locked = perf_counter()
        if is_locked:
            pinning.unregister(memory.data_ptr())
    else:
        is_locked, locked = False, perf_counter()
    begin = perf_counter()
    bench.machine.pinned(size + (1 << 20))  # a size that torch has not cached
    allocated = perf_counter() - begin
    for what, seconds, predicted in (
        ("host memory: touching, one thread", touched - start, ""),
        ("host memory: locking what is touched", locked - touched, "0.1"),
        ("host memory: torch's pinned allocation", allocated, "0.5"),
    ):
        is_refused = "locking" in what and not is_locked
        yield Row(
            what,
            f"{seconds * GIB / size:.2f} s/GiB",
            predicted=predicted,
            note="refused" if is_refused else "",
            data={"seconds_per_gib": seconds * GIB / size},
        )


def nodes(bench: Bench) -> Iterator[Row]:
    """Where the device is attached."""
    there = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    yield Row(
        "memory nodes",
        str(len(there)),
        note=f"the device is at node {bench.machine.numa_node()}; {psutil.cpu_count(False)} cores",
        data={"nodes": there},
    )
