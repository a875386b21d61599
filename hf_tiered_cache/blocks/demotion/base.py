"""Whose turn it is to leave a rung: `DemotionPolicy`.

The books know which blocks may leave (`block_manager.Waiting`), a policy only chooses among them.
What it chooses changes how fast a cache is and never what comes out of it.
"""

from abc import ABC, abstractmethod

from hf_tiered_cache.blocks.block_manager import KVBlock, Waiting
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
