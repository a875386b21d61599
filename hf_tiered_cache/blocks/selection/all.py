"""The default: attention reads everything."""

from hf_tiered_cache.blocks.block_manager import Placement
from hf_tiered_cache.blocks.selection.base import Columns, SelectionPolicy


class All(SelectionPolicy, name="all"):
    """Every column: exact."""

    is_exact = True

    def select(self, placement: Placement, num_blocks: int) -> Columns:
        """All of them."""
        return (range(num_blocks),) if num_blocks else ()


ALL = All()
