"""Perplexity of a model on long documents through the tiered cache, beside DynamicCache.

    python eval/perplexity.py
    python eval/perplexity.py --model Qwen/Qwen2.5-0.5B --data pg19 --contexts 4096 32768
    accelerate launch --config_file examples/accelerate_cpu.yaml eval/perplexity.py

Does the cache change what a model says, and what does it cost: for every context and every share
of the cache off the device, the loss, the largest difference of a logit, every place where another
token becomes the likeliest, a greedy continuation, the peak of each tier, and the speed. Prints
reached or MISSED for each bar and ends with 1 if one was missed. eval/README.md says how.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed, tqdm
from transformers.utils import logging

from hf_tiered_cache.evaluation import parity
from hf_tiered_cache.evaluation.bars import Bar, bars, verdict
from hf_tiered_cache.evaluation.documents import (
    HUB_DATASETS,
    INSTALLED,
    STDLIB,
    DataError,
    is_joined,
    long_documents,
    read_texts,
)
from hf_tiered_cache.evaluation.models import load_model, load_tokenizer
from hf_tiered_cache.evaluation.names import DTYPES, ModelError, model_name
from hf_tiered_cache.evaluation.passes import num_passes, score_window
from hf_tiered_cache.evaluation.scoring import (
    Pass,
    Plan,
    Window,
    fitting_shape,
    make_windows,
    num_tokens,
)

import benchmarking
import plots

TINY_LM = Path(__file__).parent / "tiny_lm"
TITLE = "perplexity through the cache, against DynamicCache"


def main(command: Sequence[str] | None = None) -> int:
    """Run; return 0 if every bar was reached, else 1."""
    parser = make_parser()
    arguments = parser.parse_args(command)
    check(parser, arguments)
    logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    accelerator = Accelerator(cpu=True)
    set_seed(arguments.seed)
    try:
        tokenizer = load_tokenizer(arguments.model)
        windows = read_windows(tokenizer, arguments)
    except (DataError, ModelError, OSError) as error:
        parser.error(str(error))
    if accelerator.is_main_process:
        printed = benchmarking.Table(TITLE)
    table: list[dict[str, Any]] = []
    passes: dict[str, list[Pass]] = {}
    for dtype in arguments.dtype:
        passes[dtype] = measure(accelerator, dtype, windows, arguments)
        rows = parity.rows(dtype, passes[dtype])
        table += rows
        if accelerator.is_main_process:
            judge(printed, bars(rows))
    parity.add_float32(table)
    kept = bars(table)
    if accelerator.is_main_process:
        environment = {
            **benchmarking.environment(),
            "processes": accelerator.num_processes,
            "seed": arguments.seed,
            "model": model_name(arguments.model),
            "data": arguments.data,
            "documents": list(dict.fromkeys(window.document for window in windows)),
            "decode_tokens": arguments.decode_tokens,
            "chunk": arguments.chunk,
        }
        if arguments.output:
            write(Path(arguments.output), environment, table, kept)
        if arguments.save_tokens:
            save_tokens(passes, arguments.save_tokens)
        printed.finish()
        print(verdict(kept))
    accelerator.end_training()
    return 0 if all(bar.is_reached for bar in kept) else 1


def judge(table: benchmarking.Table, kept: list[Bar]) -> None:
    """Print every bar with reached or MISSED."""
    for bar in kept:
        table.value(
            f"{bar.what}: {bar.name}",
            bar.measured,
            bar=bar.bar,
            is_reached=bar.is_reached,
            note=f"noise {bar.noise}" if bar.noise else "",
        )


def read_windows(tokenizer: Any, arguments: argparse.Namespace) -> list[Window]:
    """All windows, shortest context first; every context measures the same documents."""
    join = is_joined(arguments.data) if arguments.join is None else arguments.join
    texts = read_texts(arguments.data, arguments.split, arguments.column)
    found = long_documents(texts, tokenizer, max(arguments.contexts), arguments.documents, join)
    return [
        window
        for context in sorted(arguments.contexts)
        for document in found
        for window in make_windows(
            document, tokenizer, context, arguments.stride, arguments.windows
        )
    ]


def measure(
    accelerator: Accelerator, dtype: str, windows: list[Window], arguments: argparse.Namespace
) -> list[Pass]:
    """The passes of all windows, in their order, on every process.

    Windows go to the processes in turn; each process has its own model, budgets and files.
    """
    model = load_model(arguments.model, dtype)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(arguments.contexts) > limit:
        accelerator.print(
            f"context {max(arguments.contexts):,} is beyond the {limit:,} positions the model was "
            "made for: parity still counts, the loss itself says little"
        )
    shares = sorted({0.0, *arguments.off_device})
    plan = Plan(arguments.chunk, arguments.decode_tokens, arguments.new_tokens)
    shape = fitting_shape(
        model,
        min(arguments.contexts),
        max(shares),
        arguments.block_tokens,
        arguments.disk_dir,
    )
    num_sides = num_passes(model, shares)
    passes: list[Pass] = []
    with progress_bar(windows, num_sides, plan, dtype) as bar:
        for turn in in_turns(windows, accelerator.num_processes):
            done = bar.n
            mine = turn[accelerator.process_index : accelerator.process_index + 1]
            scored = [
                score_window(
                    model,
                    window,
                    plan,
                    shape,
                    shares,
                    arguments.attention,
                    arguments.disk_dir,
                    bar.update,
                )
                for window in mine
            ]
            for of_window in gather_object(scored):
                passes += of_window
            bar.update(num_sides * sum(num_tokens(one, plan) for one in turn) - (bar.n - done))
    return passes


def in_turns(windows: list[Window], num_processes: int) -> Iterable[list[Window]]:
    """As many windows as there are processes, then the next; of one context as far as it goes."""
    for first in range(0, len(windows), num_processes):
        yield windows[first : first + num_processes]


def progress_bar(windows: list[Window], num_sides: int, plan: Plan, label: str) -> Any:
    """One bar for all processes, over the tokens of all passes."""
    return tqdm(
        total=num_sides * sum(num_tokens(window, plan) for window in windows),
        desc=label,
        unit="token",
        disable=not logging.is_progress_bar_enabled(),
        leave=False,
    )


def write(
    folder: Path, environment: dict[str, Any], table: list[dict[str, Any]], kept: list[Bar]
) -> None:
    """Write perplexity.json, perplexity.md and two pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"title": TITLE, **environment, "rows": table, "bars": [vars(bar) for bar in kept]}
    (folder / "perplexity.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "perplexity.md").write_text(parity.markdown(table, kept, environment))
    plots.nll_by_position(table, folder / "perplexity_by_position.png")
    plots.slowdown(table, folder / "perplexity_slowdown.png")
    print(f"written: {', '.join(str(path) for path in sorted(folder.glob('perplexity*')))}")


def save_tokens(passes: dict[str, list[Pass]], path: str) -> None:
    """Write every token's log-likelihood and the likeliest tokens, a row per pass, as parquet."""
    from datasets import Dataset

    rows = [
        {
            "dtype": dtype,
            "context": one.context,
            "document": one.document,
            "start": one.start,
            "cache": one.cache,
            "share_asked": one.share,
            "num_bytes": one.num_bytes,
            "log_likelihoods": one.log_likelihoods,
            # of the scored tokens, like the likelihoods
            "tokens": one.guesses[one.first_scored - 1 :],
        }
        for dtype, of_dtype in passes.items()
        for one in of_dtype
    ]
    Dataset.from_list(rows).to_parquet(path)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message about arguments that cannot be measured."""
    for context in arguments.contexts:
        if not 0 < arguments.decode_tokens < context:
            parser.error(
                f"--decode-tokens {arguments.decode_tokens}: expected 1 to {context - 1}, fewer "
                f"than the context {context}, so that something is prefilled"
            )
        if arguments.stride is not None and not 0 < arguments.stride <= context:
            parser.error(f"--stride {arguments.stride}: expected 1 to {context}, the context")
    for share in arguments.off_device:
        if not 0 <= share <= 1:
            parser.error(f"--off-device {share}: expected shares from 0 to 1")
    for name, least in {"chunk": 2, "documents": 1, "windows": 1, "new_tokens": 1}.items():
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option} {getattr(arguments, name)}: expected {least} or more")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--model", default=str(TINY_LM), help="hub id or folder (default: the model in eval)")
    add(
        "--data",
        default=STDLIB,
        help=f"{', '.join(INSTALLED)} (default: {STDLIB}), a text or parquet file, a folder of "
        f"texts or of a saved data set, {', '.join(HUB_DATASETS)}, or org/name of the hub",
    )
    add("--split", help="of a data set (default: test of the hub's, train of a file)")
    add("--column", help='of a data set\'s texts (default: "text")')
    add(
        "--join",
        action=argparse.BooleanOptionalAction,
        help="join texts until they are long enough (default: only where rows are lines)",
    )
    add("--contexts", nargs="+", type=int, default=[2048, 8192], help="tokens")
    add("--off-device", nargs="+", type=float, default=[0.0, 0.5, 0.9], help="shares, 0 to 1")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    add("--documents", type=int, default=2, help="that fill the longest context")
    add("--stride", type=int, help="tokens between windows (default: a window per document)")
    add("--windows", type=int, default=16, help="at most, of a document, with --stride")
    add("--chunk", type=int, default=1024, help="prompt tokens per forward")
    add("--decode-tokens", type=int, default=64, help="last tokens of a context, one by one")
    add("--new-tokens", type=int, default=16, help="of the greedy continuation")
    add("--block-tokens", type=int, help="power of two (default: the cache's, or what fits)")
    add("--disk-dir", help="folder of the disk tier")
    add("--attention", help='of the tiered passes, e.g. "tiered" (default: the model\'s own)')
    add("--threads", type=int, help="of torch, per process")
    add("--seed", type=int, default=0)
    add("--output", help="folder for the JSON, the Markdown table and the pictures")
    add("--save-tokens", help="parquet file for every token's log-likelihood")
    return parser


if __name__ == "__main__":
    sys.exit(main())
