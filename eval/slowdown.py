"""The number nobody publishes: slowdown at equal context, with identical output.

    python eval/slowdown.py
    python eval/slowdown.py --shape qwen2.5-0.5b --contexts 2048 8192 32768 --disk-io direct
    python eval/slowdown.py --model org/name --prompt book.txt

Caches that hold the same context continue it in turn, in one run: `DynamicCache`, a `TieredCache`
for each share of its blocks off the device, a cache that re-reads whole layers from disk for every
token, and on a GPU transformers' own offloading. Slowdown is the median time of a side over the
median of `DynamicCache`, so below 1 is faster; every side's tokens must be those of `DynamicCache`.

A model reads the context; `--shape` takes a random model of a known shape instead, and random keys
and values, since only time is of interest then.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import bench_generate
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from hf_tiered_cache import TieredCache

import benchmarking
import corpora
import plots
from scoring import block_shape

TINY_LM = Path(__file__).parent / "tiny_lm"
SHAPES = {"qwen2.5-0.5b": bench_generate.CONFIG}
DYNAMIC, RELOADING, OFFLOADED = "DynamicCache", "re-reading layers", "DynamicCache, offloaded"


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


class ReloadingLayer(DynamicLayer):
    """A layer whose past lies in a file that is read whole for every token."""

    def __init__(self, path: Path, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._path, self._num_tokens = path, keys.shape[2]
        save_file({"keys": keys.contiguous(), "values": values.contiguous()}, path)

    def get_seq_length(self) -> int:
        return self._num_tokens + super().get_seq_length()

    def update(self, key_states, value_states, *args, **kwargs):
        tail = super().update(key_states, value_states)
        forget_pages(self._path)  # there is no room for them: that is why it is on disk
        past = load_file(self._path, device=str(key_states.device))
        return tuple(torch.cat(pair, 2) for pair in zip(past.values(), tail, strict=True))


def forget_pages(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    arguments = parse_arguments()
    model, text_ids = load(arguments)
    rows: list[Row] = []
    print(f"{'context':>8} {'cache':<26} {'off device':>10} {'tokens/s':>9} {'slowdown':>9}")
    with tempfile.TemporaryDirectory(dir=arguments.disk_dir) as folder:
        for context in arguments.contexts:
            for row in bench_context(model, text_ids, context, arguments, Path(folder)):
                rows.append(row)
                print(line(row), flush=True)
    write(rows, arguments)
    if not all(row.is_identical for row in rows):
        sys.exit("some tokens differ from those of DynamicCache")


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """The model, and the ids `[1, tokens]` of a text to read; None where it is random."""
    if arguments.shape:
        config = SHAPES[arguments.shape]
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
        return model.eval().to(arguments.device), None
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    text = (
        Path(arguments.prompt).read_text(errors="replace")
        if arguments.prompt
        else corpora.read_files(corpora.held_out_files())
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # Eight characters are no less than a token; the longest context needs no more of the text.
    text = text[: 8 * (max(arguments.contexts) + 1)]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] <= max(arguments.contexts):
        sys.exit(f"the text has {ids.shape[1]:,} tokens: expected more than the longest context")
    return model.to(arguments.device), ids


def bench_context(
    model: PreTrainedModel,
    text_ids: torch.Tensor | None,
    context: int,
    arguments: argparse.Namespace,
    folder: Path,
) -> list[Row]:
    """Every side at one context, `DynamicCache` first."""
    if text_ids is None:
        ids = torch.randint(0, model.config.vocab_size, (1, context + 1))
    else:
        ids = text_ids[:, : context + 1]
    ids = ids.to(model.device)
    sides = make_sides(model, ids, arguments, folder)
    tokens: dict[str, list[int]] = {}

    def timed(name: str) -> float:
        tokens[name], seconds = bench_generate.decode(model, sides[name], ids, arguments.new_tokens)
        return seconds / arguments.new_tokens

    samples = benchmarking.paired(
        *(lambda name=name: timed(name) for name in sides), rounds=arguments.rounds, warmup=1
    )
    rows = []
    for name, one in zip(sides, samples, strict=True):
        ratios = [a / b for a, b in zip(one.seconds, samples[0].seconds, strict=True)]
        rows.append(
            Row(
                context=context,
                cache=name.partition(" at ")[0],
                share=off_device(sides[name]),
                seconds=one.median,
                slowdown=one.median / samples[0].median,
                slowdown_min=min(ratios),
                slowdown_max=max(ratios),
                is_identical=tokens[name] == tokens[DYNAMIC],
            )
        )
    for cache in sides.values():
        if isinstance(cache, TieredCache):
            cache.close()
    return rows


@torch.no_grad()
def make_sides(
    model: PreTrainedModel, ids: torch.Tensor, arguments: argparse.Namespace, folder: Path
) -> dict[str, Cache]:
    """Caches by name that hold the same keys and values of all tokens but the last."""
    context = ids.shape[1] - 1
    dynamic = DynamicCache(config=model.config)
    if arguments.shape:
        bench_generate.fill((dynamic,), model, context)
    else:
        for chunk in tqdm(ids[:, :context].split(arguments.chunk, 1), "prefill", leave=False):
            model(chunk, past_key_values=dynamic, logits_to_keep=1)
    if any(type(layer) is not DynamicLayer for layer in dynamic.layers):
        sys.exit("this model has layers other than full attention: their caches are not compared")
    sides: dict[str, Cache] = {DYNAMIC: dynamic}
    shape = block_shape(model, None, arguments.disk_dir)
    for share in arguments.shares:
        budgets = shape.budgets(context + arguments.new_tokens, share)
        if share:
            budgets["disk_io"] = arguments.disk_io
        cache = TieredCache(config=model.config, disk_dir=arguments.disk_dir, **budgets)
        sides[f"TieredCache at {share}"] = cache
        for first in range(0, context, arguments.chunk):
            part = slice(first, first + arguments.chunk)
            for index, layer in enumerate(dynamic.layers):
                cache.update(layer.keys[:, :, part], layer.values[:, :, part], index)
    if arguments.reload:
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
    return sides


def off_device(cache: Cache) -> float | None:
    """Share of the blocks that have no copy on the device; None where there are no blocks."""
    if not isinstance(cache, TieredCache):
        return None
    stats = cache.stats()
    return stats.cold_blocks / (stats.num_layers * -(-stats.num_tokens // stats.block_tokens))


def line(row: Row) -> str:
    share = "" if row.share is None else f"{row.share:.0%}"
    return (
        f"{row.context:>8,} {row.cache:<26} {share:>10} {1 / row.seconds:>9.2f} "
        f"{row.slowdown:>8.2f}x [{row.slowdown_min:.2f}, {row.slowdown_max:.2f}]"
        + ("" if row.is_identical else "  TOKENS DIFFER")
    )


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    """JSON, a Markdown table and a plot, where an output folder is given."""
    if not arguments.output:
        return
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    environment = benchmarking.environment()
    environment |= {"model": arguments.shape or str(arguments.model), "dtype": arguments.dtype}
    results = {**environment, "rows": [asdict(row) for row in rows]}
    (folder / "slowdown.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "slowdown.md").write_text(markdown(rows, environment))
    plots.slowdown_by_share(
        {
            f"{context:,} tokens": [
                (row.share, row.slowdown)
                for row in rows
                if row.context == context and row.share is not None
            ]
            for context in arguments.contexts
        },
        folder / "slowdown.png",
    )


def markdown(rows: list[Row], environment: dict) -> str:
    """One line per context, one column per side."""
    lines = [
        f"`{environment['command']}`",
        "",
        f"{environment['processor']}, {environment['threads']} threads, kernel "
        f"{environment['kernel']}, torch {environment['torch']}, model {environment['model']}, "
        f"{environment['dtype']}. Slowdown over DynamicCache (below 1 is faster), medians of "
        "rounds in turn; all tokens identical unless said.",
        "",
        "| context | cache | off device | tokens/s | slowdown | tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = "" if row.share is None else f"{row.share:.0%}"
        same = "identical" if row.is_identical else "DIFFERENT"
        lines.append(
            f"| {row.context:,} | {row.cache} | {share} | {1 / row.seconds:.2f} | "
            f"{row.slowdown:.2f}x | {same} |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument("--shape", choices=SHAPES, help="a random model of this shape instead")
    parser.add_argument("--prompt", help="text file (default: held-out standard library files)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 0.95])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--disk-dir", help="folder of the disk tier and the layers' files")
    parser.add_argument("--disk-io", default="auto", help='"auto", "direct", "buffered"')
    parser.add_argument("--no-reload", dest="reload", action="store_false")
    parser.add_argument("--output", help="folder for slowdown.json, .md and .png")
    arguments = parser.parse_args()
    if not all(0 <= share < 1 for share in arguments.shares):
        parser.error(f"--shares {arguments.shares}: expected numbers from 0 to below 1")
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
