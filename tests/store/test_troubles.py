"""A store on a disk that is full, read-only, gone or failing, and in processes that fork."""

import errno
import fcntl
import gc
import os
import shutil

import pytest
from store.shadow import SPACE, chain, check, put

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.store import block_store, files
from hf_tiered_cache.store.block_store import BlockStore
from hf_tiered_cache.store.files import BlockFileError


def file_of(store, key):
    return store.root / files.relative_path(SPACE, key)


def refuse(monkeypatch, name, is_meant, code, times=10**9):
    """Let a function of `os` fail where `is_meant(its first arguments)`."""
    real, left = getattr(os, name), [times]

    def call(*args, **kwargs):
        if left[0] and is_meant(*args):
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


def is_locked(store):
    with open(store.root / "lock", "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_lock_is_held_until_the_outermost_lets_it_go(store):
    with store._locked():
        with store._locked():
            pass
        assert is_locked(store)
    assert not is_locked(store)


def test_purge_is_alone_to_its_end(store, monkeypatch):
    put(store, chain(1))
    store.pin(SPACE, chain(1)[0])
    seen = []
    rebuild = store._rebuild
    monkeypatch.setattr(store, "_rebuild", lambda: (seen.append(is_locked(store)), rebuild()))
    assert store.purge() == 8
    assert seen == [True]


def in_child(work):
    """Exit code 0 where `work` returns True in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_neither_shares_nor_frees_the_lock(store):
    def child_is_shut_out():
        assert store._lock.mutex  # a lock of its own is made
        try:
            fcntl.flock(store._lock._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    with store._locked():
        assert in_child(child_is_shut_out) == 0
        assert is_locked(store)
    assert in_child(lambda: put(store, chain(1)) == 8) == 0
    assert check(store, chain(1)) == 8


def test_a_store_that_is_dropped_leaves_no_descriptor(tmp_path):
    BlockStore(tmp_path, capacity_bytes="1MiB").close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store = BlockStore(tmp_path, capacity_bytes="1MiB")
        store.publish(1, lambda: None)
        assert store.flush(10)
        del store
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_system_refuses_is_not_counted_as_descriptors(monkeypatch):
    monkeypatch.setattr(block_store.resource, "getrlimit", lambda _: (100, 4000))

    def refused(*_):
        raise ValueError

    monkeypatch.setattr(block_store.resource, "setrlimit", refused)
    assert block_store._descriptors() == 100


def test_verify_sees_a_header_that_is_damaged_wherever_it_is(store):
    put(store, chain(1))
    for path in store.root.glob("v1/*/??/??/*.htc"):
        with open(path, "r+b") as file:
            file.write(bytes(4096))
    assert len(list(store.verify())) == 8
    assert len(list(store.verify(repair=True))) == 8
    assert list(store.verify()) == []


def test_verify_tells_of_a_file_that_cannot_be_read(store, monkeypatch):
    put(store, chain(1))
    inode = file_of(store, chain(1)[2]).stat().st_ino

    def is_meant(fd, _, offset):
        return os.fstat(fd).st_ino == inode and offset == 4096

    refuse(monkeypatch, "pread", is_meant, errno.EIO)
    ((path, why),) = store.verify(repair=True)
    assert chain(1)[2].hex() in path
    assert "Input/output error" in why
    assert not file_of(store, chain(1)[2]).exists()


def test_purge_removes_what_is_damaged_too(store):
    put(store, chain(1))
    file_of(store, chain(1)[0]).write_bytes(b"none")
    assert store.purge() == 8
    assert not list(store.root.glob("v1/*/??/??/*.htc"))


def test_another_file_of_that_name_is_not_put_away(store):
    put(store, chain(1))
    path = file_of(store, chain(1)[0])
    store.quarantine(str(path.relative_to(store.root)), "a test", (0, 0))
    assert path.exists()


def test_a_bad_file_tells_which_one_it_is(store):
    put(store, chain(1))
    path = file_of(store, chain(1)[0])
    with open(path, "r+b") as file:
        file.write(bytes(4096))
    with pytest.raises(BlockFileError) as caught:
        files.open_block(store._root_fd, "", SPACE, chain(1)[0])
    assert caught.value.inode == (path.stat().st_dev, path.stat().st_ino)


def test_on_a_full_disk_others_leave_once(store, monkeypatch):
    put(store, chain(1))
    refuse(monkeypatch, "write", lambda _, data: len(data) == 4096, errno.ENOSPC, times=1)
    assert put(store, chain(2, 2)) == 2
    assert store.counters["evicted"] == 2
    assert check(store, chain(2, 2)) == 2
    assert check(store, chain(1)) == 6


def test_a_disk_that_stays_full_is_told_with_the_remedy(store, monkeypatch):
    put(store, chain(1))
    refuse(monkeypatch, "write", lambda _, data: len(data) == 4096, errno.ENOSPC)
    with pytest.raises(TierIOError, match="free space there") as caught:
        put(store, chain(2, 1))
    assert caught.value.errno == errno.ENOSPC
    assert check(store, chain(1)) == 7


def test_a_journal_that_the_disk_does_not_take_is_done_without(store, tmp_path, monkeypatch):
    put(store, chain(1))
    with open(store.root / "journal", "r+b") as journal:
        journal.truncate(77)
    with monkeypatch.context() as patch:
        refuse(patch, "rename", lambda source, *_: "journal" in source, errno.ENOSPC)
        assert store.stats().blocks == 8
        with BlockStore(tmp_path / "kv") as other:
            assert other.stats().blocks == 8
            assert put(other, chain(2)) == 8
        assert store.stats().blocks == 16
    assert not list(store.root.glob("*.tmp"))
    assert store.stats().blocks == 16
    assert (store.root / "journal").stat().st_size > 77


def test_gc_sweeps_journals_that_were_not_finished(store):
    (store.root / "journal.123.tmp").touch()
    assert store.gc()["unfinished"] == 1


def test_a_root_that_was_removed_is_an_empty_store(store):
    put(store, chain(1))
    shutil.rmtree(store.root)
    assert store.stats().blocks == 0
    assert check(store, chain(1)) == 0
    assert not store.pin(SPACE, chain(1)[0])
    with pytest.raises(TierIOError, match="make a new BlockStore"):
        put(store, chain(2))


def test_a_closed_store_says_so(store):
    store.close()
    assert store.find(SPACE, chain(1)) == []
    assert not store.is_wanted(SPACE, chain(1)[0])
    assert not store.publish(1, lambda: None)
    with pytest.raises(TierIOError, match="closed"):
        store.stats()


def test_a_folder_that_refuses_writes_is_read(tmp_path, monkeypatch, caplog):
    with BlockStore(tmp_path, capacity_bytes="10MiB") as store:
        put(store, chain(1))
    writes = os.O_WRONLY | os.O_RDWR
    refuse(monkeypatch, "open", lambda _, flags, *__: flags & writes, errno.EROFS)
    refuse(monkeypatch, "mkdir", lambda path, *_: "v1" in str(path), errno.EROFS)
    with BlockStore(tmp_path, capacity_bytes="10MiB") as store:
        assert "can only be read" in caplog.text
        assert check(store, chain(1)) == 8
        assert store.stats().blocks == 8
        assert not store.is_wanted(SPACE, chain(2)[0])
        assert put(store, chain(2)) == 0
        with pytest.raises(TierIOError, match="can only be read"):
            store.pin(SPACE, chain(1)[0])


def test_writes_are_tried_again_after_a_refusal(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(block_store, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch:
        refuse(patch, "open", lambda _, flags, *__: flags & os.O_WRONLY, errno.EROFS)
        store.publish(1, lambda: put(store, chain(1)))
        assert store.flush(10)
    assert not store.is_wanted(SPACE, chain(1)[0])
    now[0] += block_store.REFUSED_SECONDS + 1
    assert store.is_wanted(SPACE, chain(1)[0])
    assert put(store, chain(1)) == 8
