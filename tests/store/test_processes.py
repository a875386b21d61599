"""Processes on one folder, some of them killed: nothing wrong, nothing left, the cap kept."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store.shadow import FILE_BYTES, chain, check, on_disk, put

from hf_tiered_cache.store.block_store import BlockStore

HERE = Path(__file__).parent
CAPACITY = 60 * FILE_BYTES


def start(root, seed, seconds, eviction="lru"):
    command = [sys.executable, HERE / "store_worker.py", root, str(seed), str(seconds)]
    worker = subprocess.Popen(
        [*command, str(CAPACITY), eviction],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}"},
    )
    assert worker.stdout is not None
    worker.stdout.readline()  # it is ready
    return worker


def share(root, seconds, kill_every, num_workers=4, eviction="lru"):
    """Run workers that are killed and replaced, one after the other; (rounds, kills)."""
    rng = random.Random(0)
    workers = [start(root, seed, seconds, eviction) for seed in range(num_workers)]
    end = time.monotonic() + seconds
    kills = 0
    while time.monotonic() < end:
        time.sleep(kill_every * rng.uniform(0.5, 1.5))
        assert on_disk(root) <= CAPACITY
        victim = workers.pop(rng.randrange(num_workers))
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        kills += 1
        left = max(0.5, end - time.monotonic())
        workers.append(start(root, 100 + kills, left, eviction))
    rounds = 0
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
        rounds += int(out.split()[-1])
    return rounds, kills


def leftovers(root):
    return [
        path
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".htc" and path.name not in ("lock", "journal")
    ]


def check_root(root):
    with BlockStore(root, capacity_bytes=CAPACITY) as store:
        assert list(store.verify()) == []
        assert on_disk(root) <= CAPACITY
        assert leftovers(root) == []
        for seed in range(20):
            check(store, chain(seed, 11))
        for seed in range(30, 40):  # and it goes on
            put(store, chain(seed, 11))
            assert check(store, chain(seed, 11)) == 11
        assert store.stats().used_bytes >= on_disk(root)
        store.gc()
        assert store.stats().used_bytes == on_disk(root)


def test_processes_share_a_folder_and_one_is_killed_now_and_then(tmp_path):
    _, kills = share(tmp_path, seconds=4, kill_every=0.7, num_workers=3)
    assert kills >= 2
    check_root(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_four_processes_for_minutes_one_killed_each_second(tmp_path, eviction):
    minutes = float(os.environ.get("STORE_MINUTES", "1"))
    rounds, kills = share(tmp_path, seconds=60 * minutes, kill_every=1.0, eviction=eviction)
    print(f"{eviction}: {rounds} rounds in those that lived, {kills} kills, WRONG 0")
    check_root(tmp_path)
