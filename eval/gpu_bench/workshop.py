"""What the sections share: sizes, the model, caches, and how a token is timed."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import bench_generate
import torch
from sections import Row, Skipped, at_most
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedModel

from gpu_bench.machine import GIB, Machine
from hf_tiered_cache import TieredCache, TieredCacheConfig
from hf_tiered_cache.config import free_memory_bytes
from hf_tiered_cache.integration.planning import plan_by_profile
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.planner.prediction import Figure
from hf_tiered_cache.planner.profiles import PROFILES

LOG_DIR = Path(__file__).parents[2] / "build" / "gpu_logs"
HOST_SPARE_BYTES = 256 << 20  # of a cache's host budget

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


@dataclass(frozen=True)
class TokenTime:
    """Of one token, in seconds: until the device was done, until the calls had returned, and what
    the calling thread took of its CPU."""

    device: float
    host: float
    cpu: float


def median(times: Sequence[TokenTime]) -> TokenTime:
    """Each part's own."""
    parts = zip(*((time.device, time.host, time.cpu) for time in times), strict=True)
    return TokenTime(*map(statistics.median, parts))


class Bench:
    """What the sections share: machine, sizes, the model, and rates measured by an earlier one."""

    def __init__(
        self, device: str, sizes: Sizes, rates: dict[str, float], log_dir: Path = LOG_DIR
    ) -> None:
        """log_dir: for what is too long for a table."""
        self.machine = Machine(device)
        self.log_dir = log_dir
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
        """An empty cache with the `knobs` for a context, but for those given."""
        return TieredCache(self.sizes.config, **{**self.knobs(context, share), **knobs})

    def knobs(self, context: int, share: float) -> dict[str, Any]:
        """Of a cache for `context` tokens, with room for all but `share` of its blocks on the
        device, and for those in host memory."""
        columns = self.layout.num_blocks(context)
        resident = columns if share == 0 else max(1, round((1 - share) * columns))
        block, layers = self.layout.num_bytes, self.num_layers
        return {
            "device_bytes": resident * layers * block + self.sizes.staging_bytes,
            "staging_bytes": self.sizes.staging_bytes,
            "host_bytes": (columns + 1) * layers * block + HOST_SPARE_BYTES if share else 0,
            "disk_bytes": 0,
            "block_tokens": self.sizes.block_tokens,
        }

    def predicted_seconds(self, context: int, share: float) -> float:
        """What the planner says of a token with copies alone: the profile of the H200, but for the
        link's rate where it was measured here."""
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(self.sizes.config, dtype=torch.bfloat16)
        knobs = TieredCacheConfig(**self.knobs(context, share))
        plan = plan_by_profile(outline, knobs, context, PROFILES["h200"])
        if "h2d" in self.rates:
            link = Figure(self.rates["h2d"], "measured by the section link")
            plan = replace(plan, rates=replace(plan.rates, link=link))
        return plan.decode().seconds

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

    @torch.no_grad()
    def token_time(self, cache: Cache, num_tokens: int) -> TokenTime:
        """Greedy tokens behind the cached context, which is left as it was. Nothing in between
        waits for the device, so the host may run ahead of it."""
        token = self.ids(1)
        self.machine.synchronize()
        start, cpu = perf_counter(), thread_time()
        for _ in range(num_tokens):
            logits = self.model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        returned, cpu = perf_counter(), thread_time() - cpu
        self.machine.synchronize()
        done = perf_counter()
        cache.crop(-num_tokens)
        return TokenTime(
            (done - start) / num_tokens, (returned - start) / num_tokens, cpu / num_tokens
        )

    def log(self, name: str) -> Path:
        """Where a section writes what is too long for a table."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        return self.log_dir / name

    @torch.no_grad()
    def prefill_time(self, cache: Cache, ids: torch.Tensor, attention: str) -> TokenTime:
        """One chunk behind the cached context, which is left as it was."""
        self.model.set_attn_implementation(attention)
        self.machine.synchronize()
        start, cpu = perf_counter(), thread_time()
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        returned, cpu = perf_counter(), thread_time() - cpu
        self.machine.synchronize()
        done = perf_counter()
        cache.crop(-ids.shape[1])
        self.model.set_attn_implementation("sdpa")
        return TokenTime(done - start, returned - start, cpu)

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


def times_note(time: TokenTime) -> str:
    return f"host {time.host * 1e3:.1f} ms, its CPU {time.cpu * 1e3:.1f}"


def judged_ratio(
    what: str,
    ours: Sequence[TokenTime],
    theirs: Sequence[TokenTime],
    bar: float | None,
    predicted: str,
    note: str = "",
) -> Row:
    """Ours over theirs, timed in turn."""
    pairs = [a.device / b.device for a, b in zip(ours, theirs, strict=True)]
    mine, base = median(ours), median(theirs)
    return at_most(
        what,
        mine.device / base.device,
        bar,
        predicted,
        note=f"[{min(pairs):.2f}, {max(pairs):.2f}] {mine.device * 1e3:.1f} ms, {times_note(mine)};"
        f" DynamicCache {base.device * 1e3:.1f} ms; {note}",
        data={
            "ours": [asdict(time) for time in ours],
            "baseline": [asdict(time) for time in theirs],
        },
    )
