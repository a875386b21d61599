"""First in, first out."""

from hf_tiered_cache.store.policies.base import EvictionPolicy


class FIFO(EvictionPolicy, name="fifo"):
    """The block that came first leaves, however often it was read."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._order: dict[bytes, None] = {}

    def on_put(self, key: bytes, num_bytes: int, parent: bytes) -> None:
        self._order[key] = None

    def on_hit(self, key: bytes) -> None:
        pass

    def victim(self) -> bytes:
        return next(iter(self._order))

    def on_evict(self, key: bytes) -> None:
        self._order.pop(key, None)
