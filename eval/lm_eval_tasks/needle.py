"""Documents of the task in needle.yaml: a fact in a long text, asked for at its end, as in RULER.

Nothing is downloaded: the filler is Python's standard library, the facts are drawn at random.
"""

import random
import sys
from pathlib import Path

import datasets

from hf_tiered_cache.evaluation.standard_library import held_out_files, read_files

sys.path.append(str(Path(__file__).parent.parent))

import corpora

LENGTHS = (2048, 4096)  # bytes
DEPTHS = (0.1, 0.5, 0.9)  # of the fact, 0 is the beginning
CHOICES = 4


def documents(
    max_seq_lengths: tuple[int, ...] = LENGTHS, samples: int = 2, **others: object
) -> dict[str, datasets.Dataset]:
    """The test split; max_seq_lengths: bytes of the texts, a token of the byte-level model each.
    (`--metadata` of the harness sets both.)"""
    filler = read_files(held_out_files())
    rows = []
    for length in max_seq_lengths:
        for depth in DEPTHS:
            for sample in range(samples):
                rng = random.Random(f"{length} {depth} {sample}")
                text = corpora.recall_document(rng, length, filler, round((1 - depth) * length))
                choices = [text.answer, *(corpora.random_fact(rng)[1] for _ in range(CHOICES - 1))]
                rng.shuffle(choices)
                rows.append(
                    {
                        "text": text.text,
                        "question": text.question,
                        "choices": choices,
                        "answer": choices.index(text.answer),
                    }
                )
    return {"test": datasets.Dataset.from_list(rows)}
