"""A cache that loses what is not on the device: for measurements that must be able to see it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from hf_tiered_cache.block_reader import BlockReader


@contextmanager
def without_cold_blocks() -> Iterator[None]:
    """Let attention miss what is not on the device, as a cache that loses blocks would."""
    stream = BlockReader.stream

    def resident_only(self, table, *arguments):
        is_cold = {i for i, block in enumerate(table.rows[0]) if not block.is_resident}
        for chunk in stream(self, table, *arguments):
            if chunk.first not in is_cold:
                yield chunk

    with patch.object(BlockReader, "stream", resident_only):
        yield
