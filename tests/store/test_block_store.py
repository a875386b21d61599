"""A folder for many processes: found or missed, never wrong, and never above its cap."""

import os
import random
import stat
import threading

import pytest
from store.shadow import FILE_BYTES, ROOT, SPACE, chain, check, content, on_disk, put

from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.store import files
from hf_tiered_cache.store.block_store import BlockStore
from hf_tiered_cache.store.files import OpenBlock
from hf_tiered_cache.store.journal import RECORD_BYTES
from hf_tiered_cache.store.policies import EvictionPolicy


def test_what_is_put_is_found(store):
    names = chain(1)
    assert check(store, names) == 0
    assert put(store, names[:5]) == 5
    assert check(store, names) == 5
    assert put(store, names, first=5) == 3
    assert check(store, names) == 8
    assert check(store, chain(2)) == 0


def test_another_process_and_a_restart_find_it(store, tmp_path):
    put(store, chain(1))
    with BlockStore(tmp_path / "kv", capacity_bytes="10MiB") as other:
        assert check(other, chain(1)) == 8
        put(other, chain(2))
        assert check(store, chain(2)) == 8
        assert store.stats().blocks == other.stats().blocks == 16
        assert store.stats().used_bytes == other.stats().used_bytes == on_disk(store.root)


def test_what_is_there_is_not_written_again(store):
    put(store, chain(1))
    assert not store.is_wanted(SPACE, chain(1)[3])
    before = store.stats().used_bytes
    assert put(store, chain(1)) == 8
    assert store.stats().used_bytes == before


def test_a_block_whose_parent_is_not_there_is_not_put(store):
    names = chain(1)
    assert put(store, names, first=3) == 0
    assert store.stats().blocks == 0
    assert store.counters["parent_gone"] == 5


@pytest.mark.parametrize("eviction", sorted(EvictionPolicy.registry))
def test_the_cap_holds_and_no_block_is_stranded(eviction, tmp_path):
    capacity = 20 * FILE_BYTES
    rng = random.Random(0)
    with BlockStore(tmp_path, capacity_bytes=capacity, eviction=eviction) as store:
        for _ in range(60):
            names = chain(rng.randrange(12), rng.randrange(1, 12))
            put(store, names, first=check(store, names))
            assert on_disk(tmp_path) <= capacity
            for listed in store.ls():
                parent = bytes.fromhex(listed.parent)
                path = files.relative_path(SPACE, parent)
                assert parent == ROOT or (tmp_path / path).exists()
        assert store.stats().used_bytes == on_disk(tmp_path)
        assert store.counters["evicted"] > 0


def test_what_is_larger_than_the_store_is_not_put(tmp_path):
    with BlockStore(tmp_path, capacity_bytes=3 * FILE_BYTES) as store:
        assert put(store, chain(1, 5)) == 0
        assert put(store, chain(1, 3)) == 3
        assert store.counters["no_room"] == 5


def test_a_pinned_block_and_those_before_it_stay(tmp_path):
    with BlockStore(tmp_path, capacity_bytes=10 * FILE_BYTES) as store:
        put(store, chain(1, 6))
        assert store.pin(SPACE, chain(1, 6)[3])
        assert not store.pin(SPACE, chain(9)[0])
        for seed in range(2, 8):
            put(store, chain(seed, 4))
        assert check(store, chain(1, 6)) == 4
        assert put(store, chain(9, 7)) == 0  # no room beside what is pinned
        assert store.unpin(chain(1, 6)[3])
        assert not store.unpin(chain(1, 6)[3])
        assert put(store, chain(9, 7)) == 7


def test_lru_keeps_what_is_read(tmp_path):
    with BlockStore(tmp_path, capacity_bytes=10 * FILE_BYTES) as store:
        put(store, chain(1, 4))
        put(store, chain(2, 4))
        check(store, chain(1, 4))
        put(store, chain(3, 4))
        assert [check(store, chain(seed, 4)) for seed in (1, 2, 3)] == [4, 2, 4]


