"""Everything about a GPU in one command: tests, link, decode, prefill, error, capacity, memory.

    make gpu                              (builds in place first; PYTHON=python3 is the default)
    python eval/bench_gpu.py --quick
    python eval/bench_gpu.py --sections link decode_short
    python eval/bench_gpu.py --device cpu --tiny          (tries the code of every section)

A random model of Llama-3.1-8B's shape in bfloat16 decodes behind random keys and values (a prefill
would take minutes and is the same model code on both sides). Ratios are of medians of sides timed
in turn, in one process: ours over `DynamicCache` all on the GPU, over transformers' offloading, and
over the machine's own copy rate. Predictions are those of a closed-form model with the constants of
an H200: copies at 52 GB/s, 25 ms of launches per token; the range is copies alone to both lanes.

A section that fails does not keep the others from running (see sections.py); the exit status is
then 1. Needs no network and no packages but the library's and pytest.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import bench_generate
import psutil
import torch
from sections import Row, Section, Skipped, at_least, at_most, print_table, run_sections
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from hf_tiered_cache import TieredCache, TieredCacheConfig, tiered_attention_forward
from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.tiers.pinning import CudaPinning

import benchmarking

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "gpu.json"
GIB = 1 << 30
TIME_LIMIT_SECONDS = 570  # of ten minutes, for a build took some of them
# Versions without a CPU lane have no such knob.
COPY_LANE = {"cpu_share": 0.0} if "cpu_share" in {f.name for f in fields(TieredCacheConfig)} else {}
SMALL_GPU_BYTES = 24_000_000_000
TESTS_SECONDS = 150
HOST_SPARE_BYTES = 256 << 20  # of a cache's host budget, for what copies pass through

# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=1 << 20,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=1 << 20,
)


@dataclass(frozen=True)
class Sizes:
    """How large everything is. Tokens unless said otherwise."""

    config: LlamaConfig
    short: int  # contexts
    long: int
    prefill: int
    new: int
    rounds: int
    error: int  # context of the error's one layer
    link_bytes: int
    staging_bytes: int
    step: int  # by which capacity is searched
    block_tokens: int | None = None


FULL = Sizes(
    config=LLAMA_8B,
    short=32768,
    long=131072,
    prefill=4096,
    new=8,
    rounds=5,
    error=8192,
    link_bytes=GIB,
    staging_bytes=256 << 20,
    step=4096,
)
QUICK = replace(FULL, short=8192, long=32768, new=4, rounds=2, link_bytes=GIB // 4)
TINY_SIZES = Sizes(
    config=TINY,
    short=512,
    long=1024,
    prefill=64,
    new=2,
    rounds=1,
    error=256,
    link_bytes=1 << 20,
    staging_bytes=64 << 12,
    step=64,
    block_tokens=16,
)


# ---- the machine ---------------------------------------------------------------------------------


class Machine:
    """The device that is measured, and all that is asked of `torch.cuda`.

    On the CPU, where only the code is tried, the answers are such that every branch is taken.
    """

    CPU_LIMIT_BYTES = 1 << 16  # of a cache, while memory is limited

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self._is_limited = False

    @property
    def name(self) -> str:
        if not self.is_cuda:
            return benchmarking.environment()["processor"]
        properties = torch.cuda.get_device_properties(self.device)
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, sm_{major}{minor}"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Device memory that could still be taken."""
        if not self.is_cuda:
            return psutil.virtual_memory().available
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else 0

    @contextmanager
    def peak_bytes(self) -> Iterator[list[int]]:
        """A list that at the end holds the most that torch had allocated inside the `with`."""
        peak: list[int] = []
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield peak
        self.synchronize()
        peak.append(torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0)

    @contextmanager
    def limited_to(self, num_bytes: int) -> Iterator[None]:
        """As if the device had so much memory."""
        self._is_limited = True
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.device)
        try:
            yield
        finally:
            self._is_limited = False
            if self.is_cuda:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
                torch.cuda.empty_cache()

    def check_cache(self, num_bytes: int) -> None:
        """On the CPU, run out of memory as a limited GPU would."""
        if self._is_limited and not self.is_cuda and num_bytes > self.CPU_LIMIT_BYTES:
            raise torch.OutOfMemoryError("more than the CPU is allowed")

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def streams(self, count: int) -> list[Any]:
        """Side streams, as context managers."""
        if not self.is_cuda:
            return [nullcontext() for _ in range(count)]
        return [torch.cuda.stream(torch.cuda.Stream(self.device)) for _ in range(count)]

    def numa_node(self) -> str:
        """The memory node the device is attached to, where the system tells."""
        if not self.is_cuda:
            return "the CPU's own"
        properties = torch.cuda.get_device_properties(self.device)
        parts = ("pci_domain_id", "pci_bus_id", "pci_device_id")
        numbers = [getattr(properties, part, None) for part in parts]  # torch 2.9: not all
        if None in numbers:
            return "unknown"
        path = Path("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0/numa_node".format(*numbers))
        return path.read_text().strip() if path.exists() else "unknown"


