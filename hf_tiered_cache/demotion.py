"""Whose turn it is to leave a rung: `DemotionPolicy`, and `ByAge`, the default.

The books know which blocks may leave (`block_manager.Waiting`), a policy only chooses among them.
What it chooses changes how fast a cache is and never what comes out of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from hf_tiered_cache.block_manager import DEVICE, KVBlock, Waiting
from hf_tiered_cache.registry import Registered


class DemotionPolicy(Registered, ABC, kind="demotion policy"):
    """Chooses the blocks that are demoted. Each manager has one of its own, made without arguments
    and asked by one thread at a time.

    `waiting.dirty` and `waiting.clean` hold, by layer, the full blocks on a rung (not the last) in
    the order in which they came there: *clean* ones have a copy below, or one on its way, and leave
    for free; *dirty* ones must be stored first. `waiting.rung` is 0 for the device. Nothing of it
    may be changed.
    """

    @abstractmethod
    def next_to_demote(self, waiting: Waiting, may_store: bool) -> KVBlock | None:
        """The block to leave the rung next, now that its room is needed. Unless `may_store` only a
        clean one: there is no room below. None only where there is none."""

    @abstractmethod
    def next_to_store(self, waiting: Waiting) -> KVBlock | None:
        """The dirty block to be stored below next, before its room is needed; None where there is
        none that should."""


class ByAge(DemotionPolicy, name="by_age"):
    """The oldest blocks leave, so that every layer keeps the same share of every rung.

    Exact decode reads every block of every layer once for each token, in layer order. Against such
    a cyclic scan recency tells nothing, and the same share in each layer spreads the loads evenly
    over a forward.
    """

    def next_to_demote(self, waiting: Waiting, may_store: bool) -> KVBlock | None:
        """The oldest block of a layer, or of those of it with a copy below, if there are such."""
        dirty, clean = waiting.dirty, waiting.clean
        heads = [
            _oldest(clean[layer]) or _oldest(dirty[layer])
            for layer in dirty
            if clean[layer] or (may_store and dirty[layer])
        ]
        return _next(heads, waiting.rung, lambda layer: len(dirty[layer]) + len(clean[layer]))

    def next_to_store(self, waiting: Waiting) -> KVBlock | None:
        """The oldest dirty block of a layer."""
        dirty = waiting.dirty
        return _next(map(_oldest, dirty.values()), waiting.rung, lambda layer: len(dirty[layer]))


def _oldest(queue: Iterable[KVBlock]) -> KVBlock | None:
    return next(iter(queue), None)


def _next(
    heads: Iterable[KVBlock | None], rung: int, num_blocks: Callable[[int], int]
) -> KVBlock | None:
    """Whose turn it is of the oldest blocks of the layers.

    On the device the fullest layer gives. Below, where blocks lie that are still on the device as
    well, numbers say nothing: the oldest block goes.
    """
    blocks = [block for block in heads if block is not None]
    if rung == DEVICE:
        return max(blocks, key=lambda block: num_blocks(block.layer), default=None)
    return min(blocks, key=lambda block: block.index, default=None)
