"""What all commands have in common: mistakes in one line, quiet libraries, tables, JSON."""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from hf_tiered_cache.errors import TieredCacheError
from hf_tiered_cache.evaluation.documents import DataError
from hf_tiered_cache.evaluation.names import ModelError

MISSED, MISTAKE = 1, 2  # exit codes


class MistakeError(ValueError):
    """An argument that cannot be; names it, what was got and what is expected."""


def command(run: Callable[..., None]) -> Callable[..., None]:
    """A command whose mistakes end with one line on stderr and exit code 2."""

    @functools.wraps(run)
    def with_manners(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except (MistakeError, DataError, ModelError, TieredCacheError, OSError) as error:
            fail(str(error))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            fail(f"{str(error).splitlines()[0]} Give a smaller --context, or --device cpu.")

    return with_manners


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def load_libraries(threads: int | None = None) -> None:
    """Load torch and transformers, which takes seconds, once the arguments are known to be right;
    libraries say errors only from now on, and torch, and so our kernels, uses that many threads."""
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    if "HF_HUB_VERBOSITY" not in os.environ:
        hub_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)


def fail(message: str) -> None:
    """End with `message`, in one line, on stderr and the exit code of a mistake."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(MISTAKE)


def check(is_right: bool, message: str) -> None:
    """Raise MistakeError with `message` unless `is_right`."""
    if not is_right:
        raise MistakeError(message)


def tell(message: str) -> None:
    """Say on stderr what is good to know while waiting; nothing if there is nothing to say."""
    if message:
        typer.echo(message, err=True)


def print_json(results: Any) -> None:
    """Results alone on stdout."""
    json.dump(results, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row being headings; columns aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
