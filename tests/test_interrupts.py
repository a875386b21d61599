"""Ctrl-C at any line of ours: the cache goes on as before, or says what to do, and loses nothing.

A thread is interrupted before a line of this package: each line that it runs, when it comes to it
first, in the middle and last (some of these in the short form). What was interrupted is then done
again, in bounded time, with the bits of a cache that was never interrupted, and every slot of every
tier is accounted for.
"""

import _thread
import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from interrupts import Place, bounded, interrupted_at, places
from test_failed_forwards import Case, PlannedError, ids_of, step
from test_generate_parity import check_integrity

from hf_tiered_cache import TieredCache, TieredCacheError, TornCacheError
from hf_tiered_cache.blocks.block_manager import Changing
from hf_tiered_cache.tiers.disk import movers

FAMILIES = ("Llama", "Gemma 3", "Qwen3-Next", "Falcon-H1", "LFM2")
CHAINS = ("disk", "host and disk", "python's threads", "host")
# Python swallows what is raised at the first line of a finalizer, and says so.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STRIDE = 41  # places between two interrupts in the short form


@pytest.fixture
def tiers(request, tmp_path, monkeypatch) -> dict[str, Any]:
    """Knobs of a cache whose device holds next to nothing, over a chain of tiers."""
    chain = request.param
    if chain == "python's threads":
        monkeypatch.setattr(movers, "moving_core", lambda: None)
    knobs: dict[str, Any] = {"device_bytes": 24 * 4096, "host_bytes": 0, "disk_bytes": "8MiB"}
    if "host" in chain:
        knobs["host_bytes"] = 40 * 4096 if chain == "host and disk" else "8MiB"
    if chain == "host":
        knobs["disk_bytes"] = 0
    return {**knobs, "disk_dir": tmp_path, "block_tokens": 4}


@pytest.fixture(autouse=True)
def only_once(monkeypatch) -> None:
    """What a finalizer swallowed does not come again in the middle of the next case."""
    monkeypatch.setattr(_thread, "interrupt_main", lambda: None)


def chosen(act: Callable[[], Any], is_short: bool, start: int = 0) -> list[Place]:
    """The places to interrupt; the short form begins elsewhere in each test."""
    every = places(act)
    return every[start % STRIDE :: STRIDE] if is_short else every


def check(cache: TieredCache) -> None:
    """Every slot is accounted for, in the books of the blocks and in those of the tiers."""
    check_integrity(cache)


def forms(chains: tuple[str, ...] = CHAINS, family_names: tuple[str, ...] = FAMILIES) -> list[Any]:
    """(tiers, family, is_short): all of them with the slow tests, a few in short form."""
    short = [("disk", "Falcon-H1"), *((chain, "Llama") for chain in chains)]
    every = [(chain, family) for chain in chains for family in family_names]
    return [
        *(pytest.param(chain, family, True, id=f"{family}, {chain}") for chain, family in short),
        *(
            pytest.param(chain, family, False, id=f"all, {family}, {chain}", marks=pytest.mark.slow)
            for chain, family in every
        ),
    ]


def tokens_of(family: str) -> list[torch.Tensor]:
    return ids_of(Case(family, "prompt", 0, "end", PlannedError, "again"))


def interrupt_forks(
    base: TieredCache,
    act: Callable[[TieredCache], Any],
    is_right: Callable[[TieredCache], bool],
    is_short: bool,
    start: int = 0,
) -> Counter[str]:
    """Interrupt `act` on forks of `base` and see whether each `is_right` after that; count what
    came of it."""
    counts: Counter[str] = Counter()
    sample = copy.deepcopy(base)
    for place in chosen(lambda: act(sample), is_short, start):
        with bounded(place):
            fork = copy.deepcopy(base)
            with interrupted_at(place) as interruption:
                act(fork)
            if not interruption.has_come:
                counts["not reached"] += 1
                continue
            try:
                verdict = "ok" if is_right(fork) else "WRONG"
            except TornCacheError:
                fork.reset()
                verdict = "refused"
            counts[verdict] += 1
            assert verdict != "WRONG", place
            check(base)
            del fork
            check(base)
    return counts


@pytest.mark.parametrize(("tiers", "family", "is_short"), forms(), indirect=["tiers"])
def test_a_forward_interrupted_anywhere_can_be_done_again(tiers, family, is_short):
    """Behind its last line an interrupt finds it done: then the next one is right."""
    model = families.tiny_model(family)
    counts: Counter[str] = Counter()
    with TieredCache(model.config, **tiers) as base:
        for number, (ids, next_ids) in enumerate(itertools.pairwise(tokens_of(family))):
            twin = copy.deepcopy(base)
            expected = step(model, twin, ids)
            expected_next = step(model, copy.deepcopy(twin), next_ids)
            num_tokens = twin.get_seq_length()
            del twin

            def act(fork: TieredCache, ids: torch.Tensor = ids) -> torch.Tensor:
                return step(model, fork, ids)

            def is_right(fork: TieredCache) -> bool:
                if fork.get_seq_length() == num_tokens:  # noqa: B023
                    return torch.equal(step(model, fork, next_ids), expected_next)  # noqa: B023
                return torch.equal(act(fork), expected)  # noqa: B023

            counts += interrupt_forks(base, act, is_right, is_short, 7 * number)
            assert torch.equal(act(base), expected)
    print(f"\n{family}: forwards interrupted: {dict(counts)}")
    assert counts["ok"] > 10 and not counts.keys() - {"ok", "not reached"}


