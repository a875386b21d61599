"""One of several processes on one store: puts and finds at random, and says what was wrong.

python store_worker.py ROOT SEED SECONDS CAPACITY_BYTES EVICTION
"""

import random
import sys
from time import monotonic

from store.shadow import chain, check, put

from hf_tiered_cache.store.block_store import BlockStore


def main() -> None:
    root, seed, seconds, capacity, eviction = sys.argv[1:]
    rng = random.Random(int(seed))
    deadline = monotonic() + float(seconds)
    rounds = 0
    with BlockStore(root, capacity_bytes=int(capacity), eviction=eviction) as store:
        print("ready", flush=True)
        while monotonic() < deadline:
            names = chain(rng.randrange(20), rng.randrange(1, 12))
            if rng.random() < 0.5:
                check(store, names)
            else:
                put(store, names, first=check(store, names))
            rounds += 1
        assert store.counters["quarantined"] == 0, "WRONG: a damaged block"
    print(f"rounds {rounds}", flush=True)


if __name__ == "__main__":
    main()
