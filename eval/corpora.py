"""Text that every machine already has: the Python standard library, and documents to recall from.

No data set is downloaded. The running Python brings about 25 MB of source text, split here into
training and held-out files by a hash of their path. Recall documents are synthetic: facts
(`key=value` lines, drawn at random) buried in filler, one of them asked for again far later; the
answer is in no model's weights, only in the context. Knows no model, no tensor and no cache.
"""

import functools
import hashlib
import os
import random
import string
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tables and generated text: known to the byte or not at all, so they neither teach nor measure.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "encodings", "pydoc_data", "data", "encoded_modules"}
)
# One file in so many is held out.
HELD_OUT_MODULUS = 16
KEY_LETTERS = 4
VALUE_DIGITS = 6


@dataclass(frozen=True)
class RecallDocument:
    """A document, a question about one of its facts, and the answer."""

    # facts and filler; ends with a newline
    text: str
    # to be appended to the text; ends with "key="
    question: str
    # what must follow the question, without the closing newline
    answer: str
    # bytes from the first byte of the fact to the first byte of the question
    distance_bytes: int


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


def fact_line(key: str, value: str) -> str:
    """Return the line that states a fact; up to the value, it is also the question."""
    return f"{key}={value}\n"


def random_fact(rng: random.Random) -> tuple[str, str]:
    """Draw a key of letters and a value of digits."""
    key = "".join(rng.choices(string.ascii_lowercase, k=KEY_LETTERS))
    return key, "".join(rng.choices(string.digits, k=VALUE_DIGITS))


def random_lines(rng: random.Random, text: str, num_bytes: int) -> str:
    """Cut whole lines of about `num_bytes` in all out of `text`, from a random line on."""
    start = text.find("\n", rng.randrange(max(1, len(text) - 2 * num_bytes))) + 1
    end = text.find("\n", start + num_bytes)
    return text[start:] if end < 0 else text[start : end + 1]


def recall_document(
    rng: random.Random,
    num_bytes: int,
    filler: str,
    distance_bytes: int | None = None,
    fact_every_bytes: int = 256,
) -> RecallDocument:
    """Bury facts in filler and ask for one of them at the end.

    num_bytes: length of the text, met to within a line of filler. filler: a long text (code of
    files, as `read_files` joins them) from which lines are cut. distance_bytes: how far back the
    fact lies that is asked for, again to within a line; None takes the whole document. Every
    `fact_every_bytes` there is another fact, so that only the key tells which one is meant.
    """
    distance_bytes = num_bytes if distance_bytes is None else min(distance_bytes, num_bytes)
    asked_key, asked_value = random_fact(rng)
    before, after = "", fact_line(asked_key, asked_value)
    while len(before) < num_bytes - distance_bytes:
        room = min(fact_every_bytes, num_bytes - distance_bytes - len(before))
        before += random_lines(rng, filler, room // 2) + fact_line(*random_fact(rng))
    while len(after) < distance_bytes:
        # The asked fact counts as this stretch's fact, so filler comes first.
        after += random_lines(rng, filler, min(fact_every_bytes, distance_bytes - len(after)))
        if len(after) < distance_bytes:
            after += fact_line(*random_fact(rng))
    return RecallDocument(
        text=before + after,
        question=f"{asked_key}=",
        answer=asked_value,
        distance_bytes=len(after.encode()),
    )


def read_files(paths: list[Path]) -> str:
    """Join the files' texts, a newline between two of them."""
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


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