def test_hits_of_another_process_count(tmp_path):
    with (
        BlockStore(tmp_path, capacity_bytes=10 * FILE_BYTES) as one,
        BlockStore(tmp_path, capacity_bytes=10 * FILE_BYTES) as other,
    ):
        put(one, chain(1, 4))
        put(one, chain(2, 4))
        check(other, chain(1, 4))
        put(one, chain(3, 4))
        assert [check(one, chain(seed, 4)) for seed in (1, 2, 3)] == [4, 2, 4]


def test_an_open_block_outlives_its_eviction(tmp_path):
    with BlockStore(tmp_path, capacity_bytes=4 * FILE_BYTES) as store:
        put(store, chain(1, 4))
        found = store.find(SPACE, chain(1, 4))
        put(store, chain(2, 4))
        assert check(store, chain(1, 4)) == 0
        assert found[3].read(found[3].header.extents[1]) == content(chain(1, 4)[3], 1)


def test_a_hit_ends_where_too_many_files_are_open(store):
    names = chain(1)
    put(store, names)
    store._most_open = OpenBlock.num_open + 3
    found = store.find(SPACE, names)
    assert len(found) == 3
    del found
    assert OpenBlock.num_open == store._most_open - 3
    assert len(store.find(SPACE, names)) == 3


def paths(store, names):
    return [store.root / files.relative_path(SPACE, key) for key in names]


def test_a_damaged_block_is_put_away_and_those_behind_it_come_back(store):
    names = chain(1)
    put(store, names)
    path = paths(store, names)[4]
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    assert check(store, names) == 4
    assert not path.exists()
    assert store.counters["quarantined"] == 1
    assert len(list((store.root / "corrupt").iterdir())) == 1
    assert put(store, names[:5], first=4) == 1
    assert check(store, names) == 8


def test_the_quarantine_is_bounded(store):
    for seed in range(30):
        names = chain(seed, 1)
        put(store, names)
        paths(store, names)[0].write_bytes(b"nonsense")
        assert check(store, names) == 0
    assert len(list((store.root / "corrupt").iterdir())) == 16


def test_verify_finds_damage_anywhere(store):
    put(store, chain(1))
    put(store, chain(2))
    assert list(store.verify()) == []
    path = paths(store, chain(2))[6]
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    ((bad, why),) = store.verify()
    assert path.match(bad) and "layer 1" in why
    assert path.exists()
    assert len(list(store.verify(repair=True))) == 1
    assert not path.exists()
    assert list(store.verify()) == []


def test_two_files_exchanged_are_refused(store):
    put(store, chain(1))
    one, other = paths(store, chain(1))[2:4]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert check(store, chain(1)) == 2


@pytest.mark.parametrize("damage", ["missing", "torn", "flipped", "nonsense", "empty"])
def test_a_damaged_journal_is_made_anew(store, tmp_path, damage):
    put(store, chain(1))
    journal = store.root / "journal"
    data = journal.read_bytes()
    if damage == "missing":
        journal.unlink()
    elif damage == "torn":
        journal.write_bytes(data[: 3 * RECORD_BYTES + 7])
    elif damage == "flipped":
        journal.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "nonsense":
        journal.write_bytes(b"x" * RECORD_BYTES * 4)
    with BlockStore(tmp_path / "kv", capacity_bytes="10MiB") as other:
        if damage == "empty":
            journal.write_bytes(b"")
            other.gc()
        assert check(other, chain(1)) == 8
        assert put(other, chain(2)) == 8
        assert other.stats().used_bytes == on_disk(store.root)
        assert store.stats().used_bytes == on_disk(store.root)


