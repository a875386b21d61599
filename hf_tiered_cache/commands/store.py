"""`store ...`: look at a folder of stored blocks, verify it, keep house in it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_tiered_cache.commands import options
from hf_tiered_cache.commands.manners import (
    MISSED,
    MistakeError,
    check,
    command,
    load_libraries,
    print_json,
    table,
)
from hf_tiered_cache.sizes import AUTO, format_bytes
from hf_tiered_cache.store.block_store import BlockStore, Listed

Root = Annotated[Path, typer.Argument(help="The store's folder.", exists=True, file_okay=False)]
Key = Annotated[str, typer.Argument(help="The block's key, or its first digits.")]
Json = options.Json

store = typer.Typer(no_args_is_help=True, help="Stored blocks: list, verify, clean up, warm.")


def _find(opened: BlockStore, key: str) -> Listed:
    """The one block whose key begins like that. Raises MistakeError."""
    found = [listed for listed in opened.ls() if listed.key.startswith(key.lower())]
    if len(found) != 1:
        raise MistakeError(f"{key}: {len(found) or 'no'} blocks have such a key; expected one")
    return found[0]


def _seconds(nanoseconds: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(nanoseconds / 1e9).strftime("%Y-%m-%d %H:%M:%S")


@store.command()
@command
def ls(root: Root, as_json: Json = False) -> None:
    """Every block: key, model, number in its sequence, tokens, bytes, when it came."""
    with BlockStore(root) as opened:
        blocks = sorted(opened.ls(), key=lambda it: (it.space, it.number, it.created_ns))
    if as_json:
        print_json([asdict(block) for block in blocks])
        return
    rows = [["key", "model", "number", "tokens", "bytes", "created", "pinned"]]
    rows += [
        [
            *(it.key[:16], it.space[:8], str(it.number), str(it.num_tokens)),
            *(
                format_bytes(it.num_bytes),
                _seconds(it.created_ns),
                "pinned" if it.is_pinned else "",
            ),
        ]
        for it in blocks
    ]
    typer.echo(table(rows))


@store.command()
@command
def inspect(root: Root, key: Key, as_json: Json = False) -> None:
    """One block: what its header says, layer by layer."""
    with BlockStore(root) as opened:
        listed = _find(opened, key)
        block = opened.open(bytes.fromhex(listed.space), bytes.fromhex(listed.key))
        check(block is not None, f"{key}: it is gone, or damaged (store verify)")
        assert block is not None
        facts: dict[str, Any] = {**asdict(listed), "path": block.path}
        facts["extents"] = [
            {**asdict(extent), "checksum": extent.checksum.hex()} for extent in block.header.extents
        ]
        block.close()
    if as_json:
        print_json(facts)
        return
    extents = facts.pop("extents")
    width = max(map(len, facts))
    for name, fact in facts.items():
        typer.echo(f"{name:<{width}}  {fact}")
    typer.echo(table([list(extents[0]), *([str(it) for it in e.values()] for e in extents)]))


@store.command()
@command
def verify(
    root: Root,
    repair: Annotated[bool, typer.Option(help="Put damaged blocks away.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with its checksum. Exit code 1 where one differs."""
    with BlockStore(root) as opened:
        damaged = list(opened.verify(repair))
        total = opened.stats().blocks
    if as_json:
        print_json({"damaged": [{"path": path, "why": why} for path, why in damaged]})
    else:
        for path, why in damaged:
            typer.echo(f"{path}: {why}")
        typer.echo(f"{len(damaged)} damaged{' and put away' * repair}, {total} blocks in the index")
    if damaged:
        raise typer.Exit(MISSED)


@store.command()
@command
def gc(
    root: Root,
    capacity_bytes: Annotated[
        str, typer.Option(help='Evict down to that ("50GiB"); auto: no more than now.')
    ] = AUTO,
    as_json: Json = False,
) -> None:
    """Make the index anew, remove what killed writers left, what is in quarantine, and what is too
    much."""
    with BlockStore(root, capacity_bytes=capacity_bytes) as opened:
        removed = opened.gc()
    _say(removed, as_json)


@store.command()
@command
def pin(
    root: Root,
    key: Key,
    remove: Annotated[bool, typer.Option("--remove", help="Let it be evicted again.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a block, and those before it, from being evicted."""
    with BlockStore(root) as opened:
        listed = _find(opened, key)
        if remove:
            was_pinned = opened.unpin(bytes.fromhex(listed.key))
            check(was_pinned, f"{key} is not pinned")
        else:
            opened.pin(bytes.fromhex(listed.space), bytes.fromhex(listed.key))
    _say({"key": listed.key, "is_pinned": not remove}, as_json)


@store.command()
@command
def purge(
    root: Root,
    yes: Annotated[bool, typer.Option("--yes", help="Really.")] = False,
    as_json: Json = False,
) -> None:
    """Remove every block, pinned ones too."""
    check(yes, "purge removes every block: say --yes")
    with BlockStore(root) as opened:
        removed = opened.purge()
    _say({"removed": removed}, as_json)


@store.command()
@command
def stats(root: Root, as_json: Json = False) -> None:
    """How many blocks there are, and how much room they take."""
    with BlockStore(root) as opened:
        found = opened.stats()
    if as_json:
        print_json(asdict(found))
    else:
        typer.echo(str(found))


@store.command()
@command
def warm(
    root: Root,
    model: options.Model,
    file: Annotated[Path, typer.Argument(help="A text.", exists=True, dir_okay=False)],
    pin: Annotated[bool, typer.Option(help="Keep it from being evicted.")] = False,
    dtype: options.Dtype = AUTO,
    device: options.Device = AUTO,
    block_tokens: options.BlockTokens = None,
    threads: options.Threads = None,
    as_json: Json = False,
) -> None:
    """Compute a text and put its blocks into the store, before anybody asks for them."""
    options.check_threads(threads)
    options.check_names(model, str(file), None, None, dtype, device)
    load_libraries(threads)
    from hf_tiered_cache.evaluation.models import choose_device, load_model, load_tokenizer
    from hf_tiered_cache.integration.warm import warm as put

    loaded = load_model(model, dtype, choose_device(device))
    with BlockStore(root) as opened:
        num_tokens = put(
            opened, loaded, load_tokenizer(model), file, pin=pin, block_tokens=block_tokens
        )
    _say({"tokens": num_tokens, "is_pinned": pin}, as_json)


def _say(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        typer.echo(", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items()))
