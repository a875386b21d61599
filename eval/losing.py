"""A cache that loses what is not on the device: for measurements that must be able to see it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from hf_tiered_cache.blocks.block_reader import Reading


@contextmanager
def without_cold_blocks() -> Iterator[None]:
    """Let attention miss what is not on the device, as a cache that loses blocks would."""
    chunks = Reading.chunks

    def resident_only(self):
        is_cold = {i for i, block in enumerate(self._table.rows[0]) if not block.is_resident}
        for chunk in chunks(self):
            if chunk.first not in is_cold:
                yield chunk

    with patch.object(Reading, "chunks", resident_only):
        yield