# ---- caches --------------------------------------------------------------------------------------


class Bench:
    """What the sections share: machine, sizes, the model, and rates measured by an earlier one."""

    def __init__(self, device: str, sizes: Sizes, rates: dict[str, float]) -> None:
        self.machine = Machine(device)
        self.sizes = sizes
        self.rates = rates  # "h2d": bytes per second
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            config = self.sizes.config
            with torch.device("meta"):
                parameters = AutoModelForCausalLM.from_config(config).num_parameters()
            if 2.1 * parameters > (free := self.machine.free_bytes()):
                raise Skipped(
                    f"the model's {2 * parameters / GIB:.0f} GiB do not fit into {free / GIB:.0f}"
                )
            with torch.device(self.machine.device):
                self._model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.bfloat16, attn_implementation="sdpa"
                ).eval()
        return self._model

    @property
    def layout(self) -> BlockLayout:
        """Of the blocks that a cache will make for this model."""
        config = self.sizes.config
        dim = config.hidden_size // config.num_attention_heads
        tokens = self.sizes.block_tokens or default_block_tokens(dim, torch.bfloat16)
        return BlockLayout(config.num_key_value_heads, dim, dim, tokens, torch.bfloat16)

    def facts(self) -> dict[str, Any]:
        """What a reader must know of the device to judge a figure."""
        return {"device": self.machine.name, "torch_cuda": str(torch.version.cuda)}

    def is_usable(self) -> bool:
        """Whether the device still works: some CUDA errors stay until the process ends."""
        try:
            self.machine.synchronize()
            torch.zeros(1, device=self.machine.device).add_(1).item()
        except Exception:  # whatever it says: not with this process
            return False
        return True

    def token_bytes(self) -> int:
        """Of keys and values, in all layers."""
        return self.layout.data_bytes // self.layout.block_tokens * self.num_layers

    @property
    def num_layers(self) -> int:
        return self.sizes.config.num_hidden_layers

    def tiered(self, context: int, share: float, **knobs: Any) -> TieredCache:
        """An empty cache for `context` tokens, with room for all but `share` of its blocks on the
        device, and for those in host memory."""
        columns = self.layout.num_blocks(context)
        resident = columns if share == 0 else max(1, round((1 - share) * columns))
        block, layers = self.layout.num_bytes, self.num_layers
        return TieredCache(
            self.sizes.config,
            **{
                "device_bytes": resident * layers * block + self.sizes.staging_bytes,
                "staging_bytes": self.sizes.staging_bytes,
                "host_bytes": (columns + 1) * layers * block + HOST_SPARE_BYTES if share else 0,
                "disk_bytes": 0,
                "block_tokens": self.sizes.block_tokens,
                **knobs,
            },
        )

    def dynamic(self, context: int) -> DynamicCache:
        """transformers' own cache, filled with random keys and values."""
        cache = DynamicCache(config=self.sizes.config)
        bench_generate.fill((cache,), self.model, context)
        return cache

    def fill_like(self, cache: Cache, dynamic: DynamicCache) -> None:
        """Give a cache the keys and values of another, chunk by chunk as a prefill would."""
        for first in range(0, dynamic.get_seq_length(), self.sizes.prefill):
            part = slice(first, first + self.sizes.prefill)
            for index, layer in enumerate(dynamic.layers):
                cache.update(layer.keys[:, :, part], layer.values[:, :, part], index)

    def seconds_per_token(self, cache: Cache, ids: torch.Tensor) -> float:
        self.machine.synchronize()
        _, seconds = bench_generate.decode(self.model, cache, ids, self.sizes.new)
        return seconds / self.sizes.new

    @torch.no_grad()
    def prefill_seconds(self, cache: Cache, ids: torch.Tensor, attention: str) -> float:
        """One chunk behind the cached context, which is left as it was."""
        self.model.set_attn_implementation(attention)
        self.machine.synchronize()
        start = perf_counter()
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        self.machine.synchronize()
        seconds = perf_counter() - start
        cache.crop(-ids.shape[1])
        self.model.set_attn_implementation("sdpa")
        return seconds

    def ids(self, num_tokens: int) -> torch.Tensor:
        vocabulary = self.sizes.config.vocab_size
        return torch.randint(0, vocabulary, (1, num_tokens), device=self.machine.device)

    def context_that_fits(self, context: int, shares: list[float]) -> int:
        """`context`, halved until a `DynamicCache` (with the copies that appending makes) and a
        tiered cache for each share fit into device and host memory."""
        resident = 1.0 + 2 / self.num_layers + sum(1 - share for share in shares)
        cold = 1.0 + sum(shares)  # transformers' offloading holds everything there
        device = 0.9 * self.machine.free_bytes() - len(shares) * self.sizes.staging_bytes
        host = 0.8 * free_memory_bytes()
        while context * self.token_bytes() > min(device / resident, host / cold):
            context //= 2
            if context < self.sizes.prefill:
                raise Skipped(f"too little memory: {device / GIB:.1f} GiB, {host / GIB:.1f} GiB")
        return context


