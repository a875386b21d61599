"""Decode with most of the cache on disk: how near to what the disk, or RAM, allows.

    python eval/bench_offload.py
    python eval/bench_offload.py --directory /mnt/nvme --context 65536

Layers of Llama-3.1-8B's shape (32 query heads, 8 key-value heads of 128, bfloat16) hold a long
context of random keys and values; a step appends one token to every layer and attends everything.
For each share of the blocks on disk, in turn in one run:

    ours       the step, loads verified by their checksums and hidden behind attention
    read       the same number of records, read by bare O_DIRECT preads from a file, in order
    resident   the same step with everything in RAM
    reload     what disk caches do today: every layer loaded whole with safetensors, then sdpa

The disk is used past the page cache; "reload" has its file dropped from the page cache first.
The bar is on max(read, resident) / ours. Last, peak memory over the budget in a fresh process.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_tiered_cache import TieredCache, tiered_attention_forward
from hf_tiered_cache.layout import default_block_tokens
from hf_tiered_cache.tiers import Budget, DeviceTier

import benchmarking

HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
BLOCK_TOKENS = default_block_tokens(HEAD_DIM, DTYPE)
BLOCK_BYTES = 2 * KV_HEADS * BLOCK_TOKENS * HEAD_DIM * DTYPE.itemsize
STAGING_BLOCKS = 16
SHARE_BAR, RELOAD_BAR = 0.90, 2.0
MEMORY_BUDGET = 256 << 20
MEMORY_SLACK_BYTES, MEMORY_SLACK_SHARE = 64 << 20, 0.05


class Attention(torch.nn.Module):
    """What an attention function wants to know of its layer."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


LAYER = Attention().eval()