def test_a_long_journal_is_begun_anew_and_everybody_notices(store, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tiered_cache.store.block_store.LEAST_RECORDS", 50)
    with BlockStore(tmp_path / "kv", capacity_bytes="10MiB") as other:
        put(store, chain(1, 2))
        for _ in range(100):
            check(other, chain(1, 2))
        put(store, chain(2, 2))
        assert (store.root / "journal").stat().st_size < 60 * RECORD_BYTES
        put(other, chain(3, 2))
        assert store.stats().blocks == other.stats().blocks == 6


def test_gc_sweeps_what_killed_writers_left(store):
    put(store, chain(1, 2))
    folder = paths(store, chain(1, 2))[0].parent
    (folder / ".123.abc.tmp").write_bytes(b"half a block")
    store.pin(SPACE, chain(1, 2)[1])
    paths(store, chain(1, 2))[1].unlink()
    assert store.gc() == {"unfinished": 1, "evicted": 0, "pins": 1, "quarantined": 0}
    assert store.stats().blocks == 1
    assert store.stats().pinned == 0


def test_gc_shrinks_to_a_smaller_cap(tmp_path):
    with BlockStore(tmp_path, capacity_bytes="10MiB") as store:
        put(store, chain(1))
    with BlockStore(tmp_path, capacity_bytes=3 * FILE_BYTES) as store:
        assert store.gc()["evicted"] == 5
        assert check(store, chain(1)) == 3


def test_purge_removes_everything(store):
    put(store, chain(1))
    store.pin(SPACE, chain(1)[2])
    assert store.purge() == 8
    assert store.stats().blocks == store.stats().pinned == 0
    assert on_disk(store.root) == 0


def test_ingest_hot_takes_what_comes_again(tmp_path):
    with BlockStore(tmp_path, ingest="hot") as store:
        key = chain(1)[0]
        assert [store.is_wanted(SPACE, key) for _ in range(3)] == [False, True, True]
        assert not store.is_wanted(SPACE, chain(2)[0])


def test_a_full_disk_is_an_error_of_the_writer_and_no_block(store, monkeypatch):
    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(TierIOError, match="No space left"):
        put(store, chain(1))
    monkeypatch.undo()
    assert check(store, chain(1)) == 0
    assert list(store.root.rglob("*.htc")) == []
    assert put(store, chain(1)) == 8


def test_short_writes_are_continued(store, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:1000]))
    assert put(store, chain(1)) == 8
    assert check(store, chain(1)) == 8


def test_a_torn_write_of_the_journal_is_mended(store, monkeypatch):
    put(store, chain(1))
    real = os.write

    def tear(fd, data):
        return real(fd, memoryview(data)[:100] if len(data) < 4096 and len(data) > 32 else data)

    monkeypatch.setattr(os, "write", tear)
    with pytest.raises(TierIOError, match="journal"):
        put(store, chain(2))
    monkeypatch.undo()
    assert put(store, chain(2)) == 8
    assert check(store, chain(2)) == 8
    assert check(store, chain(1)) == 0  # a full disk: it left for the room of the other
    assert store.stats().used_bytes == on_disk(store.root)


def test_the_folder_is_private(tmp_path):
    before = os.umask(0)
    try:
        with BlockStore(tmp_path / "a" / "kv") as store:
            put(store, chain(1, 2))
            store.pin(SPACE, chain(1, 2)[0])
    finally:
        os.umask(before)
    for path in [store.root, *store.root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_what_cannot_be_is_said(tmp_path):
    for knobs, message in [
        ({"eviction": "clock"}, "unknown eviction policy 'clock'; known: fifo, lru"),
        ({"ingest": "some"}, "ingest='some'"),
        ({"durability": "maybe"}, "durability='maybe'"),
        ({"on_load_failure": "ignore"}, "on_load_failure='ignore'"),
        ({"capacity_bytes": "many"}, "capacity_bytes='many'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            BlockStore(tmp_path, **knobs)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used"):
        BlockStore(tmp_path / "file")
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        BlockStore(tmp_path / "open")


def test_threads_put_and_find_together(store):
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(30):
            names = chain(rng.randrange(6), rng.randrange(1, 9))
            try:
                put(store, names, first=check(store, names))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats().used_bytes == on_disk(store.root)


def test_the_publisher_drops_what_is_too_much(store):
    gate, done = threading.Event(), []
    store.publisher._queue_bytes = 100
    assert store.publish(60, gate.wait)
    assert store.publish(40, lambda: done.append(1))
    assert not store.publish(41, lambda: done.append(2))
    assert store.counters["dropped"] == 1
    assert not store.flush(0.05)
    gate.set()
    assert store.flush(5)
    assert done == [1]


def test_the_publisher_survives_what_it_is_given(store):
    def fail():
        raise OSError(5, "on purpose")

    done = []
    store.publish(1, fail)
    store.publish(1, lambda: done.append(1))
    assert store.flush(5)
    assert done == [1]
    assert store.counters["publish_errors"] == 1
