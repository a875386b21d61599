"""Makes the golden keys and files of the store's format. Run it for a new version of the format
only: what it made before must be found for ever.

    PYTHONPATH=. python tests/data/make_store_golden.py
"""

import json
import random
import tempfile
from pathlib import Path

from hf_tiered_cache.store import files, keys

HERE = Path(__file__).parent

IDENTITIES = {
    "empty": {},
    "typed": {"none": None, "yes": True, "int": -7, "big": 2**80, "float": 0.1, "text": "ä\x00"},
    "nested": {"config": {"rope": {"theta": 5e5, "type": "llama3"}, "layers": ["full", "full"]}},
    "bytes": {"weights": "ff" * 32, "salt": "tenant"},
}


def vectors() -> list[dict]:
    """Keys of pseudo-random ids."""
    made = []
    for number, (name, identity) in enumerate(IDENTITIES.items()):
        space = keys.namespace(identity)
        for block_tokens in (4, 16, 64, 256):
            ids = [random.Random(number).randrange(200_000) for _ in range(3)]
            ids = (ids * 400)[: 2 * block_tokens + 3]
            salt = b"" if number % 2 else b"salt"
            made.append(
                {
                    "name": f"{name}-{block_tokens}",
                    "identity": identity,
                    "salt": salt.hex(),
                    "block_tokens": block_tokens,
                    "ids": ids,
                    "space": space.hex(),
                    "keys": [key.hex() for key in keys.block_keys(space, ids, block_tokens, salt)],
                }
            )
    return made


def block(number: int = 1) -> tuple[files.Header, list[bytes]]:
    """A small block of two layers."""
    space = keys.namespace({"golden": 1})
    chain = keys.block_keys(space, range(8), 4)
    data = [random.Random(layer).randbytes(4096) for layer in range(2)]
    layers = [
        (layer, files.DTYPES["bfloat16"], (2, 4, 8, 8), content)
        for layer, content in enumerate(data)
    ]
    header = files.plan(
        chain[number], chain[number - 1], space, 4, number, layers, created_ns=1_700_000_000 * 10**9
    )
    return header, data


def golden_file() -> bytes:
    """A block file, byte for byte."""
    import os

    header, data = block()
    with tempfile.TemporaryDirectory() as folder:
        fd = os.open(folder, os.O_RDONLY)
        with files.NewBlock(fd, header, data) as new:
            assert new.publish()
        os.close(fd)
        return (Path(folder) / new.path).read_bytes()


if __name__ == "__main__":
    (HERE / "store_keys.json").write_text(json.dumps(vectors(), indent=1) + "\n")
    (HERE / "store_block_v1.htc").write_bytes(golden_file())
