"""Least recently used."""

from collections import OrderedDict

from hf_tiered_cache.store.policies.base import EvictionPolicy


class LRU(EvictionPolicy, name="lru"):
    """The block that was not read for the longest time leaves."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def on_put(self, key: bytes, num_bytes: int, parent: bytes) -> None:
        self._order[key] = None

    def on_hit(self, key: bytes) -> None:
        self._order.move_to_end(key)

    def victim(self) -> bytes:
        return next(iter(self._order))

    def on_evict(self, key: bytes) -> None:
        self._order.pop(key, None)
