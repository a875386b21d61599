"""Slowdown at equal context, with identical output: caches that hold the same context continue it.

In turn, in one process: `DynamicCache`, a `TieredCache` for each share of its blocks off the
device, a cache that re-reads whole layers from disk for every token, and on a GPU transformers' own
offloading. Slowdown is the median time of a side over the median of `DynamicCache`, so below 1 is
faster; every side's tokens must be those of `DynamicCache`.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_tiered_cache.evaluation.models import check_has_only_full_attention
from hf_tiered_cache.evaluation.scoring import block_shape
from hf_tiered_cache.evaluation.timing import decode, fill, paired
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.integration.progress import progress_bar

DYNAMIC, RELOADING, OFFLOADED = "DynamicCache", "re-reading layers", "DynamicCache, offloaded"
WARMUP = 1  # rounds that do not count
HEADINGS = f"{'context':>8} {'cache':<26} {'off device':>10} {'tokens/s':>9} {'slowdown':>9}"


@dataclass
class Row:
    """One side at one context. Seconds are of one token; slowdowns are over `DynamicCache`."""

    context: int
    cache: str
    share: float | None  # of the blocks off the device, as measured
    seconds: float
    slowdown: float
    slowdown_min: float
    slowdown_max: float
    is_identical: bool

    def __str__(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%}"
        return (
            f"{self.context:>8,} {self.cache:<26} {share:>10} {1 / self.seconds:>9.2f} "
            f"{self.slowdown:>8.2f}x [{self.slowdown_min:.2f}, {self.slowdown_max:.2f}]"
            + ("" if self.is_identical else "  TOKENS DIFFER")
        )


@dataclass(frozen=True)
class Race:
    """Which sides run, and how; counts of tokens."""

    shares: list[float]  # of the blocks off the device, each a TieredCache; from 0 to below 1
    new_tokens: int = 8
    rounds: int = 5
    chunk: int = 1024  # in one prefill forward
    disk_dir: str | None = None
    disk_io: str = "auto"
    has_reloading: bool = True

    @property
    def num_decodes(self) -> int:
        """Times that new tokens are decoded, on a CPU."""
        return (1 + len(self.shares) + self.has_reloading) * (self.rounds + WARMUP)


class ReloadingLayer(DynamicLayer):
    """A layer whose past lies in a file that is read whole for every token."""

    def __init__(self, path: Path, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._path, self._num_tokens = path, keys.shape[2]
        save_file({"keys": keys.contiguous(), "values": values.contiguous()}, path)

    def get_seq_length(self) -> int:
        """Tokens of the file and those behind them."""
        return self._num_tokens + super().get_seq_length()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new tokens in memory, return them behind those of the file, read again."""
        tail = super().update(key_states, value_states)
        forget_pages(self._path)  # there is no room for them: that is why it is on disk
        past = load_file(self._path, device=str(key_states.device))
        keys, values = (torch.cat(pair, 2) for pair in zip(past.values(), tail, strict=True))
        return keys, values


def forget_pages(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def run_race(
    model: PreTrainedModel, text_ids: torch.Tensor | None, context: int, race: Race
) -> list[Row]:
    """Every side at one context, `DynamicCache` first.

    text_ids: `[1, more than context]`, read by the model; None for random keys and values, where
    only time is of interest. Raises ModelError for a model whose caches cannot be compared.
    """
    check_has_only_full_attention(model)
    if text_ids is None:
        ids = torch.randint(0, model.config.vocab_size, (1, context + 1))
    else:
        ids = text_ids[:, : context + 1]
    ids = ids.to(model.device)
    if race.disk_dir:
        Path(race.disk_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=race.disk_dir) as folder:
        sides: dict[str, Cache] = {}
        try:
            _make_sides(sides, model, ids, text_ids is None, race, Path(folder))
            return _time_sides(sides, model, ids, race)
        finally:
            for cache in sides.values():
                if isinstance(cache, TieredCache):
                    cache.close()


def _time_sides(
    sides: dict[str, Cache], model: PreTrainedModel, ids: torch.Tensor, race: Race
) -> list[Row]:
    tokens: dict[str, list[int]] = {}
    bar = progress_bar(len(sides) * (race.rounds + WARMUP), "rounds", "run")

    def timed(name: str) -> float:
        tokens[name], seconds = decode(model, sides[name], ids, race.new_tokens)
        bar.update()
        return seconds / race.new_tokens

    with bar:
        samples = paired(
            *(lambda name=name: timed(name) for name in sides),
            rounds=race.rounds,
            warmup=WARMUP,
        )
    rows = []
    for name, one in zip(sides, samples, strict=True):
        ratios = [a / b for a, b in zip(one.seconds, samples[0].seconds, strict=True)]
        rows.append(
            Row(
                context=ids.shape[1] - 1,
                cache=name.partition(" at ")[0],
                share=off_device(sides[name]),
                seconds=one.median,
                slowdown=one.median / samples[0].median,
                slowdown_min=min(ratios),
                slowdown_max=max(ratios),
                is_identical=tokens[name] == tokens[DYNAMIC],
            )
        )
    return rows


@torch.no_grad()
def _make_sides(
    sides: dict[str, Cache],
    model: PreTrainedModel,
    ids: torch.Tensor,
    is_random: bool,
    race: Race,
    folder: Path,
) -> None:
    """Add caches by name that hold the same keys and values of all tokens but the last."""
    context = ids.shape[1] - 1
    dynamic = DynamicCache(config=model.config)
    if is_random:
        fill((dynamic,), model, context)
    else:
        with progress_bar(context, "prefill") as bar:
            for chunk in ids[:, :context].split(race.chunk, 1):
                model(chunk, past_key_values=dynamic, logits_to_keep=1)
                bar.update(chunk.shape[1])
    sides[DYNAMIC] = dynamic
    shape = block_shape(model, None, race.disk_dir)
    for share in race.shares:
        budgets = shape.budgets(context + race.new_tokens, share)
        if share:
            budgets["disk_io"] = race.disk_io
        cache = TieredCache(config=model.config, disk_dir=race.disk_dir, **budgets)
        sides[f"TieredCache at {share}"] = cache
        for first in range(0, context, race.chunk):
            part = slice(first, first + race.chunk)
            for index, layer in enumerate(dynamic.layers):
                cache.update(layer.keys[:, :, part], layer.values[:, :, part], index)
    if race.has_reloading:
        reloading = DynamicCache()
        reloading.layers = [
            ReloadingLayer(folder / f"layer{index}.safetensors", layer.keys, layer.values)
            for index, layer in enumerate(dynamic.layers)
        ]
        sides[RELOADING] = reloading
    if model.device.type == "cuda":
        offloaded = DynamicCache(config=model.config, offloading=True)
        for index, layer in enumerate(dynamic.layers):
            offloaded.update(layer.keys, layer.values, index)
        sides[OFFLOADED] = offloaded


def off_device(cache: Cache) -> float | None:
    """Share of the blocks that have no copy on the device; None where there are no blocks."""
    if not isinstance(cache, TieredCache):
        return None
    stats = cache.stats()
    return stats.cold_blocks / (stats.num_layers * -(-stats.num_tokens // stats.block_tokens))
