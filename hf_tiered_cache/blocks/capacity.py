"""What fits: slots counted over the rungs, and the errors that say what does not and which knob
helps.

Counts only, nothing moves here. A forward needs on the device, at the same time, the filling blocks
of all layers and a little staging; everything else can go down as long as there is room below.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hf_tiered_cache.blocks.block_manager import DEVICE, BlockTable, KVBlockManager
from hf_tiered_cache.blocks.staging import StagingRing
from hf_tiered_cache.errors import OutOfBlocksError
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.tiers.base import Tier

# Groups of columns that staging must be able to hold: one is attended while one loads.
STAGED_GROUPS = 2


class Needs(NamedTuple):
    """Device slots that an append needs: `new` ones, and the least with which it goes on, `pinned`
    for filling blocks (of all layers) and `staging`."""

    batch: int
    new: int
    pinned: int
    staging: int

    @property
    def least(self) -> int:
        """Slots without which the append cannot go on."""
        return self.pinned + self.staging


class Capacity:
    """Counts the slots that are free, can be made so, or must stay.

    `staging_slots`: as many as are wished for. `group_columns`: columns that are staged together.
    `expected_tables`: the number of layers, where the model's config told it (0: unknown).
    """

    def __init__(
        self,
        layout: BlockLayout,
        tiers: Sequence[Tier],
        blocks: KVBlockManager,
        stream: StagingRing,
        staging_slots: int,
        group_columns: int,
        expected_tables: int,
    ) -> None:
        self._layout = layout
        self._tiers = tiers
        self._blocks = blocks
        self._stream = stream
        has_lower = len(tiers) > 1
        self._wished_staging = staging_slots if has_lower else 0
        self._staged_columns = STAGED_GROUPS * group_columns if has_lower else 0
        self._expected_tables = expected_tables

    @property
    def last_rung(self) -> int:
        return len(self._tiers) - 1

    @property
    def num_layers(self) -> int:
        """Layers of a forward: each pins its filling blocks."""
        return max(self._blocks.num_layers, self._expected_tables)

    def num_free(self, rung: int = DEVICE) -> int:
        """Slots of a rung that blocks may take: free ones, less those kept for staging."""
        kept = self._stream.num_reserved if rung == DEVICE else 0
        return self._tiers[rung].num_free() - kept

    def num_below(self, rung: int = DEVICE) -> int:
        """Blocks that could still come to the rungs below: into free slots, and into those of
        copies that can be dropped."""
        lower = range(rung + 1, len(self._tiers))
        free = sum(self._tiers[one].num_free() for one in lower)
        return free + sum(self._blocks.num_clean_on(one) for one in lower[:-1])

    def rung_below(self, rung: int) -> int | None:
        """The next rung down that can be written to, without those of which other managers hold the
        whole budget."""
        for lower in range(rung + 1, len(self._tiers)):
            tier = self._tiers[lower]
            if not tier.is_read_only and tier.used_slots + tier.num_free():
                return lower
        return None

    @property
    def least_staging(self) -> int:
        """Staging slots without which a forward cannot go on."""
        return self._staged_columns * self._blocks.max_batch

    @property
    def least_slots(self) -> int:
        """Device slots without which a forward cannot go on."""
        filling = max(self._num_pinned, self.num_layers * self._blocks.max_batch)
        return filling + self.least_staging

    @property
    def least_bytes(self) -> int:
        """`least_slots` in bytes."""
        return self.least_slots * self._layout.num_bytes

    def needs(self, table: BlockTable, num_tokens: int) -> Needs:
        """What `num_tokens` more tokens in every row of the table need."""
        columns = self._layout.num_blocks(table.num_tokens + num_tokens) - table.num_blocks
        copies, pinned = self._fill_needs(table)
        return Needs(
            table.batch,
            columns * table.batch + copies,
            max(pinned, self.num_layers * table.batch),
            self.least_staging,
        )

    def check(self, needs: Needs, others_bytes: int) -> int:
        """Raise OutOfBlocksError unless that fits, whatever must be demoted for it; return the
        staging slots to have then. others_bytes: of the device's budget, that others cannot go
        without."""
        device = self._tiers[DEVICE]
        most = device.used_slots + device.num_free()
        if needs.least > most:
            raise self._budget_too_small(needs, others_bytes)
        staging = min(max(self._wished_staging, needs.staging), most - needs.pinned)
        free = self.num_free() + self._stream.num_slots - staging
        if needs.new > free + self._blocks.num_clean_on(DEVICE) + self.num_below():
            raise self.out_of_blocks(needs.new)
        return staging

    @property
    def _num_pinned(self) -> int:
        """Blocks on the device that no demotion takes away: those that fill."""
        taken = self._tiers[DEVICE].used_slots - self._stream.num_taken
        return taken - self._blocks.num_demotable()

    def _fill_needs(self, table: BlockTable) -> tuple[int, int]:
        """(blocks to copy before the table's last blocks can be written, blocks pinned to the
        device once they, or those of a new column, are). Pinned are the filling ones of all
        tables."""
        pinned = self._num_pinned
        if not table.is_filling:
            return 0, pinned + table.batch
        copies = 0
        for block, num_rows in Counter(row[-1] for row in table.rows).items():
            is_ours = block.ref_count == num_rows  # nobody else holds it: one row can keep it
            copies += num_rows - is_ours
            is_pinned = block.is_resident and not self._blocks.is_demotable(block)
            pinned += num_rows - (is_ours and is_pinned)
        return copies, pinned

    def _budget_too_small(self, needs: Needs, others_bytes: int) -> OutOfBlocksError:
        budget, size = self._tiers[DEVICE].budget.limit_bytes, self._layout.num_bytes
        smallest = needs.least * size + others_bytes
        beside = (
            f", and {format_bytes(others_bytes)} for blocks of other shapes" if others_bytes else ""
        )
        return OutOfBlocksError(
            f"device_bytes={format_bytes(budget)} is too small: {needs.pinned} filling blocks (one "
            f"for each of {self.num_layers} layers x {needs.batch} sequences, and of forks) and "
            f"{needs.staging} staging blocks of {format_bytes(size)} must be there{beside}: the "
            f"smallest device_bytes that works is {smallest} "
            f"({format_bytes(smallest)}); or choose a smaller block_tokens "
            f"(now {self._layout.block_tokens})"
        )

    def out_of_blocks(self, num_blocks: int) -> OutOfBlocksError:
        """The error that so many more blocks have no room on any rung."""
        written = [tier for tier in self._tiers if not tier.is_read_only]
        tiers = ", ".join(
            f"{tier.name}: {tier.used_slots} of {tier.used_slots + tier.num_free()} blocks used"
            for tier in written
        )
        knob = "raise " + " or ".join(tier.budget.knob for tier in reversed(written))
        if written[-1].has_addresses:
            knob += " or allow disk_bytes"
        size = format_bytes(num_blocks * self._layout.num_bytes)
        return OutOfBlocksError(
            f"no room for {num_blocks} more blocks ({size}) of {self._layout.block_tokens} tokens "
            f"({tiers}): {knob}, or shorten the sequence"
        )
