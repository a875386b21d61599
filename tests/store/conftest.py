"""Fixtures of the store's own tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_tiered_cache import BlockStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    """A store that is soon full."""
    with BlockStore(tmp_path / "kv", capacity_bytes="10MiB") as store:
        yield store
