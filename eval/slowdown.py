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
import sys
from dataclasses import asdict
from pathlib import Path

import bench_generate
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_tiered_cache.evaluation.models import load_model, load_tokenizer
from hf_tiered_cache.evaluation.slowdown import HEADINGS, Race, Row, run_race
from hf_tiered_cache.evaluation.standard_library import held_out_files, read_files

import benchmarking
import plots

TINY_LM = Path(__file__).parent / "tiny_lm"
SHAPES = {"qwen2.5-0.5b": bench_generate.CONFIG}


def main() -> None:
    arguments = parse_arguments()
    model, text_ids = load(arguments)
    race = Race(
        shares=arguments.shares,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        chunk=arguments.chunk,
        disk_dir=arguments.disk_dir,
        disk_io=arguments.disk_io,
        has_reloading=arguments.reload,
    )
    rows: list[Row] = []
    print(HEADINGS)
    for context in arguments.contexts:
        for row in run_race(model, text_ids, context, race):
            rows.append(row)
            print(row, flush=True)
    write(rows, arguments)
    if not all(row.is_identical for row in rows):
        sys.exit("some tokens differ from those of DynamicCache")


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """The model, and the ids `[1, tokens]` of a text to read; None where it is random."""
    if arguments.shape:
        config = SHAPES[arguments.shape]
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
        return model.eval().to(arguments.device), None
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    text = (
        Path(arguments.prompt).read_text(errors="replace")
        if arguments.prompt
        else read_files(held_out_files())
    )
    tokenizer = load_tokenizer(arguments.model)
    # Eight characters are no less than a token; the longest context needs no more of the text.
    text = text[: 8 * (max(arguments.contexts) + 1)]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] <= max(arguments.contexts):
        sys.exit(f"the text has {ids.shape[1]:,} tokens: expected more than the longest context")
    return model, ids


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
