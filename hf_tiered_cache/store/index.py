"""What is in a store, and what leaves it: `Index`. In memory, of one process; knows no files.

Eviction keeps the tree whole: where the policy's victim has children, a leaf below it goes first.
Otherwise the children could never be found again, and would only take room.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from hf_tiered_cache.store.policies.base import EvictionPolicy


class Entry(NamedTuple):
    """One block."""

    num_bytes: int
    parent: bytes
    space: bytes


class Index:
    """Blocks by key with their sizes and parents, and the policy that watches them."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.num_bytes = 0
        self.entries: dict[bytes, Entry] = {}
        self._children: dict[bytes, dict[bytes, None]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def put(self, key: bytes, num_bytes: int, parent: bytes, space: bytes = b"") -> None:
        """A block came. One that is there already was asked for once more."""
        if key in self.entries:
            self.hit(key)
            return
        self.entries[key] = Entry(num_bytes, parent, space)
        self._children.setdefault(parent, {})[key] = None
        self.num_bytes += num_bytes
        self.policy.on_put(key, num_bytes, parent)

    def hit(self, key: bytes) -> None:
        """A block was read; nothing happens if it is gone."""
        if key in self.entries:
            self.entries[key] = self.entries.pop(key)  # the most recent is the last
            self.policy.on_hit(key)

    def upwards(self, key: bytes) -> Iterator[bytes]:
        """A block that is there, its parent, and so on."""
        while (entry := self.entries.get(key)) is not None:
            yield key
            key = entry.parent

    def remove(self, key: bytes) -> None:
        """A block is gone; nothing happens if it was not there."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.num_bytes -= entry.num_bytes
        siblings = self._children[entry.parent]
        del siblings[key]
        if not siblings:
            del self._children[entry.parent]
        self.policy.on_evict(key)

    def make_room(
        self,
        num_bytes: int,
        evict: Callable[[bytes], None],
        keep: Collection[bytes] = (),
    ) -> bool:
        """Let blocks leave, each through `evict` which calls `remove`, until `num_bytes` more are
        within the capacity. False, and nothing left, where what may not leave (`keep`: those and
        all above them) stands in the way."""
        limit = self.policy.capacity_bytes - num_bytes
        kept = self._with_ancestors(keep)
        if sum(self.entries[key].num_bytes for key in kept) > limit:
            return False
        while self.num_bytes > limit:
            evict(self._leaf_below(self.policy.victim(), kept) or self._oldest_leaf(kept))
        return True

    def _oldest_leaf(self, kept: Collection[bytes]) -> bytes:
        """The least recent block without children that may leave, where the victim may not."""
        return next(key for key in self.entries if key not in self._children and key not in kept)

    def _with_ancestors(self, keys: Collection[bytes]) -> set[bytes]:
        kept: set[bytes] = set()
        for key in keys:
            while key in self.entries and key not in kept:
                kept.add(key)
                key = self.entries[key].parent
        return kept

    def _leaf_below(self, key: bytes, kept: Collection[bytes]) -> bytes | None:
        """A block without children, at or below `key`, that may leave."""
        todo = [key]
        while todo:
            one = todo.pop()
            children = self._children.get(one)
            if not children:
                if one not in kept:
                    return one
                continue
            todo += children if kept else [next(iter(children))]
        return None