@pytest.mark.parametrize("tiers", ["disk"], indirect=True)
def test_books_that_nobody_mends_would_be_noticed(tiers, monkeypatch):
    monkeypatch.setattr(Changing, "was_interrupted", False)
    model = families.tiny_model("Llama")
    ids = tokens_of("Llama")
    num_noticed = 0
    sample = TieredCache(model.config, **tiers)
    step(model, sample, ids[0])
    every = places(lambda: step(model, sample, ids[1]))
    for place in every[::STRIDE]:
        with bounded(place), TieredCache(model.config, **tiers) as cache:
            step(model, cache, ids[0])
            with interrupted_at(place):
                step(model, cache, ids[1])
            try:
                step(model, cache, ids[2])
                check(cache)
            except (AssertionError, TieredCacheError, StopIteration):
                num_noticed += 1
    sample.close()
    assert num_noticed > 0


CHANGES: dict[str, tuple[Callable[[TieredCache], Any], ...]] = {
    "crop": (lambda cache: cache.crop(-3),),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([0])),),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2),),
    "copy": (copy.deepcopy,),
    "keys": (lambda cache: [layer.keys for layer in cache.layers],),
    "stats": (TieredCache.stats,),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("tiers", "family", "is_short"), forms(("disk",), ("Llama",)), indirect=["tiers"]
)
def test_a_change_of_the_whole_cache_is_undone_or_refused_where_it_was_interrupted(
    tiers, family, is_short, change
):
    """It may also have gone through, where the interrupt came behind its last step."""
    if family != "Llama" and change == "crop":
        pytest.skip("linear states cannot be cropped")
    model = families.tiny_model(family)
    ids = tokens_of(family)
    (act,) = CHANGES[change]
    with TieredCache(model.config, **tiers) as base:
        for number in (0, 1):
            step(model, base, ids[number])
        before, changed = copy.deepcopy(base), copy.deepcopy(base)
        act(changed)
        step_of = {rows: ids[3].expand(rows, -1) for rows in (1, 2)}
        expected = [
            step(model, copy.deepcopy(one), step_of[one.batch_size]) for one in (before, changed)
        ]

        def is_right(fork: TieredCache) -> bool:
            fork.get_seq_length()  # refused here, if at all
            got = step(model, fork, step_of[fork.batch_size])
            return any(got.shape == one.shape and torch.equal(got, one) for one in expected)

        del before, changed
        counts = interrupt_forks(base, act, is_right, is_short)
    print(f"\n{family}: {change} interrupted: {dict(counts)}")
    assert counts["ok"] + counts["refused"] > 1
    if change in ("copy", "keys", "stats"):
        assert not counts["refused"]


@pytest.mark.parametrize(("tiers", "family", "is_short"), forms(), indirect=["tiers"])
def test_a_cache_can_be_reset_and_closed_where_that_was_interrupted(tiers, family, is_short):
    model = families.tiny_model(family)
    ids = tokens_of(family)
    with TieredCache(model.config, **tiers) as fresh:
        expected = step(model, fresh, ids[0])
    counts: Counter[str] = Counter()

    def filled() -> TieredCache:
        cache = TieredCache(model.config, **tiers)
        for number in (0, 1):
            step(model, cache, ids[number])
        return cache

    gc.collect()
    idle = resources()
    for verb in ("reset", "close"):
        with filled() as sample:
            every = chosen(getattr(sample, verb), is_short)
        for place in every:
            with bounded(place):
                cache = filled()
                with interrupted_at(place) as interruption:
                    getattr(cache, verb)()
                counts["interrupted"] += interruption.has_come
                if verb == "reset":
                    cache.reset()
                    assert torch.equal(step(model, cache, ids[0]), expected), place
                    check(cache)
                pools = cache._owned.pool
                cache.close()
                assert cache.is_closed
                for budget in (
                    *(budget for _, budget in pools._lower),
                    *(it.budget for it in pools._places.values()),
                ):
                    assert budget.used_bytes == 0, (place, budget)
                del cache
                gc.collect()
                assert resources() == idle, place
    print(f"\n{family}: reset and close: {dict(counts)}")
    assert counts["interrupted"] > 3


def resources() -> tuple[int, list[str]]:
    """(open descriptors, threads of ours): what a closed cache may not leave behind."""
    names = [it.name for it in threading.enumerate() if it.name.startswith("hf_tiered_cache")]
    return len(os.listdir("/proc/self/fd")), sorted(names)


@pytest.mark.parametrize(
    "num_rounds", [60, pytest.param(8000, marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_ctrl_c_at_random_moments_breaks_nothing(tmp_path, num_rounds):
    """Fewer are interrupted: some end before it comes."""
    here = Path(__file__).parent
    script = here / "sigint_at_random.py"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", script, str(num_rounds), "1", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60 + num_rounds,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(f"\nCtrl-C at random moments: {counts}")
    assert counts["interrupted"] > num_rounds / 4
    assert not counts.keys() - {"interrupted", "ok", "refused"}
    assert os.listdir(tmp_path) == []
