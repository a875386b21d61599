"""Make a small synthetic trace of requests in the shape of Mooncake's: chats of several turns over
a few shared system prompts, questions on documents, and prompts that never return.

    python eval/make_trace.py        # writes traces/small.jsonl.gz, always the same bytes

One JSON object a line: timestamp (ms), input_length, output_length (tokens), and hash_ids, one for
each block of 512 tokens; equal ids mean equal prefixes.
"""

import gzip
import json
import random
from itertools import count
from pathlib import Path

PATH = Path(__file__).parent / "traces" / "small.jsonl.gz"
BLOCK_TOKENS = 512
NUM_REQUESTS = 1500


def requests(seed: int = 0) -> list[dict]:
    """The trace."""
    rng = random.Random(seed)
    ids = count()
    systems = [[next(ids) for _ in range(rng.randrange(1, 6))] for _ in range(5)]
    documents = [[next(ids) for _ in range(rng.randrange(10, 60))] for _ in range(12)]
    chats: list[list[int]] = []
    made = []
    for number in range(NUM_REQUESTS):
        kind = rng.random()
        if kind < 0.45 and chats:
            # A turn of a chat: recent ones go on more often.
            place = min(int(rng.expovariate(0.12)), len(chats) - 1)
            chat = chats.pop(len(chats) - 1 - place)
            chat += [next(ids) for _ in range(rng.randrange(1, 4))]
            chats.append(chat)
            blocks = [*chat]
        elif kind < 0.7:
            chat = [*rng.choice(systems), *(next(ids) for _ in range(rng.randrange(1, 8)))]
            chats.append(chat)
            blocks = [*chat]
        elif kind < 0.8:
            blocks = [*rng.choice(documents), next(ids)]
        else:
            blocks = [next(ids) for _ in range(rng.randrange(4, 40))]
        made.append(
            {
                "timestamp": 250 * number,
                "input_length": BLOCK_TOKENS * len(blocks) - rng.randrange(BLOCK_TOKENS),
                "output_length": rng.randrange(20, 600),
                "hash_ids": blocks,
            }
        )
    return made


def main() -> None:
    PATH.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(request) + "\n" for request in requests())
    with PATH.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(lines.encode())
    print(f"written: {PATH}, {NUM_REQUESTS} requests")


if __name__ == "__main__":
    main()
