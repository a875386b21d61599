"""Blocks whose content follows from their key, so that anybody can tell whether it is right."""

import fcntl
import random

from hf_tiered_cache.store import keys
from hf_tiered_cache.store.block_store import LayerData, TokenBlock

SPACE = keys.namespace({"test": 1})
ROOT = keys.root_key(SPACE)
BLOCK_TOKENS = 4
LAYERS = 2
FILE_BYTES = 4096 * (1 + LAYERS + 1)  # header, extents, and the footer's page


def chain(seed, num_blocks=8):
    """The keys of a pseudo-random sequence."""
    rng = random.Random(seed)
    ids = [rng.randrange(1000) for _ in range(num_blocks * BLOCK_TOKENS)]
    return keys.block_keys(SPACE, ids, BLOCK_TOKENS)


def content(key, layer):
    """What the block of a key holds: it follows from the key, so that anybody can check it."""
    return random.Random(key + bytes([layer])).randbytes(4096)


def token_blocks(names, first=0):
    return [
        TokenBlock(
            key,
            number,
            BLOCK_TOKENS,
            [
                LayerData(layer, "float32", (2, BLOCK_TOKENS, 8, 8), content(key, layer))
                for layer in range(LAYERS)
            ],
        )
        for number, key in enumerate(names)
        if number >= first
    ]


def put(store, names, first=0):
    parent = names[first - 1] if first else ROOT
    return store.put(SPACE, parent, token_blocks(names, first))


def check(store, names):
    """How many of the first are found; all that are hold what they should."""
    found = store.find(SPACE, names)
    for key, block in zip(names, found, strict=False):
        for layer, extent in enumerate(block.header.extents):
            assert block.read(extent) == content(key, layer), "WRONG"
    return len(found)


def on_disk(root):
    """Bytes of all block files, as the cap counts them; meanwhile nobody changes any."""
    with open(root / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in root.glob("v1/*/??/??/*.htc"))
