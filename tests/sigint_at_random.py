"""Real Ctrl-Cs at random moments, in a process of its own; prints what came of them as JSON.

Arguments: how many (and more, at most four times as many, until more than a quarter of that number
came in time), a seed, and a folder for the disk tier. Each round does something with a cache
while another thread sends SIGINT to this one a random moment later. Then the cache must go on with
the right bits, or refuse until it is reset, and every slot must be accounted for.
"""

import copy
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import families
import torch
from interrupts import bounded
from test_failed_forwards import Case, PlannedError, ids_of, step

from hf_tiered_cache import TieredCache, TornCacheError

KNOBS = {"device_bytes": 24 * 4096, "disk_bytes": "8MiB", "block_tokens": 4}
HOST_BYTES = (0, 40 * 4096)


class Round:
    """A cache with the first two chunks of a prompt, and what may be done with it."""

    def __init__(self, folder: str, host_bytes: int) -> None:
        self.model = families.tiny_model("Llama")
        self.ids = ids_of(Case("Llama", "prompt", 0, "end", PlannedError, "again"))
        self.make = lambda: TieredCache(
            self.model.config, disk_dir=folder, host_bytes=host_bytes, **KNOBS
        )
        self.base = self.fill(self.make())
        self.after: dict[int, torch.Tensor] = {}  # next logits, by tokens held
        for cache in (self.make(), self.fill(self.make()), self.fill(self.make(), 3)):
            with cache:
                self.after[cache.get_seq_length()] = self.next(cache)
        cropped = copy.deepcopy(self.base)
        cropped.crop(-3)
        self.after[cropped.get_seq_length()] = self.next(cropped)
        self.verbs: dict[str, Callable[[TieredCache], Any]] = {
            "forward": lambda cache: step(self.model, cache, self.ids[2]),
            "crop": lambda cache: cache.crop(-3),
            "copy": copy.deepcopy,
            "reset": TieredCache.reset,
            "close": TieredCache.close,
            "everything": lambda _: self.fill(self.make(), 3).close(),
        }

    def fill(self, cache: TieredCache, num_steps: int = 2) -> TieredCache:
        for ids in self.ids[:num_steps]:
            step(self.model, cache, ids)
        return cache

    def next(self, cache: TieredCache) -> torch.Tensor:
        """Logits of the token that follows, without it staying."""
        return step(self.model, copy.deepcopy(cache), self.ids[3])

    def judge(self, cache: TieredCache) -> str:
        """What the cache is after an interrupt."""
        if cache.is_closed:
            return "ok"
        verdict = "ok"
        try:
            num_tokens = cache.get_seq_length()
        except TornCacheError:
            cache.reset()
            num_tokens, verdict = 0, "refused"
        is_right = torch.equal(self.next(cache), self.after[num_tokens])
        return verdict if is_right else "WRONG"


def undisturbed(act: Callable[[], Any]) -> Any:
    """`act`, again if a Ctrl-C that a finalizer swallowed comes only now."""
    while True:
        try:
            return act()
        except KeyboardInterrupt:
            pass


def interrupted(act: Callable[[], Any], seconds: float) -> bool:
    """Do something, with a SIGINT after so long; whether it came in time."""
    me = threading.get_ident()

    def send() -> None:
        time.sleep(seconds)
        signal.pthread_kill(me, signal.SIGINT)

    sender = threading.Thread(target=send)
    is_done = False
    try:
        sender.start()
        act()
        is_done = True
        sender.join()
        time.sleep(1)  # the signal that it sent cuts this short
    except KeyboardInterrupt:
        pass
    return not is_done


def main(num_rounds: int, seed: int, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    randomly = random.Random(seed)
    counts: Counter[str] = Counter()
    rounds = [Round(folder, host_bytes) for host_bytes in HOST_BYTES]
    for number in range(4 * num_rounds):
        if number >= num_rounds and counts["interrupted"] > num_rounds / 4:
            break
        this = rounds[number % len(rounds)]
        name = list(this.verbs)[randomly.randrange(len(this.verbs))]
        with bounded((number, name)):
            fork = undisturbed(lambda this=this: copy.deepcopy(this.base))
            began = time.perf_counter()
            undisturbed(lambda this=this, name=name: this.verbs[name](copy.deepcopy(this.base)))
            usual = time.perf_counter() - began
            came = interrupted(
                lambda this=this, name=name, fork=fork: this.verbs[name](fork),
                randomly.uniform(0, usual),
            )
            counts["interrupted"] += came
            counts[undisturbed(lambda this=this, fork=fork: this.judge(fork))] += 1
            del fork
            for manager in this.base._owned.pool.managers:
                undisturbed(manager.check_integrity)
    for this in rounds:
        undisturbed(this.base.close)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
