"""S3-FIFO (Yang et al., SOSP 2023), with parameters that suit prefixes.

    small  30 % of the bytes, first in first out; new blocks come here
           a victim that was read since it came moves to main, any other one leaves and is
           remembered in the ghost
    main   the rest, first in first out; a victim that was read goes round again, with one
           reading less to its credit
    ghost  keys that left small; what returns while it is remembered goes to main at once

The paper's small queue of 10 % and two readings lose to LRU where the store is large; with 30 % and
one reading it is at least as good (eval/bench_store_policies.py). The ghost holds at most three
keys for each block that is there.
"""

from collections import OrderedDict

from hf_tiered_cache.store.policies.base import EvictionPolicy

SMALL_SHARE = 0.3
READINGS_TO_STAY = 1
MOST_READINGS = 3
GHOSTS_PER_BLOCK = 3


class S3FIFO(EvictionPolicy, name="s3fifo"):
    """Blocks that are read once leave early; those that are read again stay long."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._small: OrderedDict[bytes, int] = OrderedDict()  # readings by key
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()
        self._sizes: dict[bytes, int] = {}
        self._small_bytes = 0

    def on_put(self, key: bytes, num_bytes: int, parent: bytes) -> None:
        """New ones come to small, those that come back to main."""
        self._sizes[key] = num_bytes
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0
            self._small_bytes += num_bytes

    def on_hit(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(MOST_READINGS, queue[key] + 1)

    def victim(self) -> bytes:
        """The oldest of small while it has its share, else of main, that nobody read."""
        while True:
            small_share = SMALL_SHARE * self.capacity_bytes
            if self._small and (self._small_bytes >= small_share or not self._main):
                key, readings = next(iter(self._small.items()))
                if readings < READINGS_TO_STAY:
                    return key
                self._leave_small(key)
                self._main[key] = 0
            else:
                key, readings = next(iter(self._main.items()))
                if readings == 0:
                    return key
                self._main[key] = readings - 1
                self._main.move_to_end(key)

    def on_evict(self, key: bytes) -> None:
        """What left small is remembered."""
        if key in self._small:
            self._leave_small(key)
            self._ghost[key] = None
        else:
            self._main.pop(key, None)
        self._sizes.pop(key, None)
        while len(self._ghost) > GHOSTS_PER_BLOCK * max(1, len(self._sizes)):
            self._ghost.popitem(last=False)

    def _leave_small(self, key: bytes) -> None:
        del self._small[key]
        self._small_bytes -= self._sizes[key]
