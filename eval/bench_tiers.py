"""How close the disk tier comes to the disk: its read rate against a bare pread loop, in pairs.

Both read the same records of the same file in the same random order, with the same number of
threads, in turns; the bare loop keeps no order, no states, no checksums. The ratio of a pair is
the tier's share of what the disk gave at that moment; medians over the rounds are printed.

The tier's records are moved by the compiled core's threads, or by Python's (`--mover`).

The main thread meanwhile
    idle     only waits for the oldest batch
    matmul   multiplies matrices in torch, which releases the interpreter lock
    python   runs pure Python, which holds it for 5 ms at a time

    python eval/bench_tiers.py --directory /mnt/nvme
"""

import argparse
import os
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
import xxhash

from hf_tiered_cache.tiers import Budget, DeviceTier, DiskTier

MIB = 1024 * 1024


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default=".")
    parser.add_argument("--file-mib", type=int, default=2048)
    parser.add_argument("--sample-mib", type=int, default=512, help="read per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record-kib", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--io", nargs="+", default=["direct", "buffered"])
    parser.add_argument("--main", nargs="+", default=["idle", "matmul", "python"])
    parser.add_argument("--mover", nargs="+", default=["compiled", "python"])
    parser.add_argument("--batch", type=int, default=4, help="records per transfer")
    parser.add_argument("--in-flight", type=int, default=4, help="transfers ahead of use")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    print_checksum_rate()
    print(
        f"{'record':>7} {'io':>8} {'mover':>8} {'threads':>7} {'main':>7}"
        f" {'tier GB/s':>10} {'bare GB/s':>10}"
        f" {'tier/bare':>10} {'[min, max]':>14} {'tier CPU s/GB':>14}"
    )
    for record_kib in args.record_kib:
        for io in args.io:
            for num_threads in args.threads:
                for mover in args.mover:
                    bench(args, record_kib * 1024, io, num_threads, mover)


def print_checksum_rate() -> None:
    """GB/s of xxh3_128 on one core, and how long it keeps the main thread from running."""
    data = bytearray(os.urandom(MIB)) * 512
    took = []
    worker = threading.Thread(target=lambda: took.append(timed(xxhash.xxh3_128_digest, data)))
    worker.start()
    longest_pause, last = 0.0, time.perf_counter()
    while worker.is_alive():
        now = time.perf_counter()
        longest_pause, last = max(longest_pause, now - last), now
    print(
        f"xxh3_128 of 512 MiB in a thread: {len(data) / took[0] / 1e9:.1f} GB/s,"
        f" {took[0] * 1e3:.0f} ms; the main thread waited {longest_pause * 1e3:.1f} ms at most\n"
    )


def bench(
    args: argparse.Namespace, record_bytes: int, io: str, num_threads: int, mover: str
) -> None:
    num_records = args.file_mib * MIB // record_bytes
    num_staging = args.batch * args.in_flight
    tier = DiskTier(
        record_bytes,
        Budget("disk", num_records * record_bytes),
        args.directory,
        io=io,
        num_threads=num_threads,
        mover=mover,
    )
    device = DeviceTier(record_bytes, Budget("device", num_staging * record_bytes))
    staging = [device.block(slot) for slot in range(num_staging)]
    for block in staging:
        block.random_(0, 256)
    slots = [tier.allocate() for _ in range(num_records)]
    for start in range(0, num_records, num_staging):
        batch = slots[start : start + num_staging]
        tier.write(batch, staging[: len(batch)]).wait()
    if io == "buffered":  # warm: that is what "auto" uses it for
        for start in range(0, num_records, num_staging):
            batch = slots[start : start + num_staging]
            tier.read(batch, staging[: len(batch)]).wait()
    # The bare loop needs the very file of the tier, which has no name.
    fd = tier._file.entrance(direct=io == "direct").fd
    for main_does in args.main:
        ratios, tier_rates, bare_rates, cpu = [], [], [], []
        for _ in range(args.rounds):
            order = random.sample(slots, args.sample_mib * MIB // record_bytes)
            num_bytes = len(order) * record_bytes
            bare_seconds = timed(
                read_bare, fd, order, staging, record_bytes, num_threads, main_does
            )
            cpu_before = time.process_time()
            tier_seconds = timed(read_tier, tier, order, staging, args.batch, main_does)
            cpu.append((time.process_time() - cpu_before) / (num_bytes / 1e9))
            ratios.append(bare_seconds / tier_seconds)
            tier_rates.append(num_bytes / tier_seconds / 1e9)
            bare_rates.append(num_bytes / bare_seconds / 1e9)
        print(
            f"{record_bytes // 1024:>6}K {io:>8} {mover:>8} {num_threads:>7} {main_does:>7}"
            f" {statistics.median(tier_rates):>10.2f} {statistics.median(bare_rates):>10.2f}"
            f" {statistics.median(ratios):>10.2f} [{min(ratios):>5.2f}, {max(ratios):>5.2f}]"
            f" {statistics.median(cpu):>14.3f}",
            flush=True,
        )
    tier.close()
    device.close()


def read_tier(
    tier: DiskTier,
    order: Sequence[int],
    staging: Sequence[torch.Tensor],
    batch: int,
    main_does: str,
) -> None:
    """Stream the records through the ring of staging blocks, as a decode step does."""
    work = WORK[main_does]
    in_flight: deque = deque()
    for start in range(0, len(order), batch):
        ring = start % len(staging)
        if len(in_flight) == len(staging) // batch:
            wait(in_flight.popleft(), work)
        slots = order[start : start + batch]
        in_flight.append(tier.read(slots, staging[ring : ring + len(slots)]))
    while in_flight:
        wait(in_flight.popleft(), work)


def wait(transfer, work: Callable[[], None] | None) -> None:
    while work is not None and not transfer.is_ready():
        work()
    transfer.wait()


def read_bare(
    fd: int,
    order: Sequence[int],
    staging: Sequence[torch.Tensor],
    record_bytes: int,
    num_threads: int,
    main_does: str,
) -> None:
    """Read the same records with nothing around the system call."""

    def loop(index: int) -> None:
        buffer = [memoryview(staging[index].numpy())]
        for slot in order[index::num_threads]:
            os.preadv(fd, buffer, slot * record_bytes)

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    work = WORK[main_does]
    for thread in threads:
        while work is not None and thread.is_alive():
            work()
        thread.join()


_MATRIX = torch.randn(192, 192)


def multiply() -> None:
    torch.mm(_MATRIX, _MATRIX)


def compute_in_python() -> None:
    sum(i * i for i in range(200))


WORK: dict[str, Callable[[], None] | None] = {
    "idle": None,
    "matmul": multiply,
    "python": compute_in_python,
}


def timed(function: Callable, *args: object) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
