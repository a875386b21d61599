"""Attention over what is at hand."""

from hf_tiered_cache.blocks.block_manager import Placement
from hf_tiered_cache.blocks.selection.base import Columns, SelectionPolicy


class ResidentOnly(SelectionPolicy, name="resident_only"):
    """The columns that are on the device in every row: nothing is loaded. Approximate.

    The blocks that fill are always among them; which others, decides the demotion policy. By age
    that is attention over a window of recent tokens (StreamingLLM, arXiv 2309.17453).
    """

    def select(self, placement: Placement, num_blocks: int) -> Columns:
        """The resident runs."""
        runs = [run for run in placement.runs if run.is_resident and run.first < num_blocks]
        return tuple(range(run.first, min(run.last, num_blocks)) for run in runs)


RESIDENT_ONLY = ResidentOnly()
