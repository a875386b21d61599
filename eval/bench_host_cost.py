"""What a token costs the host where a GPU decodes: each call of CUDA is a stub that does nothing.

    python eval/bench_host_cost.py
    python eval/bench_host_cost.py --profile

A model whose 32 layers update and attend and do nothing else decodes behind contexts of 32K and 128K
tokens whose blocks (256 tokens each, made small, for no byte matters here) lie partly in host memory.
Loads are never ready when they are asked for, which costs the host most. Printed: thread CPU time
for a token and, for each layer, the calls of Python and of CUDA. The calls are the same on every
machine; tests hold them (tests/test_host_cost.py). `DynamicCache` with sdpa does the same tokens.
"""

import argparse
import cProfile
import gc
import pstats
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import thread_time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_tiered_cache import TieredCache, tiered_attention_forward
from hf_tiered_cache.devices import CpuDevice, Device, in_place
from hf_tiered_cache.devices.cuda_lane import CudaFlags, CudaLane
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.kernels import cores, loader, ops
from hf_tiered_cache.kernels.cores import CudaCore
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers import DeviceTier

import benchmarking

LAYERS = 32
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 8
BLOCK_TOKENS, BLOCK_BYTES = 64, 4096
RING_BLOCKS = 256
# Reads ahead are cut by bytes, and a block of an 8B model has a MiB.
READ_BYTES = (4 * BLOCK_BYTES, 32 * BLOCK_BYTES)
GROUP_COLUMNS = 8
STUB = torch.device("cpu", 0)  # has an index, as a GPU has


@dataclass(frozen=True)
class Case:
    """Blocks of a layer, the share of them off the device and the part of those attended in place;
    `bar`: thread CPU milliseconds for a token."""

    name: str
    columns: int
    share: float
    cpu_share: float
    bar: float


CASES = (
    Case("resident", 128, 0.0, 0.0, 1.5),  # times DynamicCache's
    Case("32K, 90% off, copy lane", 128, 0.9, 0.0, 10.0),
    Case("32K, 90% off, both lanes", 128, 0.9, 0.66, 10.0),
    Case("128K, 50% off, copy lane", 512, 0.5, 0.0, 14.0),
    Case("128K, 50% off, both lanes", 512, 0.5, 0.66, 14.0),
)


class StubEvent:
    """A moment that has passed; of a load, one that never has when it is asked for."""

    calls: Counter[str]
    is_late = False

    def __init__(self, enable_timing: bool = False) -> None:
        self.calls["event made"] += 1
        self._is_load = False

    def record(self, stream: "StubStream") -> None:
        self.calls["event record"] += 1
        self._is_load = stream.is_load

    def query(self) -> bool:
        self.calls["event query"] += 1
        return not (self.is_late and self._is_load)

    def synchronize(self) -> None:
        self.calls["event synchronize"] += 1

    def elapsed_time(self, end: "StubEvent") -> float:
        return 0.001


class StubStream:
    """A stream that does nothing."""

    is_load = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda_stream, self.device_index = 7, 0

    def record_event(self) -> StubEvent:
        event = StubEvent()
        event.record(self)
        return event

    def wait_event(self, event: StubEvent) -> None:
        StubEvent.calls["stream wait"] += 1

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        StubEvent.calls["stream synchronize"] += 1


class StubCore:
    """The compiled CUDA core: every function counts and returns a number."""

    CopyDirection = SimpleNamespace(HOST_TO_DEVICE=0, DEVICE_TO_HOST=1)

    def __init__(self, calls: Counter[str]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., int]:
        def stub(*arguments: object, **keywords: object) -> int:
            self._calls[f"core.{name}"] += 1
            return 1 << 16

        setattr(self, name, stub)
        return stub


class StubWorker:
    """The thread that attends in place, which is always done."""

    def submit(self, *arguments: object, **keywords: object) -> SimpleNamespace:
        return SimpleNamespace(is_done=True, was_cancelled=False, error="", seconds=0.0)

    def wait(self, *arguments: object) -> None:
        pass

    def close(self) -> None:
        pass


