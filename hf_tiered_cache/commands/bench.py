"""`bench MODEL`: slowdown over DynamicCache at equal context, with identical tokens."""

from dataclasses import asdict
from typing import Annotated

import typer

from hf_tiered_cache.commands import options
from hf_tiered_cache.commands.manners import MISSED, command, load_libraries, print_json, tell
from hf_tiered_cache.evaluation.documents import STDLIB
from hf_tiered_cache.evaluation.names import AUTO, model_name

MOST_OFF_DEVICE = 0.99  # something must stay: every layer's filling block


@command
def bench(
    model: options.Model,
    data: options.Data = STDLIB,
    split: options.Split = None,
    column: options.Column = None,
    join: options.Join = None,
    context: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", help="May be given often (default: 2048)."),
    ] = None,
    off_device: options.Shares = None,
    new_tokens: Annotated[int, typer.Option(help="In every round.")] = 8,
    rounds: Annotated[int, typer.Option(help="All sides in turn, one more before.")] = 3,
    chunk: options.Chunk = 1024,
    dtype: options.Dtype = AUTO,
    device: options.Device = AUTO,
    reload: Annotated[
        bool, typer.Option(help="Also time re-reading whole layers from disk for every token.")
    ] = False,
    disk_dir: options.DiskDir = None,
    disk_io: options.DiskIO = AUTO,
    threads: options.Threads = None,
    quick: options.Quick = False,
    as_json: options.Json = False,
) -> None:
    """Time decoding behind a context, over DynamicCache on the same context.

    Sides are timed in turn in one run; slowdown is the ratio of medians, with the least and the
    most of the rounds in brackets; below 1 is faster. Ends with 1 if a side gives other tokens.
    """
    contexts = sorted(context or (2048,))
    options.check_at_least(1, context=contexts[0], new_tokens=new_tokens, rounds=rounds)
    options.check_at_least(2, chunk=chunk)
    options.check_cache(disk_dir, disk_io=disk_io)
    options.check_threads(threads)
    options.check_names(model, data, split, column, dtype, device)
    shares = options.check_shares(off_device, MOST_OFF_DEVICE, quick)
    load_libraries(threads)
    from hf_tiered_cache.evaluation.environment import environment
    from hf_tiered_cache.evaluation.models import (
        check_has_only_full_attention,
        check_positions,
        choose_device,
        choose_dtype,
        load_model,
        load_outline,
        load_tokenizer,
    )
    from hf_tiered_cache.evaluation.pace import format_seconds, measure_pace, quick_context
    from hf_tiered_cache.evaluation.slowdown import HEADINGS, Race, run_race

    if quick:
        new_tokens, rounds = min(new_tokens, options.QUICK_TOKENS), 1
    race = Race(
        shares=shares,
        new_tokens=new_tokens,
        rounds=rounds,
        chunk=chunk,
        disk_dir=disk_dir,
        disk_io=disk_io,
        has_reloading=reload,
    )
    where = choose_device(device)
    outline = load_outline(model, dtype)
    check_has_only_full_attention(outline)
    check_positions(outline, contexts[-1], new_tokens)
    tokenizer = load_tokenizer(model)
    (document,) = options.find_documents(tokenizer, data, split, column, join, contexts[-1] + 1)
    dtype, why = choose_dtype(outline, dtype, where)
    tell(why)
    loaded = load_model(model, dtype, where)
    pace = measure_pace(loaded)

    def seconds(context: int) -> float:
        prefill = pace.seconds(context)
        return prefill + race.num_decodes * (pace.seconds(context, new_tokens) - prefill)

    if quick:
        contexts = [quick_context(seconds, contexts[-1])]
    tell(f"about {format_seconds(sum(map(seconds, contexts)))}")
    if not as_json:
        facts = environment(where)
        name = str(loaded.dtype).removeprefix("torch.")
        typer.echo(
            f"{model_name(model)}, {name} on {where}, kernel {facts['kernel']}, "
            f"{facts['threads']} threads, {facts['processor']}\n{HEADINGS}"
        )
    rows = []
    for one in contexts:
        for row in run_race(loaded, document.ids[None], one, race):
            rows.append(row)
            if not as_json:
                typer.echo(str(row))
    if as_json:
        facts = {"model": model_name(model), "dtype": str(loaded.dtype), "device": str(where)}
        print_json({**environment(where), **facts, "rows": [asdict(row) for row in rows]})
    if not all(row.is_identical for row in rows):
        typer.echo("TOKENS DIFFER from those of DynamicCache: please report it", err=True)
        raise typer.Exit(MISSED)