def share_off(cache: TieredCache) -> float:
    """The share of the blocks that have no copy on the device."""
    stats = cache.stats()
    return stats.cold_blocks / (stats.num_layers * -(-stats.num_tokens // stats.block_tokens))


# ---- sections ------------------------------------------------------------------------------------


def tests(bench: Bench) -> Iterator[Row]:
    """tests/gpu, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=60"]  # one that hangs says where
    if not bench.machine.is_cuda:
        command += ["-k", "whole_table"]  # the rest is run by the suite itself
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            timeout=TESTS_SECONDS - 5,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        status, output = -1, (expired.stdout or b"") + b"\nnot finished in time"
    lines = output.decode(errors="replace").splitlines()
    print("\n".join(lines[-60:]), flush=True)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    passed = re.search(r"(\d+) passed", lines[-1])
    yield Row(
        "tests/gpu",
        f"{passed[1]} passed" if passed else f"status {status}",
        "all",
        "all",
        "reached" if status == 0 else "FAILED",
        lines[-1],
        {"failed": failed, "output": [] if status == 0 else lines[-1000:]},
    )


def link(bench: Bench) -> Iterator[Row]:
    """Copy rates, the CPU's attention over host blocks, hand-off, the price of pinning."""
    machine, size = bench.machine, bench.sizes.link_bytes
    near = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    host = [machine.pinned(size).random_() for _ in range(2)]
    far = [torch.empty_like(near).random_() for _ in range(2)]

    def rate(*copies: tuple[torch.Tensor, torch.Tensor]) -> float:
        def once() -> float:
            machine.synchronize()
            start = perf_counter()
            for (to, source), stream in zip(copies, machine.streams(len(copies)), strict=True):
                with stream:
                    to.copy_(source, non_blocking=True)
            machine.synchronize()
            return perf_counter() - start

        return len(copies) * size / benchmarking.paired(once, rounds=7)[0].median

    bench.rates["h2d"] = rate((far[0], host[0]))
    for what, value, predicted in (
        ("copy host to device", bench.rates["h2d"], "50-55"),
        ("copy device to host", rate((host[1], far[1])), "50-55"),
        ("both directions at once, sum", rate((far[0], host[0]), (host[1], far[1])), "83"),
        ("CPU attention over host blocks", cpu_attention_rate(bench), "80-160"),
    ):
        yield Row(what, f"{value / 1e9:.1f} GB/s", predicted=predicted, data={"rate": value})
    seconds = hand_off_seconds(bench)
    yield Row(
        "hand-off GPU -> CPU -> GPU with a synchronisation",
        f"{seconds * 1e6:.0f} us",
        predicted="20-40 us",
        data={"seconds": seconds},
    )
    yield from pinning_rows(bench)
    nodes = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    yield Row(
        "memory nodes",
        str(len(nodes)),
        note=f"the device is at node {machine.numa_node()}; {psutil.cpu_count(False)} cores",
        data={"nodes": nodes},
    )


def cpu_attention_rate(bench: Bench) -> float:
    """Bytes of keys and values per second that the CPU attends where they lie."""
    layout, config = bench.layout, bench.sizes.config
    num_blocks = max(1, bench.sizes.link_bytes // layout.num_bytes)
    blocks = torch.empty((num_blocks, layout.num_bytes), dtype=torch.uint8)
    blocks.view(torch.bfloat16).normal_()
    view = ops.BlockView(blocks, torch.arange(num_blocks, dtype=torch.int32)[None], layout)
    query = torch.randn(1, config.num_attention_heads, 1, layout.key_dim, dtype=torch.bfloat16)
    scale, tokens = layout.key_dim**-0.5, num_blocks * layout.block_tokens
    call = ops.AttentionCall(kv_tokens=tokens, query_start=tokens - 1, scale=scale)

    def once() -> float:
        start = perf_counter()
        ops.paged_attention(query, view, call)
        return perf_counter() - start

    return num_blocks * layout.data_bytes / benchmarking.paired(once, rounds=7)[0].median


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
        pinning = CudaPinning()
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


@dataclass(frozen=True)
class Side:
    """A share of the blocks off the device: its bar (ours over DynamicCache) and prediction."""

    share: float
    bar: float
    predicted: str


def decode_short(bench: Bench) -> Iterator[Row]:
    """Time per token at the shorter context, also against transformers' offloading."""
    sides = [Side(0.0, 1.05, "<= 1.00"), Side(0.5, 1.7, "1.65-1.00"), Side(0.9, 3.0, "2.97-1.14")]
    yield from decode(bench, bench.sizes.short, sides, with_offloading=True)


def decode_long(bench: Bench) -> Iterator[Row]:
    """Time per token at the longer context."""
    sides = [Side(0.25, 3.3, "3.30-1.25"), Side(0.5, 6.6, "6.61-2.38")]
    yield from decode(bench, bench.sizes.long, sides, with_offloading=False)


def decode(bench: Bench, asked: int, sides: list[Side], with_offloading: bool) -> Iterator[Row]:
    """All sides behind the same context, in turn."""
    sizes, rates = bench.sizes, bench.rates
    bench.model  # noqa: B018 - its memory counts
    context = bench.context_that_fits(asked, [side.share for side in sides] + [0.9])
    dynamic = bench.dynamic(context)
    room = context + sizes.new + 1
    caches = [bench.tiered(room, side.share) for side in sides]
    # The link's share is that of the copy lane alone, with the most off the device.
    most = sides[-1].share
    copying = bench.tiered(room, most, **COPY_LANE)
    for cache in [*caches, copying]:
        bench.fill_like(cache, dynamic)
    everybody: list[Cache] = [dynamic, *caches, copying]
    if with_offloading and bench.machine.is_cuda:
        offloaded = DynamicCache(config=sizes.config, offloading=True)
        for index, layer in enumerate(dynamic.layers):
            offloaded.update(layer.keys, layer.values, index)
        everybody.append(offloaded)
    ids = bench.ids(context + 1)
    base, *samples = benchmarking.paired(
        *(lambda cache=cache: bench.seconds_per_token(cache, ids) for cache in everybody),
        rounds=sizes.rounds,
        warmup=1,
    )
    note = f"DynamicCache {base.median * 1e3:.1f} ms/token"
    for side, cache, ours in zip(sides, caches, samples, strict=False):
        where = f"{share_off(cache):.0%} off the device" if side.share else "everything fits"
        yield judged_ratio(f"decode {context:,}: {where}", side, ours, base, note, context == asked)
    copied = samples[len(sides)]
    before = copying.stats().counters.loaded_bytes
    bench.seconds_per_token(copying, ids)
    loaded = (copying.stats().counters.loaded_bytes - before) / sizes.new  # for a token
    if "h2d" in rates:
        yield at_least(
            f"decode {context:,}: copy lane's share of the copy rate",
            loaded / copied.median / rates["h2d"],
            0.85 if context == asked else None,
            "1.0",
            note=f"{loaded / copied.median / 1e9:.1f} GB/s, {copied.median * 1e3:.1f} ms/token",
        )
    if len(samples) > len(sides) + 1:
        theirs, ours = samples[-1], samples[len(sides) - 1]
        yield at_least(
            f"decode {context:,}: over transformers' offloading",
            theirs.median / ours.median,
            1.5 if context == asked else None,
            "1.5-3.9",
            note=f"theirs {theirs.median * 1e3:.1f} ms/token, all of it off",
        )
    elif with_offloading:
        yield Row("decode: over transformers' offloading", verdict="skipped", note="needs CUDA")
    for cache in [*caches, copying]:
        cache.close()


def judged_ratio(
    what: str,
    side: Side,
    ours: benchmarking.Samples,
    base: benchmarking.Samples,
    note: str,
    is_as_asked: bool,
) -> Row:
    """Ours over theirs; not judged at a size other than the bar's."""
    pairs = [a / b for a, b in zip(ours.seconds, base.seconds, strict=True)]
    return at_most(
        what,
        ours.median / base.median,
        side.bar if is_as_asked else None,
        side.predicted,
        note=f"[{min(pairs):.2f}, {max(pairs):.2f}] {ours.median * 1e3:.1f} ms, {note}",
        data={"ours_seconds": ours.seconds, "baseline_seconds": base.seconds},
    )


def prefill(bench: Bench) -> Iterator[Row]:
    """One chunk behind a context, at several shares off the device. A model that attends by "sdpa"
    brings a mask of queries by tokens, one that attends by "tiered" brings none."""
    sizes = bench.sizes
    bench.model  # noqa: B018 - its memory counts
    sides = [Side(share, 1.3, "1.00-1.05") for share in (0.0, 0.5, 0.9)]
    context = bench.context_that_fits(sizes.short, [side.share for side in sides])
    dynamic = bench.dynamic(context)
    caches = [bench.tiered(context + sizes.prefill, side.share) for side in sides]
    for cache in caches:
        bench.fill_like(cache, dynamic)
    ids = bench.ids(sizes.prefill)
    runs = [
        *((side, cache, "tiered") for side, cache in zip(sides, caches, strict=True)),
        (sides[-1], caches[-1], "sdpa"),
    ]
    base, *samples = benchmarking.paired(
        lambda: bench.prefill_seconds(dynamic, ids, "sdpa"),
        *(
            lambda cache=cache, name=name: bench.prefill_seconds(cache, ids, name)
            for _, cache, name in runs
        ),
        rounds=sizes.rounds,
        warmup=1,
    )
    for (side, cache, name), ours in zip(runs, samples, strict=True):
        yield judged_ratio(
            f"prefill {sizes.prefill:,} behind {context:,}: {share_off(cache):.0%} off, {name}",
            side,
            ours,
            base,
            f"DynamicCache {base.median * 1e3:.0f} ms",
            context == sizes.short,
        )
    for cache in caches:
        cache.close()


class Attention(torch.nn.Module):
    """What an attention function wants to know of its layer."""

    is_causal = True


@torch.no_grad()
def error(bench: Bench) -> Iterator[Row]:
    """One layer's attention against float64, over the error of sdpa in the same dtype."""
    layout, heads = bench.layout, bench.sizes.config.num_attention_heads
    tokens, device = bench.sizes.error, bench.machine.device
    group = heads // layout.kv_heads
    shape = (1, layout.kv_heads, tokens, layout.key_dim)
    keys, values = torch.randn((2, *shape), device=device).bfloat16().unbind(0)
    dense = [states.repeat_interleave(group, 1) for states in (keys, values)]
    for what, queries in (("decode", 1), ("prefill", min(256, tokens // 4))):
        query = 2 * torch.randn((1, heads, queries, layout.key_dim), device=device).bfloat16()
        seen = torch.ones(queries, tokens, dtype=torch.bool, device=device)
        seen = seen.tril(tokens - queries)
        sdpa = torch.nn.functional.scaled_dot_product_attention(query, *dense, attn_mask=seen)
        scores = query.double() @ dense[0].double().mT * layout.key_dim**-0.5
        exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ dense[1].double()
        with bench.tiered(tokens, 0.0) as cache:
            cache.update(keys[:, :, :-queries], values[:, :, :-queries], 0)
            handles = cache.update(keys[:, :, -queries:], values[:, :, -queries:], 0)
            out, _ = tiered_attention_forward(Attention().eval(), query, *handles, None)
            del handles
        ours, theirs = (
            float((result.double() - exact).norm() / exact.norm())
            for result in (out.transpose(1, 2), sdpa)
        )
        yield at_most(
            f"error against float64 over sdpa's, {what}",
            ours / theirs,
            1.3,
            "0.7-1.3",
            note=f"{ours:.2e} and {theirs:.2e}, {tokens:,} tokens, {queries} queries",
        )


def capacity(bench: Bench) -> Iterator[Row]:
    """The longest context that decodes when the process may use 24 GB."""
    bench.model  # noqa: B018 - its memory counts
    machine, sizes, target = bench.machine, bench.sizes, 4.0
    with machine.limited_to(SMALL_GPU_BYTES):
        theirs = longest_dynamic(bench)
        asked = int(target * theirs)
        knobs = small_budget(bench, asked)
        if knobs["host_bytes"] > (host := free_memory_bytes()):
            raise Skipped(
                f"{knobs['host_bytes'] / GIB:.0f} GiB of host memory needed for {target:g} times "
                f"the {theirs:,} tokens of DynamicCache, {host / GIB:.0f} GiB are free"
            )
        with bench.tiered(asked + sizes.new + 1, 0.9, **knobs) as cache:
            random_fill(bench, cache, asked)
            seconds = bench.seconds_per_token(cache, bench.ids(asked + 1))
            ours = cache.get_seq_length()
    yield at_least(
        "longest context on 24 GB over DynamicCache's",
        ours / theirs,
        target,
        ">= 5.7",
        note=f"{ours:,} tokens decode at {seconds * 1e3:.0f} ms each, theirs end at {theirs:,}; "
        "longer ones were not tried",
        data={"ours": ours, "theirs": theirs},
    )


def small_budget(bench: Bench, context: int) -> dict[str, int]:
    """Knobs of a cache for a device that has little room: an eighth of what the process may use,
    the rest in host memory."""
    whole = (bench.layout.num_blocks(context) + 2) * bench.num_layers * bench.layout.num_bytes
    device = SMALL_GPU_BYTES // 8 if bench.machine.is_cuda else whole // 4
    return {
        "device_bytes": device + bench.sizes.staging_bytes,
        "host_bytes": whole + HOST_SPARE_BYTES,
    }


def longest_dynamic(bench: Bench) -> int:
    """Tokens that a `DynamicCache` holds while it still decodes; it grows until memory is out."""
    dynamic, good = DynamicCache(config=bench.sizes.config), 0
    try:
        while True:
            random_fill(bench, dynamic, bench.sizes.step)
            length = dynamic.get_seq_length()
            bench.machine.check_cache(length * bench.token_bytes())
            bench.seconds_per_token(dynamic, bench.ids(length + 1))
            good = length
    except torch.OutOfMemoryError:
        if not good:
            raise
    return good


def random_fill(bench: Bench, cache: Cache, num_tokens: int) -> None:
    """Append random keys and values to every layer, in the chunks of a prefill."""
    layout = bench.layout
    for first in range(0, num_tokens, bench.sizes.prefill):
        count = min(bench.sizes.prefill, num_tokens - first)
        shape = (2, 1, layout.kv_heads, count, layout.key_dim)
        for index in range(bench.num_layers):
            states = torch.randn(shape, dtype=layout.dtype, device=bench.machine.device)
            cache.update(*states.unbind(0), index)


@torch.no_grad()
def memory(bench: Bench) -> Iterator[Row]:
    """Device memory at its peak, over the budget, in decode and prefill."""
    machine, sizes, model = bench.machine, bench.sizes, bench.model
    context = bench.context_that_fits(sizes.short, [0.9])
    ids, chunk = bench.ids(context + 1), bench.ids(sizes.prefill)
    before = machine.allocated_bytes()
    with machine.peak_bytes() as alone:  # what the model itself takes while it runs
        model(chunk, use_cache=False, logits_to_keep=1)
    of_model = max(0, alone[0] - before)
    free, before = machine.free_bytes(), machine.allocated_bytes()
    with bench.tiered(context + sizes.prefill, 0.75) as cache, machine.peak_bytes() as peak:
        random_fill(bench, cache, context)
        bench.seconds_per_token(cache, ids)
        bench.prefill_seconds(cache, chunk, "tiered")  # with "sdpa" its mask would count
        device = cache.stats().tiers[0]
        taken = free - machine.free_bytes()
    budget = device.budget_bytes
    held = max(peak[0] - before - of_model, device.peak_bytes)
    yield at_most(
        "device memory at its peak over the budget",
        held / budget,
        1.05,
        "<= 1.05",
        note=f"{held / GIB:.2f} of {budget / GIB:.2f} GiB, {of_model / GIB:.2f} of the model's "
        f"own taken off; the driver gave {taken / GIB:.2f}",
        data={"held": held, "budget": budget, "of_model": of_model, "taken": taken},
    )


# Name -> (seconds it may need, what it does); in the order of the table.
SECTIONS: dict[str, tuple[float, Section]] = {
    "tests": (TESTS_SECONDS, tests),
    "link": (30, link),
    "error": (20, error),
    "decode_short": (70, decode_short),
    "prefill": (50, prefill),
    "decode_long": (80, decode_long),
    "memory": (40, memory),
    "capacity": (60, capacity),
}


# ---- running them --------------------------------------------------------------------------------


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False (--device cpu --tiny tries)")
    rows = run_sections(
        {name: SECTIONS[name] for name in arguments.sections},
        partial(make_bench, arguments.device, sizes_named(arguments)),
        time_limit=arguments.time_limit,
        write=partial(write, arguments),
    )
    has_no_failure = print_table(rows)
    print(f"written to {arguments.json}")
    sys.exit(0 if has_no_failure else 1)


def make_bench(device: str, sizes: Sizes, rates: dict[str, float]) -> Bench:
    torch.manual_seed(0)
    logging.set_verbosity_error()
    return Bench(device, sizes, rates)


def sizes_named(arguments: argparse.Namespace) -> Sizes:
    return TINY_SIZES if arguments.tiny else QUICK if arguments.quick else FULL


def write(arguments: argparse.Namespace, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """The JSON, as far as it got."""
    path = Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        **benchmarking.environment(),
        **facts,
        "sizes": "tiny" if arguments.tiny else "quick" if arguments.quick else "full",
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="shorter contexts, 2 rounds")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: only tries the code")
    parser.add_argument("--json", default=str(RESULTS), help="where the results go")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_SECONDS, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
