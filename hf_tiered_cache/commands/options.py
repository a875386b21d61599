"""Arguments that several commands take."""

import os
from typing import Annotated, Any

import typer

from hf_tiered_cache.commands.manners import check
from hf_tiered_cache.config import TieredCacheConfig, disk_directory, free_disk_bytes
from hf_tiered_cache.evaluation.documents import (
    LANGUAGE_REFERENCE,
    STDLIB,
    Document,
    check_source,
    is_joined,
    long_documents,
    read_texts,
)
from hf_tiered_cache.evaluation.names import check_device, check_dtype, check_model

Model = Annotated[str, typer.Argument(help="Hub id of a causal model, or its folder.")]
Data = Annotated[
    str,
    typer.Option(
        help=f"What it reads: a text file, a folder of texts, {STDLIB} (sources of Python's "
        f"standard library), {LANGUAGE_REFERENCE} (prose), a parquet file, pg19, proof-pile, "
        "wikitext, or org/name of the hub."
    ),
]
Split = Annotated[str | None, typer.Option(help="Of a data set.")]
Column = Annotated[str | None, typer.Option(help="Of a data set's texts.")]
Join = Annotated[bool | None, typer.Option(help="Join texts until they are long enough.")]
Shares = Annotated[
    list[float] | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the cache off the device; may be given often (default: 0, 0.5, 0.9).",
    ),
]
Chunk = Annotated[int, typer.Option(help="Prompt tokens per forward.")]
Dtype = Annotated[str, typer.Option(help="auto: the checkpoint's own.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
Attention = Annotated[
    str | None, typer.Option(help='With the tiered cache, e.g. "tiered"; default: the model\'s.')
]
BlockTokens = Annotated[int | None, typer.Option(help="A power of two; default: the cache's.")]
Packing = Annotated[str, typer.Option(help='On disk: auto, none, or a codec ("bf16_12bit").')]
DiskDir = Annotated[str | None, typer.Option(help="Folder of the disk tier.")]
DiskIO = Annotated[str, typer.Option(help="auto, direct, buffered.")]
Threads = Annotated[int | None, typer.Option(help="Of torch; default: torch's own choice.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Within a minute: fewer tokens, shares and rounds.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_SHARES = (0.0, 0.5, 0.9)
QUICK_SHARES = (0.0, 0.9)
QUICK_TOKENS = 8  # decoded, where more are not worth a minute


def find_documents(
    tokenizer: Any,
    data: str,
    split: str | None,
    column: str | None,
    join: bool | None,
    min_tokens: int,
    number: int = 1,
) -> list[Document]:
    """The first documents of `data` that are long enough. Raises DataError."""
    texts = read_texts(data, split, column)
    is_joining = is_joined(data) if join is None else join
    return long_documents(texts, tokenizer, min_tokens, number, is_joining)


def check_shares(shares: list[float] | None, most: float, quick: bool = False) -> list[float]:
    """Those asked for in order, or the default ones. Raises MistakeError for one above `most`."""
    for share in shares or ():
        check(0 <= share <= most, f"--off-device {share}: expected a share from 0 to {most:g}")
    return sorted(set(shares or (QUICK_SHARES if quick else DEFAULT_SHARES)))


def check_at_least(least: int, **numbers: int | None) -> None:
    """Raise MistakeError for a number below `least`; by the names of the options."""
    for name, got in numbers.items():
        option = name.replace("_", "-")
        check(got is None or got >= least, f"--{option} {got}: expected {least} or more")


def check_cache(disk_dir: str | None, **knobs: Any) -> None:
    """Raise ConfigError for what a cache would refuse: the folder of its disk tier, which is made
    if missing, or another of its `knobs`."""
    TieredCacheConfig(disk_dir=disk_dir, **knobs)
    free_disk_bytes(disk_directory(disk_dir))


def check_threads(threads: int | None) -> None:
    """Raise MistakeError for more threads than there are processors: torch would end the process
    where it cannot start them."""
    if threads is not None:
        most = os.cpu_count() or 1
        check(0 < threads <= most, f"--threads {threads}: expected 1 to {most}, the processors")


def check_names(
    model: str, data: str, split: str | None, column: str | None, dtype: str, device: str
) -> None:
    """Raise ModelError or DataError for what cannot be right, whatever is found when it is
    loaded."""
    check_model(model)
    check_dtype(dtype)
    check_device(device)
    check_source(data, split, column)
