"""First in, first out."""

import heapq
from itertools import count

from hf_tiered_cache.store.policies.base import EvictionPolicy


class FIFO(EvictionPolicy, name="fifo"):
    """Of the blocks that end a chain the one that came first leaves, however often it was read.

    Going by age alone would take the newest block of a chain because its root is old: where all
    prompts share a root that halves the hits (eval/bench_store_policies.py).
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._numbers = count()
        self._arrivals: dict[bytes, int] = {}
        self._parents: dict[bytes, bytes] = {}
        self._num_children: dict[bytes, int] = {}
        self._leaves: list[tuple[int, bytes]] = []  # a heap; what is no leaf any more is passed

    def on_put(self, key: bytes, num_bytes: int, parent: bytes) -> None:
        """It is a leaf, unless its children were put before it."""
        self._arrivals[key] = next(self._numbers)
        self._parents[key] = parent
        self._num_children[parent] = self._num_children.get(parent, 0) + 1
        self._note_leaf(key)

    def on_hit(self, key: bytes) -> None:
        """Does not count."""

    def victim(self) -> bytes:
        """The leaf that came first."""
        while True:
            arrival, key = self._leaves[0]
            if self._arrivals.get(key) == arrival and key not in self._num_children:
                return key
            heapq.heappop(self._leaves)

    def on_evict(self, key: bytes) -> None:
        """Its parent may be a leaf now."""
        del self._arrivals[key]
        parent = self._parents.pop(key)
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]
            self._note_leaf(parent)

    def _note_leaf(self, key: bytes) -> None:
        if key in self._arrivals and key not in self._num_children:
            heapq.heappush(self._leaves, (self._arrivals[key], key))
