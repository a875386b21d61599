"""Long documents to measure on: what lies on this machine, or a data set of the hub.

A source gives texts in a fixed order; of these the first ones that are long enough are taken, so
that the same command measures the same tokens. Knows no model and no cache.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tiered_cache.evaluation.standard_library import (
    held_out_files,
    language_reference,
    relative_path,
)

STDLIB = "stdlib"
LANGUAGE_REFERENCE = "python-reference"
INSTALLED = (STDLIB, LANGUAGE_REFERENCE)  # with every Python
TEXT_SEPARATOR = "\n\n"
# Texts looked at before giving up on finding long ones: a data set may have millions of rows.
MAX_TEXTS = 100_000


class DataError(ValueError):
    """The data cannot be measured; says which argument to change."""


@dataclass(frozen=True)
class Text:
    """One text of a source."""

    name: str
    text: str


@dataclass(frozen=True)
class Document:
    """A tokenized text, long enough to be measured. ids: a tensor [tokens]."""

    name: str
    ids: Any  # so that --help and a mistaken --data need not wait for torch


@dataclass(frozen=True)
class HubDataset:
    """Where a data set of the hub lies. `datasets` runs no loading scripts since version 4, so
    these are parquet files."""

    path: str
    config: str | None = None
    split: str = "test"
    column: str = "text"
    revision: str | None = None
    # rows are lines, not documents
    is_joined: bool = False


HUB_DATASETS = {
    "pg19": HubDataset("emozilla/pg19"),
    "proof-pile": HubDataset("hoskinson-center/proof-pile", revision="refs/convert/parquet"),
    "wikitext": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", is_joined=True),
}


def read_texts(source: str, split: str | None = None, column: str | None = None) -> Iterator[Text]:
    """Yield the texts of `source` in a fixed order.

    source: "stdlib" (sources of the running Python's standard library that the tiny model was not
    trained on, by path), "python-reference" (Python's language reference, one text), a text file,
    a parquet file, a folder of text files or of a saved data set, a name in HUB_DATASETS, or
    "org/name" of the hub. split, column: of a data set.
    Raises DataError.
    """
    check_source(source, split, column)
    path = Path(source).expanduser()
    if source == STDLIB:
        for file in held_out_files():
            yield Text(relative_path(file), file.read_text(encoding="utf-8"))
    elif source == LANGUAGE_REFERENCE:
        yield Text(LANGUAGE_REFERENCE, language_reference())
    elif path.is_dir() and (path / "dataset_info.json").exists():
        yield from _rows(_datasets().load_from_disk(str(path)), path.name, column or "text")
    elif path.is_dir():
        yield from _folder_texts(path)
    elif path.suffix == ".parquet" and path.exists():
        yield from _file_rows(path, split or "train", column or "text")
    elif path.is_file():
        yield Text(path.name, path.read_text(encoding="utf-8", errors="replace"))
    else:
        yield from _hub_texts(HUB_DATASETS.get(source) or HubDataset(source), split, column)


def check_source(source: str, split: str | None, column: str | None) -> None:
    """Raise DataError for what can be none of the sources that `read_texts` takes, and for a split
    or column of what is no data set. Reads nothing."""
    path = Path(source).expanduser()
    is_named = source in (*INSTALLED, *HUB_DATASETS) or source.count("/") == 1
    if not is_named and not path.is_dir() and not path.is_file():
        raise DataError(
            f"--data {source}: no such file or folder; expected {', '.join(INSTALLED)}, a text or "
            f"parquet file, a folder of texts, one of {', '.join(HUB_DATASETS)}, or org/name of "
            "the hub"
        )
    if (split or column) and (source in INSTALLED or (path.exists() and not _is_data_set(path))):
        name, given = ("--split", split) if split else ("--column", column)
        raise DataError(f"{name} {given}: --data {source} is no data set; leave it out")


def _is_data_set(path: Path) -> bool:
    return path.suffix == ".parquet" or (path / "dataset_info.json").exists()


def is_joined(source: str) -> bool:
    """Whether the texts of `source` are pieces to be joined, unless the user says otherwise."""
    return source in HUB_DATASETS and HUB_DATASETS[source].is_joined


def long_documents(
    texts: Iterable[Text], tokenizer: Any, min_tokens: int, num_documents: int, join: bool
) -> list[Document]:
    """Take the first texts of at least `min_tokens` tokens, `num_documents` of them at most.

    join: put texts together, in order, until they are long enough. No special tokens are added.
    Raises DataError when there is none.
    """
    found: list[Document] = []
    longest = 0
    pieces: list[Text] = []
    for text in itertools.islice(texts, MAX_TEXTS):
        pieces = [*pieces, text] if join else [text]
        # A token is a byte at least, so short ones need not be tokenized.
        if sum(len(piece.text.encode()) for piece in pieces) < min_tokens:
            continue
        whole = TEXT_SEPARATOR.join(piece.text for piece in pieces)
        ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids[0]
        longest = max(longest, len(ids))
        if len(ids) >= min_tokens:
            found.append(Document(pieces[0].name, ids))
            pieces = []
        if len(found) == num_documents:
            break
    if not found:
        raise DataError(
            f"no text of {min_tokens:,} tokens (the longest that was tokenized has {longest:,}): "
            "give a smaller context, longer --data, or --join to join texts"
        )
    return found


def _folder_texts(folder: Path) -> Iterator[Text]:
    """The files below a folder that are UTF-8 text, by path; hidden ones left out."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        try:
            yield Text(name, file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue


def _file_rows(path: Path, split: str, column: str) -> Iterator[Text]:
    """Rows of a parquet file."""
    try:
        rows = _datasets().load_dataset(
            "parquet", data_files=str(path), split=split, streaming=True
        )
        yield from _rows(rows, path.name, column)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # no such split; no parquet in it
        reason = str(error).splitlines()[0]
        raise DataError(
            f"--data {path.name}, --split {split}: {reason}; expected a parquet file"
        ) from None


def _hub_texts(dataset: HubDataset, split: str | None, column: str | None) -> Iterator[Text]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(
            dataset.path,
            dataset.config,
            split=split or dataset.split,
            revision=dataset.revision,
            streaming=True,
        )
    except (OSError, ValueError) as error:  # not reached, not there; no such split or config
        reason = str(error).splitlines()[0]
        raise DataError(
            f"--data {dataset.path}, --split {split or dataset.split}: {reason}; expected a data "
            "set of the hub that can be reached, or a local file or folder"
        ) from None
    yield from _rows(rows, dataset.path, column or dataset.column)


def _rows(rows: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[Text]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"--data {name} has several splits: give the folder of one of them")
        if not isinstance(row.get(column), str):
            texts = [key for key, value in row.items() if isinstance(value, str)]
            raise DataError(
                f"--column {column} is no text of {name}; its columns of text: {', '.join(texts)}"
            )
        yield Text(f"{name}[{number}]", row[column])


def _datasets() -> Any:
    """The `datasets` package, which only some sources need."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "this --data needs the package datasets: pip install 'hf_tiered_cache[eval]'"
        ) from None
    return datasets
