"""What goes wrong around a store stays there: `generate` goes on, and nothing is left behind."""

import copy
import errno
import gc
import os
import shutil
import threading

import pytest
import torch
from test_restore import forward, make_model, new_cache, prompt, published

from hf_tiered_cache import BlockStore, TierIOError, reuse
from hf_tiered_cache.store import files
from hf_tiered_cache.store.files import OpenBlock
from hf_tiered_cache.tiers.disk import store_tier
from hf_tiered_cache.tiers.disk.movers import make_mover

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_forks_of_a_root_let_go_of_the_files_they_restored(model, store):
    published(model, store, prompt(256))
    root = new_cache(model, store)
    gc.collect()
    before = OpenBlock.num_open
    for _ in range(4):
        fork = copy.deepcopy(root)
        assert fork.restore(prompt(256), model) == 240
        assert OpenBlock.num_open == before + 15
        fork.reset()
        assert OpenBlock.num_open == before
        fork.close()


def test_a_file_stays_open_as_long_as_one_slot_of_its_span_is_held(model, store):
    published(model, store, prompt(256))
    cache, expected = new_cache(model, store), new_cache(model, store)
    before = OpenBlock.num_open
    assert cache.restore(prompt(256), model) == 240
    cache.crop(-200)
    forward(model, expected, prompt(256)[:, :40])
    rest = prompt(256)[:, 40:]
    assert torch.allclose(forward(model, cache, rest), forward(model, expected, rest), atol=1e-5)
    cache.reset()
    assert OpenBlock.num_open == before


def fail_reads(monkeypatch, path, code):
    """Let every read of that file's bytes fail; how often that came."""
    failed, inode, real = [], path.stat().st_ino, os.preadv

    def preadv(fd, *args):
        if os.fstat(fd).st_ino == inode:
            failed.append(fd)
            raise OSError(code, os.strerror(code))
        return real(fd, *args)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(store_tier, "make_mover", lambda _, n: make_mover("python", n))
    return failed


def block_files(store):
    return sorted(store.root.glob("v1/*/??/??/*.htc"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("may_move", [True, False])
def test_a_block_that_cannot_be_read_is_computed_anew(
    code, is_given, may_move, model, store, monkeypatch
):
    expected = model.generate(prompt(150), **GREEDY)
    published(model, store, prompt(150))
    (bad,) = (it.key for it in store.ls() if it.number == 4)
    failed = fail_reads(monkeypatch, next(store.root.glob(f"v1/*/??/??/{bad}.htc")), code)
    if not may_move:
        monkeypatch.setattr(os, "rename", refusing(os.rename, "v1", code))
    given = {"past_key_values": new_cache(model, store)} if is_given else {}
    with reuse(model, store, block_tokens=16):
        assert torch.equal(model.generate(prompt(150), **GREEDY, **given), expected)
        assert store.counters["recomputed"] == 1
        again = len(failed)
        assert torch.equal(model.generate(prompt(150), **GREEDY), expected)
    assert len(failed) == again
    assert store.counters["recomputed"] == 1


def test_what_says_nothing_of_the_file_puts_no_block_away(model, store, monkeypatch):
    published(model, store, prompt(150))
    fail_reads(monkeypatch, block_files(store)[3], errno.ENOMEM)
    cache = new_cache(model, store)
    assert cache.restore(prompt(150), model) == 144
    with pytest.raises(TierIOError):
        forward(model, cache, prompt(150)[:, 144:])
    assert store.counters["quarantined"] == 0
    assert new_cache(model, store).restore(prompt(150), model) == 144


def test_a_good_block_that_was_stored_anew_is_not_put_away(model, store):
    published(model, store, prompt(32))
    listed = next(iter(store.ls()))
    space, key = bytes.fromhex(listed.space), bytes.fromhex(listed.key)
    held = store.open(space, key)
    path = store.root / files.relative_path(space, key)
    copied = path.read_bytes()
    path.rename(store.root / "kept")  # somebody else put it away
    path.write_bytes(copied)
    path.chmod(0o600)
    store.put_away(held, "a test")
    assert path.exists()
    held.close()


@pytest.mark.parametrize("trouble", ["closed", "removed", "refused"])
def test_generate_goes_on_without_its_store(trouble, model, store, monkeypatch):
    expected = model.generate(prompt(60), **GREEDY)
    published(model, store, prompt(48))
    if trouble == "closed":
        store.close()
    elif trouble == "removed":
        shutil.rmtree(store.root)
    else:
        monkeypatch.setattr(os, "stat", refusing(os.stat, "v1"))
    with reuse(model, store, block_tokens=16):
        assert torch.equal(model.generate(prompt(60), **GREEDY), expected)
    store.flush(10)
    if trouble == "removed":
        assert store.stats().blocks == 0
        assert store.counters["publish_errors"] == 1
    elif trouble == "closed":
        with pytest.raises(TierIOError, match="make a new BlockStore"):
            store.stats()


def refusing(real, part, code=errno.EIO):
    def call(path, *args, **kwargs):
        if isinstance(path, str) and path.startswith(part):
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    return call


def test_queued_publications_give_way_to_a_forward(model, store):
    gate = threading.Event()
    store.publish(1, lambda: gate.wait(20))
    cache = new_cache(model, store, device_bytes="144KiB", staging_bytes="16KiB", disk_bytes=0)
    forward(model, cache, prompt(120))
    assert cache.publish() == 7
    cache.reset()
    forward(model, cache, prompt(120, seed=3))
    assert cache.publish() == 7
    gate.set()
    assert store.flush(10)
    assert store.stats().blocks == 7


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {}])
def test_every_block_is_queued_once(way, model, store):
    gate, num_bytes = threading.Event(), []
    store.publish(1, lambda: gate.wait(20))
    real = store.publish
    store.publish = lambda size, *args, **kw: num_bytes.append(size) or real(size, *args, **kw)
    with reuse(model, store, block_tokens=16):
        model.generate(prompt(200), do_sample=False, max_new_tokens=30, **way)
        model.generate(prompt(200), do_sample=False, max_new_tokens=30, **way)
    gate.set()
    assert store.flush(20)
    extents = store.stats().used_bytes - 2 * 4096 * store.stats().blocks
    assert sum(num_bytes) == extents
    assert store.counters["put"] == store.stats().blocks


def test_one_request_is_not_seen_twice(model, tmp_path):
    with BlockStore(tmp_path, capacity_bytes="10MiB", ingest="hot") as store:
        with reuse(model, store, block_tokens=16):
            model.generate(prompt(60), max_new_tokens=3, do_sample=True, num_return_sequences=2)
            assert store.flush(10)
            assert store.stats().blocks == 0
            model.generate(prompt(60), max_new_tokens=3)
        assert store.flush(10)
        assert store.stats().blocks == 3
