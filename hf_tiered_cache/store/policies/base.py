"""The contract of an eviction policy."""

from abc import ABC, abstractmethod

from hf_tiered_cache.registry import Registered


class EvictionPolicy(Registered, ABC, kind="eviction policy"):
    """Chooses the block that leaves a full store. It knows keys and sizes, no files and no locks.

    One instance for each process and store, made with the store's capacity in bytes and called by
    one thread at a time. All processes on a folder hear the same calls in the same order, so that
    equal policies agree.

    `victim` may be asked several times before anything is evicted, also when nothing changed in
    between, and names a block that is there. Where that has children in the store, a leaf below it
    goes in its place and `victim` is asked again later: what is kept can always be found from its
    root. So `on_evict` may tell of a block that was no victim.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes

    @abstractmethod
    def on_put(self, key: bytes, num_bytes: int, parent: bytes) -> None:
        """A block came that was not there."""

    @abstractmethod
    def on_hit(self, key: bytes) -> None:
        """A block that is there was read, or would have been put once more. Of a chain the last
        block comes first, so that the root is the most recent."""

    @abstractmethod
    def victim(self) -> bytes:
        """The block to leave next; there is at least one."""

    @abstractmethod
    def on_evict(self, key: bytes) -> None:
        """A block that was there is gone, for whatever reason."""
