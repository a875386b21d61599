"""Ctrl-C at any line of ours: the cache goes on as before, or says what to do, and loses nothing.

A thread is interrupted before its n-th line of this package, for every n there is (some of them in
the short form). What was interrupted is then done again, in bounded time, with the bits of a cache
that was never interrupted, and every slot of every tier is accounted for.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import torch
from interrupts import bounded, interrupted_at
from test_failed_forwards import Case, PlannedError, ids_of, step
from test_generate_parity import check_integrity

from hf_tiered_cache import TieredCache, TornCacheError
from hf_tiered_cache.tiers import movers

FAMILIES = ("Llama", "Gemma 3", "Qwen3-Next", "Falcon-H1", "LFM2")
CHAINS = ("disk", "host and disk", "python's threads", "host")
STRIDE = 23  # lines between two interrupts in the short form


@pytest.fixture
def tiers(request, tmp_path, monkeypatch) -> dict[str, Any]:
    """Knobs of a cache whose device holds next to nothing, over a chain of tiers."""
    chain = request.param
    if chain == "python's threads":
        monkeypatch.setattr(movers, "compiled_core", lambda: None)
    knobs = {"device_bytes": 24 * 4096, "host_bytes": 0, "disk_bytes": "8MiB"}
    if "host" in chain:
        knobs["host_bytes"] = 40 * 4096 if chain == "host and disk" else "8MiB"
    if chain == "host":
        knobs["disk_bytes"] = 0
    return {**knobs, "disk_dir": tmp_path, "block_tokens": 4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these gain nothing by more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def numbers(is_short: bool, start: int) -> Iterator[int]:
    """The lines to interrupt; the short form begins elsewhere in each test."""
    return itertools.count(1 + start % STRIDE, STRIDE) if is_short else itertools.count(1)


def check(cache: TieredCache) -> None:
    """Every slot is accounted for, in the books of the blocks and in those of the tiers."""
    check_integrity(cache)
    for manager in cache._owned.pool.managers:
        for tier in manager.tiers:
            tier.drain()


def ask_forks(
    base: TieredCache,
    act: Callable[[TieredCache], Any],
    is_right: Callable[[TieredCache], bool],
    lines: Iterator[int],
) -> Counter[str]:
    """Interrupt `act` on a fork of `base` at each of the lines, and see whether it `is_right` after
    that; count what came of it."""
    counts: Counter[str] = Counter()
    for number in lines:
        with bounded(f"line {number}"):
            fork = copy.deepcopy(base)
            with interrupted_at(number) as line:
                act(fork)
            if not line.where:
                break
            try:
                verdict = "ok" if is_right(fork) else "WRONG"
            except TornCacheError:
                verdict = "refused"
            counts[verdict] += 1
            assert verdict != "WRONG", line.where
            check(base)
            del fork
            check(base)
    return counts


CASES = [
    pytest.param(chain, family, is_short, marks=[] if is_short else [pytest.mark.slow])
    for is_short in (True, False)
    for chain in CHAINS
    for family in FAMILIES
    if not is_short or chain != "host" or family == "Llama"
]


@pytest.mark.parametrize(("tiers", "family", "is_short"), CASES, indirect=["tiers"])
def test_a_forward_interrupted_anywhere_can_be_done_again(tiers, family, is_short):
    model = families.tiny_model(family)
    ids = ids_of(Case(family, "prompt", 0, "end", PlannedError, "again"))
    counts: Counter[str] = Counter()
    with TieredCache(model.config, **tiers) as base:
        for number, step_ids in enumerate(ids[:4]):
            expected = step(model, copy.deepcopy(base), step_ids)
            counts += ask_forks(
                base,
                lambda fork, step_ids=step_ids: step(model, fork, step_ids),
                lambda fork, step_ids=step_ids, expected=expected: torch.equal(
                    step(model, fork, step_ids), expected
                ),
                numbers(is_short, 5 * number),
            )
            assert torch.equal(step(model, base, step_ids), expected)
    print(f"{family} over {tiers['host_bytes']} host and {tiers['disk_bytes']} disk: {counts}")
    assert counts["ok"] > 10 and set(counts) == {"ok"}
