"""Which columns of a table attention reads: `SelectionPolicy`.

What is left out is not attended, as if a mask hid it; all else keeps its position. So a policy that
leaves anything out is approximate, unlike demotion, which only decides how fast a cache is.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from hf_tiered_cache.blocks.block_manager import Placement
from hf_tiered_cache.registry import Registered

Columns = tuple[range, ...]  # of a table: in order, apart from one another, none of them empty


class SelectionPolicy(Registered, ABC, kind="selection policy"):
    """Chooses the columns that are read. Made without arguments, holds no state: caches and threads
    share one."""

    is_exact: ClassVar[bool] = False
    """Whether all columns are read, always."""

    @abstractmethod
    def select(self, placement: Placement, num_blocks: int) -> Columns:
        """What to read of the first `num_blocks` columns of the table that is placed so. Asked for
        every layer of every forward, and for layers to come, whose loads run ahead."""
