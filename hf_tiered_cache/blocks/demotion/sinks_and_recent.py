"""For drafts: what attention over the device alone needs most."""

from collections.abc import Iterable

from hf_tiered_cache.blocks.block_manager import KVBlock, Waiting
from hf_tiered_cache.blocks.demotion.by_age import ByAge


class SinksAndRecent(ByAge, name="sinks_and_recent"):
    """By age, but that the first block of every sequence stays as long as another one may leave.

    Models put much of their attention on the first tokens, whatever these say (attention sinks,
    StreamingLLM, arXiv 2309.17453): over a window of recent tokens alone they lose the thread.
    Exact decode reads every block for each token and does not care.
    """

    def next_to_demote(self, waiting: Waiting, may_store: bool) -> KVBlock | None:
        """The oldest block of a layer behind its first; that where there is no other."""
        behind = super().next_to_demote(waiting, may_store)
        return behind or _BY_AGE.next_to_demote(waiting, may_store)

    def next_to_store(self, waiting: Waiting) -> KVBlock | None:
        """Likewise, of dirty ones."""
        return super().next_to_store(waiting) or _BY_AGE.next_to_store(waiting)

    @staticmethod
    def _oldest(queue: Iterable[KVBlock]) -> KVBlock | None:
        return next((block for block in queue if block.index > 0), None)


_BY_AGE = ByAge()
