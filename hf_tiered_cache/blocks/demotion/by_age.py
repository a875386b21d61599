"""The default: age alone decides who leaves."""

from collections.abc import Callable, Iterable

from hf_tiered_cache.blocks.block_manager import DEVICE, KVBlock, Waiting
from hf_tiered_cache.blocks.demotion.base import DemotionPolicy


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
            self._oldest(clean[layer]) or self._oldest(dirty[layer])
            for layer in dirty
            if clean[layer] or (may_store and dirty[layer])
        ]
        return _next(heads, waiting.rung, lambda layer: len(dirty[layer]) + len(clean[layer]))

    def next_to_store(self, waiting: Waiting) -> KVBlock | None:
        """The oldest dirty block of a layer."""
        dirty = waiting.dirty
        heads = map(self._oldest, dirty.values())
        return _next(heads, waiting.rung, lambda layer: len(dirty[layer]))

    @staticmethod
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
