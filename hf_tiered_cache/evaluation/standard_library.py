"""Text that every machine already has: what comes with the running Python.

The sources of its standard library, about 25 MB, are split into training and held-out files by a
hash of their path: the tiny model of the evaluations was trained on the one half only. And the
language reference, which is prose. Another Python version has other texts.
"""

import functools
import hashlib
import os
import sysconfig
from pathlib import Path

# Tables and generated text: known to the byte or not at all, so they neither teach nor measure.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "encodings", "pydoc_data", "data", "encoded_modules"}
)
# One file in so many is held out.
HELD_OUT_MODULUS = 16


def stdlib_files() -> list[Path]:
    """List the standard library's sources, sorted by relative path; tests included, data not."""
    return [path for path in _python_files() if _is_source(path)]


def relative_path(path: Path) -> str:
    """Return the path below the standard library's folder, with forward slashes."""
    return path.relative_to(_stdlib()).as_posix()


def train_files() -> list[Path]:
    """List the files that training may read, in the order of `stdlib_files`."""
    return [path for path in stdlib_files() if not _is_held_out(path)]


def held_out_files(min_bytes: int = 16 * 1024) -> list[Path]:
    """List the files that training never reads and that are longer than `min_bytes`."""
    held_out = [path for path in _python_files() if _is_held_out(path)]
    return [path for path in held_out if path.stat().st_size > min_bytes and _is_source(path)]


def read_files(paths: list[Path]) -> str:
    """Join the files' texts, a newline between two of them."""
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def language_reference() -> str:
    """Python's language reference as `help()` knows it: half a megabyte of English prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


@functools.cache
def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _python_files() -> list[Path]:
    """Every .py file but those in SKIPPED_FOLDERS, which are not even listed (site-packages may be
    far larger than all the rest), sorted by relative path."""
    found = []
    for folder, subfolders, names in os.walk(_stdlib()):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=relative_path)


def _is_held_out(path: Path) -> bool:
    digest = hashlib.sha256(relative_path(path).encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_MODULUS == 0


def _is_source(path: Path) -> bool:
    # A few of the standard library's own tests are deliberately in other encodings.
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
