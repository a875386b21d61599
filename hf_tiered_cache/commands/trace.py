"""`trace MODEL`: a short prefill and decode through a small budget, recorded and drawn."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_tiered_cache.commands import options
from hf_tiered_cache.commands.manners import check, command, load_libraries, tell
from hf_tiered_cache.evaluation.documents import STDLIB
from hf_tiered_cache.evaluation.names import AUTO

SHOWN_FORWARDS = 2  # the last ones, enlarged in the picture


@command
def trace(
    model: options.Model,
    data: options.Data = STDLIB,
    split: options.Split = None,
    column: options.Column = None,
    join: options.Join = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Decoded behind it.")] = 8,
    off_device: Annotated[float, typer.Option(help="Share of the cache off the device.")] = 0.9,
    chunk: options.Chunk = 512,
    dtype: options.Dtype = AUTO,
    device: options.Device = AUTO,
    attention: options.Attention = None,
    block_tokens: options.BlockTokens = None,
    disk_dir: options.DiskDir = None,
    disk_io: options.DiskIO = AUTO,
    threads: options.Threads = None,
    quick: options.Quick = False,
    output: Annotated[
        Path, typer.Option(help="Written: OUTPUT.json for ui.perfetto.dev, and OUTPUT.png.")
    ] = Path("trace"),
) -> None:
    """Record loads, stores, attention and waits of a short run, and draw what hides what."""
    (share,) = options.check_shares([off_device], 1.0)
    options.check_at_least(2, context=context, new_tokens=new_tokens, chunk=chunk)
    options.check_cache(disk_dir, block_tokens=block_tokens, disk_io=disk_io)
    json_file, picture = output.with_suffix(".json"), output.with_suffix(".png")
    check(
        os.access(output.parent, os.W_OK | os.X_OK),
        f"--output {output}: {output.parent} is no folder that can be written to",
    )
    options.check_threads(threads)
    options.check_names(model, data, split, column, dtype, device)
    load_libraries(threads)
    import torch

    from hf_tiered_cache.evaluation.models import (
        check_fits,
        choose_device,
        choose_dtype,
        load_model,
        load_outline,
        load_tokenizer,
    )
    from hf_tiered_cache.evaluation.pace import format_seconds, measure_pace, quick_context
    from hf_tiered_cache.evaluation.scoring import fitting_shape
    from hf_tiered_cache.evaluation.timeline import (
        DECODE,
        MissingMatplotlibError,
        save_timeline,
        traced_forwards,
    )
    from hf_tiered_cache.integration.cache import TieredCache
    from hf_tiered_cache.integration.progress import generation_progress
    from hf_tiered_cache.observe import tracing

    where = choose_device(device)
    outline = load_outline(model, dtype)
    check_fits(outline, context, new_tokens, attention)
    tokenizer = load_tokenizer(model)
    (document,) = options.find_documents(tokenizer, data, split, column, join, context)
    dtype, why = choose_dtype(outline, dtype, where)
    tell(why)
    loaded = load_model(model, dtype, where)
    pace = measure_pace(loaded)
    if quick:
        context = quick_context(lambda one: pace.seconds(one, new_tokens), context)
    tell(f"{context:,} tokens: about {format_seconds(pace.seconds(context, new_tokens))}")
    if attention:
        loaded.set_attn_implementation(attention)
    shape = fitting_shape(loaded, context, share, block_tokens, disk_dir)
    budgets = shape.budgets(context + new_tokens, share)
    if share:
        budgets["disk_io"] = disk_io
    ids = document.ids[None, :context].to(where)
    with (
        TieredCache(config=loaded.config, disk_dir=disk_dir, **budgets) as cache,
        tracing.trace(json_file) as recorded,
        traced_forwards(loaded, recorded),
        generation_progress(loaded, context, new_tokens),
    ):
        loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            prefill_chunk_size=chunk,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        stats = cache.stats()
    typer.echo(f"{stats}\n{recorded}\nwritten: {json_file} (open it at ui.perfetto.dev)")
    shown = [span for span in recorded.spans if span.name == DECODE][-SHOWN_FORWARDS:]
    try:
        save_timeline(recorded, picture, (shown[0].start, shown[-1].end))
    except MissingMatplotlibError as error:
        typer.echo(f"no picture: {error}")
    else:
        typer.echo(f"written: {picture}")
