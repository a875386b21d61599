"""`verify MODEL`: does the cache change what this model says? The bars of `evaluation.bars`."""

from typing import Annotated

import typer

from hf_tiered_cache.commands import options
from hf_tiered_cache.commands.manners import (
    MISSED,
    check,
    command,
    load_libraries,
    print_json,
    tell,
)
from hf_tiered_cache.config import NO_PACKING
from hf_tiered_cache.evaluation.documents import STDLIB
from hf_tiered_cache.evaluation.names import AUTO, model_name


@command
def verify(
    model: options.Model,
    data: options.Data = STDLIB,
    split: options.Split = None,
    column: options.Column = None,
    join: options.Join = None,
    context: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    off_device: options.Shares = None,
    documents: Annotated[int, typer.Option(help="Texts to measure.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Of the greedy continuation.")] = 32,
    decode_tokens: Annotated[int, typer.Option(help="Last tokens, one by one.")] = 32,
    chunk: options.Chunk = 1024,
    dtype: options.Dtype = AUTO,
    device: options.Device = AUTO,
    attention: options.Attention = None,
    block_tokens: options.BlockTokens = None,
    packing: options.Packing = NO_PACKING,
    disk_dir: options.DiskDir = None,
    threads: options.Threads = None,
    quick: options.Quick = False,
    as_json: options.Json = False,
) -> None:
    """Check that a model's logits and tokens through the cache are those of DynamicCache.

    In float32 the tokens must be identical and the loss the same. In half precision both may be as
    far off as transformers' own implementations of attention are from one another in the same run
    (the noise). The logits' bits must not depend on the share off the device. Ends with 1 if a bar
    is missed.
    """
    shares = sorted({0.0, *options.check_shares(off_device, 1.0, quick)})
    check(
        0 < decode_tokens < context,
        f"--decode-tokens {decode_tokens}: expected 1 to {context - 1}, fewer than the --context",
    )
    options.check_at_least(2, chunk=chunk)
    options.check_at_least(1, documents=documents, new_tokens=new_tokens)
    options.check_cache(disk_dir, block_tokens=block_tokens, packing=packing)
    options.check_threads(threads)
    options.check_names(model, data, split, column, dtype, device)
    load_libraries(threads)
    from hf_tiered_cache.commands import verification
    from hf_tiered_cache.evaluation import parity
    from hf_tiered_cache.evaluation.bars import bars, verdict
    from hf_tiered_cache.evaluation.environment import environment
    from hf_tiered_cache.evaluation.models import (
        check_fits,
        choose_device,
        choose_dtype,
        load_model,
        load_outline,
        load_tokenizer,
    )
    from hf_tiered_cache.evaluation.pace import format_seconds, measure_pace, quick_context
    from hf_tiered_cache.evaluation.passes import num_passes
    from hf_tiered_cache.evaluation.scoring import Plan, make_windows
    from hf_tiered_cache.integration.cache import TieredCache

    where = choose_device(device)
    outline = load_outline(model, dtype)
    check_fits(outline, context, new_tokens, attention)
    TieredCache(outline.config, packing=packing).close()  # an unknown codec is said before loading
    tokenizer = load_tokenizer(model)
    found = options.find_documents(tokenizer, data, split, column, join, context, documents)
    dtype, why = choose_dtype(outline, dtype, where)
    tell(why)
    loaded = load_model(model, dtype, where)
    name = str(loaded.dtype).removeprefix("torch.")
    if quick:
        found = found[:1]
        decode_tokens = min(decode_tokens, options.QUICK_TOKENS)
        new_tokens = min(new_tokens, options.QUICK_TOKENS)
    pace = measure_pace(loaded)

    def seconds(context: int) -> float:
        passes = len(found) * num_passes(loaded, shares)
        return passes * pace.seconds(context, decode_tokens + new_tokens)

    if quick:
        context = quick_context(seconds, context)
    tell(f"{context:,} tokens: about {format_seconds(seconds(context))}")
    windows = [
        window
        for document in found
        for window in make_windows(document, tokenizer, context, None, 1)
    ]
    plan = Plan(chunk, decode_tokens, new_tokens)
    passes = verification.run(
        loaded, windows, plan, shares, attention, block_tokens, packing, disk_dir
    )
    rows = parity.rows(name, passes)
    kept = bars(rows)
    is_good = all(bar.is_reached for bar in kept)
    if as_json:
        facts = {"model": model_name(model), "data": data, "device": str(where)}
        said = {"parity": is_good, "verdict": verdict(kept), "rows": rows}
        print_json({**environment(where), **facts, **said, "bars": [vars(bar) for bar in kept]})
    else:
        typer.echo(verification.heading(model, windows, plan, passes, name, where))
        typer.echo(f"{verification.report(kept)}\n{verdict(kept)}")
    if not is_good:
        raise typer.Exit(MISSED)
