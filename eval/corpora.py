"""Documents to recall from: facts buried in filler.

No data set is downloaded. Recall documents are synthetic: facts (`key=value` lines, drawn at
random) buried in filler (hf_tiered_cache/evaluation/standard_library.py), one of them asked for
again far later; the answer is in no model's weights, only in the context. Knows no model, no tensor
and no cache.
"""

import random
import string
from dataclasses import dataclass

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
