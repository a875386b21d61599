"""`verify MODEL`: does the cache change what this model says? The bars of `evaluation.parity`."""

from typing import Annotated, Any

import torch
import typer

from hf_tiered_cache.commands.manners import MISSED, check, command, print_json, table
from hf_tiered_cache.evaluation import parity
from hf_tiered_cache.evaluation.documents import STDLIB, is_joined, long_documents, read_texts
from hf_tiered_cache.evaluation.environment import environment
from hf_tiered_cache.evaluation.models import (
    AUTO,
    choose_device,
    load_model,
    load_tokenizer,
    model_name,
)
from hf_tiered_cache.evaluation.scoring import (
    ROUNDINGS_OF_A_FLIP,
    Pass,
    Plan,
    Window,
    fitting_shape,
    make_windows,
    num_tokens,
    score_window,
)
from hf_tiered_cache.progress import progress_bar


@command
def verify(
    model: Annotated[str, typer.Argument(help="Hub id of a causal model, or its folder.")],
    data: Annotated[
        str,
        typer.Option(
            help=f"What it reads: a text file, a folder of texts, {STDLIB} (sources of Python's "
            "standard library), a parquet file, pg19, proof-pile, wikitext, or org/name of the hub."
        ),
    ] = STDLIB,
    split: Annotated[str | None, typer.Option(help="Of a data set.")] = None,
    column: Annotated[str | None, typer.Option(help="Of a data set's texts.")] = None,
    join: Annotated[
        bool | None, typer.Option(help="Join texts until they are long enough.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    off_device: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the cache off the device; may be given often (default: 0, 0.5, 0.9).",
        ),
    ] = None,
    documents: Annotated[int, typer.Option(help="Texts to measure.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Of the greedy continuation.")] = 32,
    decode_tokens: Annotated[int, typer.Option(help="Last tokens, one by one.")] = 32,
    chunk: Annotated[int, typer.Option(help="Prompt tokens per forward.")] = 1024,
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's own.")] = AUTO,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = AUTO,
    attention: Annotated[
        str | None, typer.Option(help='Of the tiered passes, e.g. "tiered"; default: the model\'s.')
    ] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Power of two.")] = None,
    disk_dir: Annotated[str | None, typer.Option(help="Folder of the disk tier.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model's logits and tokens through TieredCache with those through DynamicCache.

    Ends with 1 unless the continuations are identical, the loss per token is the same, every other
    likeliest token is within rounding, and the logits' bits do not depend on the share off the
    device.
    """
    shares = sorted({0.0, *(off_device or (0.5, 0.9))})
    for share in shares:
        check(0 <= share <= 1, f"--off-device {share}: expected a share from 0 to 1")
    check(
        0 < decode_tokens < context,
        f"--decode-tokens {decode_tokens}: expected 1 to {context - 1}, fewer than the --context",
    )
    for name, got, least in (
        ("chunk", chunk, 2),
        ("documents", documents, 1),
        ("new-tokens", new_tokens, 1),
    ):
        check(got >= least, f"--{name} {got}: expected {least} or more")

    where = choose_device(device)
    tokenizer = load_tokenizer(model)
    texts = read_texts(data, split, column)
    is_joining = is_joined(data) if join is None else join
    windows = [
        window
        for document in long_documents(texts, tokenizer, context, documents, is_joining)
        for window in make_windows(document, tokenizer, context, None, 1)
    ]
    loaded = load_model(model, dtype, where)
    name = str(loaded.dtype).removeprefix("torch.")
    check(name in parity.NLL_BARS, f"--dtype {name}: expected one of {', '.join(parity.NLL_BARS)}")
    plan = Plan(chunk, decode_tokens, new_tokens)
    passes = run(loaded, windows, plan, shares, attention, block_tokens, disk_dir)
    rows = parity.rows(name, passes)
    bars = [bar for row in rows for bar in parity.bars(row)]
    is_good = all(bar.is_reached for bar in bars)
    if as_json:
        facts = {"model": model_name(model), "data": data, "device": str(where)}
        bars_found = [vars(bar) for bar in bars]
        print_json({**environment(), **facts, "parity": is_good, "rows": rows, "bars": bars_found})
    else:
        typer.echo(heading(model, windows, plan, name, where))
        typer.echo(report(rows, name))
        for bar in bars:
            if not bar.is_reached:
                typer.echo(f"MISSED {bar.what}: {bar.measured}, bar {bar.bar}")
        typer.echo(
            "parity: every bar reached" if is_good else "NO PARITY: please report it, with `env`"
        )
    if not is_good:
        raise typer.Exit(MISSED)


def run(
    model: Any,
    windows: list[Window],
    plan: Plan,
    shares: list[float],
    attention: str | None,
    block_tokens: int | None,
    disk_dir: str | None,
) -> list[Pass]:
    """All passes of all windows, under one bar over their tokens."""
    shape = fitting_shape(model, windows[0].context, max(shares), block_tokens, disk_dir)
    total = (1 + len(shares)) * sum(num_tokens(window, plan) for window in windows)
    with progress_bar(total, "verify") as bar:
        return [
            one
            for window in windows
            for one in score_window(
                model, window, plan, shape, shares, attention, disk_dir, bar.update
            )
        ]


def heading(model: str, windows: list[Window], plan: Plan, dtype: str, device: torch.device) -> str:
    """What was measured, in two lines."""
    facts = environment()
    names = ", ".join(window.document for window in windows)
    return (
        f"{model_name(model)}, {dtype} on {device}, kernel {facts['kernel']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}\n"
        f"{names}: {windows[0].context:,} tokens, the last {plan.decode_tokens} one by one, then "
        f"{plan.new_tokens} new ones; against DynamicCache\n"
    )


def report(rows: list[dict[str, Any]], dtype: str) -> str:
    """A line per share, and below them what each column must keep."""
    lines = [("off device", "new tokens", "|delta NLL|", "max |delta logit|", "flips", "bits")]
    for row in rows:
        if row["cache"] == "DynamicCache":
            continue
        is_same = row["continuations_identical"] == row["windows"]
        largest = row["largest_flips"][:1]
        lines.append(
            (
                f"{row['share_off_device']:.0%}",
                "identical" if is_same else "DIFFERENT",
                f"{abs(row['delta_nll']):.1e}",
                f"{row['max_delta_logit']:.1e}",
                f"{row['flips']}" + "".join(f" (margin {one['margin']:.2g})" for one in largest),
                "those resident" if row["bits_of_resident"] else "OTHERS",
            )
        )
    bar = parity.NLL_BARS[dtype]
    rounding = f"within {ROUNDINGS_OF_A_FLIP} roundings"
    lines.append(("bar", "identical", f"{bar:.0e}", "", rounding, "those resident"))
    return table(lines)
