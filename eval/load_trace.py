"""Traces of requests: when each arrives, how long its prompt is, and what it shares with others.

The format is that of the traces published with Mooncake: one JSON object a line with `timestamp`
(milliseconds), `input_length`, `output_length` and `hash_ids`, one id for every block of the
prompt. Equal ids are equal text, so prompts that begin with the same ids share that prefix.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

WORDS = "the cache keeps what was said and reads on from there while others wait for their turn"


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the first, its prompt, and the tokens it asks for."""

    seconds: float
    prompt: str
    output_tokens: int


def read_trace(path: Path, num_requests: int, block_bytes: int, most_bytes: int) -> list[Arrival]:
    """The first requests of a trace, at its own pace; a block becomes `block_bytes` of text, a
    prompt at most `most_bytes`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:num_requests]]
    first = rows[0]["timestamp"]
    return [
        Arrival(
            (row["timestamp"] - first) / 1000,
            "".join(block_text(it, block_bytes) for it in row["hash_ids"])[:most_bytes],
            row["output_length"],
        )
        for row in rows
    ]


def chats(num_requests: int, block_bytes: int, most_bytes: int, seed: int) -> list[Arrival]:
    """Chats of several turns beside one another, all behind one system prompt, one a second on
    average: every turn's prompt begins with the whole of the one before."""
    rng = random.Random(seed)
    system = block_text(seed * 1_000_003, block_bytes)
    open_chats: list[str] = []
    arrivals, now = [], 0.0
    for number in range(num_requests):
        now += rng.expovariate(1.0)
        if open_chats and rng.random() < 0.7:
            prompt = open_chats.pop(rng.randrange(len(open_chats)))
        else:
            prompt = system
        for part in range(rng.randint(1, 3)):
            prompt += block_text(seed * 1_000_003 + 10 * number + part + 1, block_bytes)
        prompt = prompt[:most_bytes]
        if len(prompt) < most_bytes:
            open_chats.append(prompt)
        arrivals.append(Arrival(now, prompt, rng.randint(4, 16)))
    return arrivals


def block_text(number: int, num_bytes: int) -> str:
    """Text that only this number has, always the same."""
    rng, words = random.Random(number), WORDS.split()
    text = f"[{number}]"
    while len(text) < num_bytes:
        text += " " + rng.choice(words)
    return text[:num_bytes]