def main() -> None:
    arguments = parse_arguments()
    table = benchmarking.Table(
        f"decode, {arguments.layers} layers of {arguments.context:,} tokens, bfloat16, "
        f"{arguments.layers * blocks_per_layer(arguments) * BLOCK_BYTES / 2**30:.2f} GiB of cache"
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        resident = make_cache(arguments, folder, share_on_disk=0.0)
        write_layers(arguments, Path(folder))
        for percent in arguments.percent:
            bench_share(table, arguments, Path(folder), resident, percent / 100)
        resident.close()
        bench_memory(table, folder)
    table.finish(arguments.json)


def blocks_per_layer(arguments: argparse.Namespace) -> int:
    return arguments.context // BLOCK_TOKENS


def make_cache(arguments: argparse.Namespace, folder: str, share_on_disk: float) -> TieredCache:
    """A filled cache whose device budget leaves the given share of its blocks on disk."""
    blocks = round((1 - share_on_disk) * blocks_per_layer(arguments)) * arguments.layers
    spare = arguments.layers  # the filling blocks
    cache = TieredCache(
        device_bytes=(blocks + spare + STAGING_BLOCKS) * BLOCK_BYTES,
        disk_bytes=arguments.layers * (blocks_per_layer(arguments) + 2) * BLOCK_BYTES,
        disk_dir=folder,
        disk_io="direct",
        staging_bytes=STAGING_BLOCKS * BLOCK_BYTES,
        packing="none",  # the bare reader reads as many bytes; packed: bench_packing.py
    )
    for first in range(0, arguments.context, 1024):
        for layer in range(arguments.layers):
            cache.update(*random_states(min(1024, arguments.context - first)), layer)
    return cache


def random_states(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, kv_heads, tokens, head_dim]`."""
    keys, values = torch.randn(2, 1, KV_HEADS, num_tokens, HEAD_DIM, dtype=DTYPE).unbind(0)
    return keys, values


def bench_share(
    table: benchmarking.Table,
    arguments: argparse.Namespace,
    folder: Path,
    resident: TieredCache,
    share: float,
) -> None:
    """The rows for one share of the blocks on disk."""
    cache = make_cache(arguments, str(folder), share)
    cold = cache.stats().cold_blocks
    reader = BareReader(folder / "records", cold)
    sides = [
        lambda: step_seconds(cache, arguments.layers),
        lambda: reader.seconds(),
        lambda: step_seconds(resident, arguments.layers),
    ]
    if share == 1.0:
        sides.append(lambda: reload_seconds(folder, arguments.layers))
    ours, read, all_resident, *reload = benchmarking.paired(
        *sides, rounds=arguments.rounds, warmup=2
    )
    name = f"{share:.0%} on disk ({cold * BLOCK_BYTES / 2**20:.0f} MiB)"
    binding = "read" if read.median > all_resident.median else "resident"
    table.ratio(
        f"{name}: share of the {binding} bound",
        baseline=read if binding == "read" else all_resident,
        ours=ours,
        bar=SHARE_BAR,
        note=f"ours {ours.median * 1e3:.0f} ms, read {read.median * 1e3:.0f} ms "
        f"({cold * BLOCK_BYTES / read.median / 1e9:.2f} GB/s), "
        f"resident {all_resident.median * 1e3:.0f} ms",
    )
    for other in reload:
        table.ratio(
            f"{name}: over reloading whole layers with safetensors",
            baseline=other,
            ours=ours,
            bar=RELOAD_BAR,
            note=f"reload {other.median * 1e3:.0f} ms",
        )
    reader.close()
    cache.close()


@torch.no_grad()
def step_seconds(cache: TieredCache, num_layers: int) -> float:
    """One decode step: append a token to every layer and attend everything. Crops it off again."""
    states = [random_states(1) for _ in range(num_layers)]
    query = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=DTYPE)
    start = perf_counter()
    for layer, (keys, values) in enumerate(states):
        handles = cache.update(keys, values, layer)
        tiered_attention_forward(LAYER, query, *handles, None)
    seconds = perf_counter() - start
    del handles
    cache.crop(-1)
    return seconds


class BareReader:
    """Reads a file of `num_records` records from front to back, as fast as the disk gives them."""

    NUM_THREADS = 4

    def __init__(self, path: Path, num_records: int) -> None:
        self._num_records = num_records
        # Page-aligned memory, which O_DIRECT wants; one record for each thread.
        budget = Budget("device", self.NUM_THREADS * BLOCK_BYTES)
        self._memory = DeviceTier(BLOCK_BYTES, budget)
        data = torch.randint(0, 256, (BLOCK_BYTES,), dtype=torch.uint8).numpy().tobytes()
        with path.open("wb") as file:
            for _ in range(num_records):
                file.write(data)
            os.fsync(file.fileno())
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def seconds(self) -> float:
        start = perf_counter()
        threads = [
            threading.Thread(target=self._read, args=(index,)) for index in range(self.NUM_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return perf_counter() - start

    def _read(self, index: int) -> None:
        buffer = [memoryview(self._memory.block(index).numpy())]
        for record in range(index, self._num_records, self.NUM_THREADS):
            os.preadv(self._fd, buffer, record * BLOCK_BYTES)

    def close(self) -> None:
        os.close(self._fd)
        self._memory.close()


def write_layers(arguments: argparse.Namespace, folder: Path) -> None:
    """One safetensors file per layer, as caches that offload whole layers keep them."""
    for layer in range(arguments.layers):
        keys, values = random_states(arguments.context)
        save_file({"keys": keys, "values": values}, layer_file(folder, layer))


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer{layer}.safetensors"


@torch.no_grad()
def reload_seconds(folder: Path, num_layers: int) -> float:
    """One decode step that loads every layer whole, appends by concatenation and calls sdpa."""
    for layer in range(num_layers):
        fd = os.open(layer_file(folder, layer), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    states = [random_states(1) for _ in range(num_layers)]
    query = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=DTYPE)
    start = perf_counter()
    for layer, new in enumerate(states):
        loaded = load_file(layer_file(folder, layer))
        cache = DynamicCache()
        cache.update(loaded["keys"], loaded["values"], 0)
        sdpa_attention_forward(LAYER, query, *cache.update(*new, 0), None)
    return perf_counter() - start


def bench_memory(table: benchmarking.Table, folder: str) -> None:
    """Peak resident memory of a process that streams four times its budget through the cache."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_memory, args=(folder, sender))
    process.start()
    grown = receiver.recv()
    process.join()
    allowed = MEMORY_BUDGET * (1 + MEMORY_SLACK_SHARE) + MEMORY_SLACK_BYTES
    table.value(
        "peak resident memory grown over the budget",
        f"{grown / 2**20:.0f} MiB of {MEMORY_BUDGET / 2**20:.0f} MiB",
        bar=f"{allowed / 2**20:.0f} MiB",
        is_reached=grown <= allowed,
    )


def measure_memory(folder: str, sender: object) -> None:
    """Send the bytes by which peak resident memory grew while a cache was filled and attended."""
    layers, chunk = 4, 512
    query = torch.randn(1, HEADS, chunk, HEAD_DIM, dtype=DTYPE)
    # The first calls bring torch's own memory in; the cache is not to blame for it.
    with torch.no_grad(), TieredCache(device_bytes="64MiB", disk_bytes=0) as warm:
        tiered_attention_forward(LAYER, query, *warm.update(*random_states(chunk), 0), None)
    before = peak_resident_bytes()
    with (
        torch.no_grad(),
        TieredCache(
            device_bytes=MEMORY_BUDGET,
            disk_bytes=5 * MEMORY_BUDGET,
            disk_dir=folder,
            disk_io="direct",
        ) as cache,
    ):
        tokens = 4 * MEMORY_BUDGET // (layers * BLOCK_BYTES // BLOCK_TOKENS)
        for _ in range(0, tokens, chunk):
            for layer in range(layers):
                handles = cache.update(*random_states(chunk), layer)
        for layer in range(layers):
            handles = cache.update(*random_states(1), layer)
            tiered_attention_forward(LAYER, query[:, :, :1], *handles, None)
    sender.send(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """The most memory this process has had resident (ru_maxrss would count its parent's too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this measurement needs Linux")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=32768, help="tokens in each layer")
    parser.add_argument("--percent", nargs="+", type=int, default=[25, 50, 100])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", default=".", help="folder on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="2 layers, 16K tokens, 3 rounds")
    parser.add_argument("--json", help="also write the results here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.context, arguments.rounds = 2, 16384, 3
    return arguments


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