class StubFlags(CudaFlags):
    def mailbox(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(num_bytes, dtype=torch.uint8)


class StubPinning:
    def register(self, address: int, num_bytes: int) -> bool:
        return True

    def unregister(self, address: int) -> None:
        pass


@dataclass
class StubGpu:
    """What stands for the GPU while `plugged_in`."""

    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def plugged_in(self) -> Iterator[None]:
        """Let caches on the CPU take it for a CUDA device."""
        core, slabs = StubCore(self.calls), []
        make_tier = DeviceTier.__init__

        def noted(tier: DeviceTier, *arguments: Any, **knobs: Any) -> None:
            make_tier(tier, *arguments, **knobs)
            slabs.append(tier.slab)

        class Lane(CudaLane):
            def carries(self, block: torch.Tensor) -> bool:
                address = block.data_ptr()
                return any(0 <= address - slab.data_ptr() < slab.numel() for slab in slabs)

            def probe(self, *arguments: object) -> float:
                return 1e9

            def settle_device(self) -> None:
                pass

            def occupy(self, *arguments: object) -> None:
                pass

        class StubDevice(CpuDevice):
            pinning = StubPinning()

            def __init__(self, torch_device: torch.device) -> None:
                super().__init__(torch_device)
                self.copy_lane = Lane(STUB, core)  # type: ignore[arg-type]
                self.copy_lane._loads.is_load = True  # type: ignore[attr-defined]
                self.in_place = InPlaceAttention(StubFlags(STUB, core))  # type: ignore[arg-type]

            def group_columns(self, layout: BlockLayout) -> int:
                return GROUP_COLUMNS

        StubEvent.calls = self.calls
        stream = StubStream()
        kernel = loader.Kernel("stub", CudaCore(core))  # type: ignore[arg-type]
        with ExitStack() as stack:
            for target, name, stub in (
                (torch.cuda, "Stream", StubStream),
                (torch.cuda, "Event", StubEvent),
                (torch.cuda, "current_stream", lambda _=None: stream),
                (cores, "_raw_stream", abs),  # no call of Python, as torch's is none
                (in_place, "AttentionWorker", StubWorker),
                (DeviceTier, "__init__", noted),
            ):
                stack.enter_context(patch.object(target, name, stub))
            stack.enter_context(patch.dict(Device.registry, {"cpu": StubDevice}))
            stack.enter_context(patch("hf_tiered_cache.blocks.staging.LANE_READ_BYTES", READ_BYTES))
            stack.enter_context(ops.use_kernel(kernel))
            yield


class Attention(torch.nn.Module):
    """A layer that attends: what an attention function wants to know of it."""

    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx


class Decoder(PreTrainedModel):
    """A model of nothing but cache and attention: its call is a forward, as a model's is."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.attentions = [Attention(self.config, layer).eval() for layer in range(LAYERS)]

    def forward(self, past_key_values: Cache, attend: Callable[..., Any]) -> None:
        for layer, attention in enumerate(self.attentions):
            states = past_key_values.update(KEYS, VALUES, layer)
            attend(attention, QUERY, *states, None, scaling=0.1)


MODEL = Decoder().eval()
QUERY = torch.randn(1, HEADS, 1, HEAD_DIM)
KEYS, VALUES = torch.randn(2, 1, KV_HEADS, 1, HEAD_DIM).unbind(0)


def filled(case: Case) -> TieredCache:
    """A cache as a prefill leaves it."""
    columns = case.columns
    resident = columns if case.share == 0 else max(1, round((1 - case.share) * columns))
    cache = TieredCache(
        device_bytes=(resident * LAYERS + RING_BLOCKS) * BLOCK_BYTES,
        staging_bytes=RING_BLOCKS * BLOCK_BYTES,
        host_bytes=(columns + 2) * LAYERS * BLOCK_BYTES if case.share else 0,
        disk_bytes=0,
        block_tokens=BLOCK_TOKENS,
        cpu_share=case.cpu_share,
    )
    chunk = 16 * BLOCK_TOKENS
    left = columns * BLOCK_TOKENS - BLOCK_TOKENS + 4  # room for what is decoded
    while left:
        count = min(left, chunk)
        states = torch.zeros(2, 1, KV_HEADS, count, HEAD_DIM).unbind(0)
        for layer in range(LAYERS):
            cache.update(*states, layer)
        left -= count
    return cache


def token(cache: Cache, attend: Callable[..., Any] = tiered_attention_forward) -> float:
    """Thread CPU seconds of one token."""
    start = thread_time()
    MODEL(past_key_values=cache, attend=attend)
    return thread_time() - start


@contextmanager
def decoding(case: Case) -> Iterator[tuple[StubGpu, TieredCache]]:
    """A cache that has decoded some tokens and whose loads are late from here on."""
    gpu = StubGpu()
    with torch.no_grad(), gpu.plugged_in(), filled(case) as cache:
        for _ in range(3):
            token(cache)
        with patch.object(StubEvent, "is_late", True):
            token(cache)
            yield gpu, cache


def calls_per_layer(gpu: StubGpu, cache: TieredCache) -> dict[str, float]:
    """Of Python's functions and of CUDA, for a layer and token; the same on every machine."""
    gpu.calls.clear()
    token(cache)
    counted = dict(gpu.calls)
    counted["Python calls"] = python_calls(lambda: token(cache))
    return {name: count / LAYERS for name, count in sorted(counted.items())}


def python_calls(work: Callable[[], object]) -> int:
    """Functions of Python that are called."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what it finalizes is nobody's cost here
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


def milliseconds(cache: TieredCache, rounds: int) -> tuple[float, float]:
    """Thread CPU time of a token, and that of `DynamicCache` in turn with it."""
    ours, theirs = [], []
    dynamic = DynamicCache()
    for _ in range(rounds):
        ours.append(token(cache))
        theirs.append(token(dynamic, sdpa_attention_forward))
    return median(ours) * 1e3, median(theirs) * 1e3


def print_profile(cache: TieredCache) -> None:
    """Where the time of a token goes."""
    recorded = cProfile.Profile()
    recorded.runcall(token, cache)
    pstats.Stats(recorded).sort_stats("tottime").print_stats(25)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    print(f"{benchmarking.environment()['processor']}, {LAYERS} layers, milliseconds for a token")
    for case in CASES:
        with decoding(case) as (gpu, cache):
            ours, theirs = milliseconds(cache, arguments.rounds)
            counted = calls_per_layer(gpu, cache)
            if arguments.profile:
                print_profile(cache)
        bar = case.bar * theirs if case.share == 0 else case.bar
        verdict = "reached" if ours <= bar else "MISSED"
        print(f"{case.name:<28}{ours:6.1f}  bar {bar:4.1f}  {verdict:<8} DynamicCache {theirs:.1f}")
        shown = ", ".join(f"{name} {count:.1f}" for name, count in counted.items())
        print(f"    for each layer: {shown}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="show where a token's time goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
