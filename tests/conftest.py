"""Fixtures that many rooms need."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from hf_tiered_cache import BlockStore, TieredCache


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A suite that was started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as small as those of the tests gain nothing by more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def told_by(monkeypatch) -> Callable[[str], list[str]]:
    """What a room of the package warned of since, each text once."""

    def listen(room: str) -> list[str]:
        messages: list[str] = []
        logger = logging.get_logger(f"hf_tiered_cache.{room}")
        monkeypatch.setattr(logger, "warning", lambda message, *_, **__: messages.append(message))
        type(logger).warning_once.cache_clear()
        return messages

    return listen


@pytest.fixture
def make_cache(tmp_path) -> Any:
    """Builds a `TieredCache` with blocks of 4 tokens and a disk in `tmp_path`, closed at the end.

    `device_blocks`: the device budget in blocks of 4 KiB, the size of a small block.
    """
    caches: list[TieredCache] = []

    def make(config: Any = None, device_blocks: int | None = 64, **knobs: Any) -> TieredCache:
        if device_blocks is not None:
            knobs.setdefault("device_bytes", device_blocks * 4096)
        knobs = {"disk_bytes": "8MiB", "disk_dir": tmp_path, "block_tokens": 4, **knobs}
        caches.append(TieredCache(config, **knobs))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    """A store with room for everything that small models put there."""
    with BlockStore(tmp_path / "kv", capacity_bytes="100MiB") as store:
        yield store


MakeCache = Callable[..., TieredCache]
