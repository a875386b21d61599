"""Blocks are read without the lock: forks of a prompt side by side, and what waits for whom."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import BLOCK_TOKENS, Shadowed, chunks, make_manager
from test_generate_parity import SMALLEST, check_integrity, prompt, run, tiny_model
from transformers import DynamicCache

from hf_tiered_cache import ClosedCacheError, TieredCache
from hf_tiered_cache.errors import OutOfBlocksError
from hf_tiered_cache.kernels import ops

THREADS = 3
SOON = 30  # seconds, for what takes none


@pytest.fixture
def stopped_kernels(monkeypatch):
    """(a kernel has begun, let kernels go on): attention over one chunk stands still between, once
    `go_on` is cleared."""
    begun, go_on = threading.Event(), threading.Event()
    go_on.set()
    attend_blocks = ops.attend_blocks

    def stand_still(*arguments):
        begun.set()
        assert go_on.wait(SOON)
        return attend_blocks(*arguments)

    monkeypatch.setattr(ops, "attend_blocks", stand_still)
    yield begun, go_on
    go_on.set()


def prefilled(make_cache, device_blocks: int) -> TieredCache:
    """A cache behind the prompt, part of it cold."""
    model = tiny_model("Llama")
    cache = make_cache(model.config, device_blocks, disk_bytes="1MiB")
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    return cache


def attend(cache: TieredCache) -> None:
    """One more token."""
    with torch.no_grad():
        tiny_model("Llama")(torch.tensor([[5]]), past_key_values=cache)


def test_forks_of_a_prompt_decode_side_by_side(make_cache, one_thread):
    """Each with tokens of its own, over one ring and the same blocks, all of which move."""
    model = tiny_model("Llama")
    ids = prompt()
    beginnings = [torch.cat((ids, torch.tensor([[7 + i, 3, 11]])), 1) for i in range(THREADS)]
    expected = [run(model, DynamicCache(), one)[0] for one in beginnings]
    for place in ({"host_bytes": 0}, {"host_bytes": 6 * 4096}, {"host_bytes": "1MiB"}):
        cache = make_cache(model.config, SMALLEST[1] + 2 * THREADS * 3, **place)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        together = threading.Barrier(THREADS)
        forks = [copy.deepcopy(cache) for _ in range(THREADS)]

        def decode(index: int, forks=forks, together=together) -> torch.Tensor:
            beginning, wanted = beginnings[index], expected[index]
            together.wait(SOON)
            return model.generate(
                beginning,
                attention_mask=torch.ones_like(beginning),
                past_key_values=forks[index],
                max_new_tokens=wanted.shape[1] - beginning.shape[1],
                do_sample=False,
            )

        with ThreadPoolExecutor(THREADS) as pool:
            tokens = list(pool.map(decode, range(THREADS)))
        for got, wanted in zip(tokens, expected, strict=True):
            assert torch.equal(got, wanted), place
        counters = cache.stats().counters
        assert counters.cold_reads + counters.in_place_reads > 0
        check_integrity(cache)
        cache.close()


def test_nobody_waits_for_a_kernel(make_cache, stopped_kernels):
    """While one fork attends, the others' figures can be read and another one goes on."""
    cache = prefilled(make_cache, SMALLEST[1] + 8)
    begun, go_on = stopped_kernels
    begun.clear()
    go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        attending = pool.submit(attend, copy.deepcopy(cache))
        assert begun.wait(SOON)
        stats = pool.submit(cache.stats).result(timeout=SOON)
        assert stats.num_tokens == prompt().shape[1]
        keys, values = torch.randn(2, 1, 2, 1, 8).unbind(0)
        pool.submit(cache.update, keys, values, 0).result(timeout=SOON)
        assert not attending.done()
        go_on.set()
        attending.result(timeout=SOON)
    check_integrity(cache)


def test_room_is_made_of_what_nobody_reads_and_else_the_reader_is_waited_for(tmp_path):
    """One layer: its blocks may not go while they are read."""
    manager = make_manager(tmp_path, device_blocks=1 + 4 + 2)
    layer = Shadowed.new(manager)
    layer.append(4 * BLOCK_TOKENS)
    read, appended = threading.Event(), threading.Event()

    def read_slowly() -> None:
        reading = chunks(manager, layer.table, [layer.table])
        next(reading)
        read.set()
        assert not appended.wait(0.3), "a block went while it was read"
        reading.close()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_slowly)
        assert read.wait(SOON)
        with manager.lock:
            layer.append(3 * BLOCK_TOKENS)
        appended.set()
        reading.result(timeout=SOON)
    layer.check()
    manager.check_integrity()


def test_who_appends_in_the_midst_of_a_reading_of_his_own_is_told(tmp_path):
    """Nobody could ever give the room: an error and no standstill."""
    manager = make_manager(tmp_path, device_blocks=1 + 4 + 2)
    layer = Shadowed.new(manager)
    layer.append(4 * BLOCK_TOKENS)
    reading = chunks(manager, layer.table, [layer.table])
    next(reading)
    with pytest.raises(OutOfBlocksError):
        layer.append(3 * BLOCK_TOKENS)
    reading.close()
    layer.check()
    layer.append(3 * BLOCK_TOKENS)
    layer.check()
    manager.check_integrity()


def test_what_one_reader_attends_in_staging_no_other_takes(tmp_path):
    """Two layers over a ring of two slots: the second reader waits for the first."""
    manager = make_manager(tmp_path, device_blocks=2 + 2, staging=2)
    layers = [Shadowed.new(manager, layer) for layer in range(2)]
    for _ in range(6):
        for layer in layers:
            layer.append(BLOCK_TOKENS)

    def read_often(layer: Shadowed) -> None:
        for _ in range(30):
            layer.check([one.table for one in layers])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read_often, layer) for layer in layers * 2]:
            done.result(timeout=SOON)
    manager.check_integrity()


def test_a_table_changes_only_behind_its_readers(tmp_path):
    """Tokens cut, rows repeated, a table dropped: the reader gets what it began with, whole."""
    manager = make_manager(tmp_path, device_blocks=2 + 4, staging=2)
    kept, layer = Shadowed.new(manager), Shadowed.new(manager, 1)
    layer.append(9 * BLOCK_TOKENS)
    kept.append(3)
    for change in ("truncate", "select_rows", "abandon"):
        keys = layer.keys
        read, go_on = threading.Event(), threading.Event()

        def read_slowly(read=read, go_on=go_on) -> list[int]:
            seen = []
            for chunk in chunks(manager, layer.table, [layer.table]):
                seen += [chunk.first] * chunk.slots.shape[1]
                read.set()
                assert go_on.wait(SOON)
            return seen

        def change_it(change=change) -> None:
            with manager.lock:
                if change == "truncate":
                    layer.truncate(7 * BLOCK_TOKENS + 1)
                elif change == "select_rows":
                    layer.select_rows([0, 0])
                else:
                    manager.abandon_table(layer.table)
                    kept.append(1)

        with ThreadPoolExecutor(2) as pool:
            reading = pool.submit(read_slowly)
            assert read.wait(SOON)
            changing = pool.submit(change_it)
            threading.Event().wait(0.2)
            assert changing.done() == (change == "abandon"), "it is only put on a list"
            assert layer.table.num_tokens == keys.shape[2]
            go_on.set()
            assert len(reading.result(timeout=SOON)) == -(-keys.shape[2] // BLOCK_TOKENS)
            changing.result(timeout=SOON)
        if change != "abandon":
            layer.check()
        manager.check_integrity()
    kept.append(1)
    assert not layer.table.rows
    kept.check()


def test_staging_changes_its_size_behind_all_readers(tmp_path):
    """A plan that is being read goes by the size of the ring."""
    manager = make_manager(tmp_path, device_blocks=11, staging=8)
    layer = Shadowed.new(manager)
    layer.append(30 * BLOCK_TOKENS)
    staging = manager.num_staging_slots
    read, go_on = threading.Event(), threading.Event()

    def read_slowly() -> None:
        for _ in chunks(manager, layer.table, [layer.table]):
            read.set()
            assert go_on.wait(SOON)

    def widen() -> Shadowed:
        with manager.lock:
            wide = Shadowed.new(manager, 1, batch=2)
            wide.append(1)
        return wide

    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read_slowly)
        assert read.wait(SOON)
        widening = pool.submit(widen)
        threading.Event().wait(0.2)
        assert manager.num_staging_slots == staging
        go_on.set()
        reading.result(timeout=SOON)
        widening.result(timeout=SOON).check()
    assert manager.num_staging_slots < staging
    layer.check()
    manager.check_integrity()


def test_a_cache_that_is_closed_while_it_is_read_tells_the_reader(make_cache, stopped_kernels):
    cache = prefilled(make_cache, SMALLEST[1])
    begun, go_on = stopped_kernels
    begun.clear()
    go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        attending = pool.submit(attend, cache)
        assert begun.wait(SOON)
        (manager,) = cache._owned.pool.managers
        manager.close()
        go_on.set()
        with pytest.raises(ClosedCacheError):
            attending.result(timeout=SOON)


def test_books_that_an_interrupt_tore_are_mended_behind_the_readers(tmp_path):
    """The reader's staged blocks stay until they are attended; then the ring begins anew."""
    manager = make_manager(tmp_path, device_blocks=2 + 2, staging=2)
    layers = [Shadowed.new(manager, layer) for layer in range(2)]
    for _ in range(6):
        for layer in layers:
            layer.append(BLOCK_TOKENS)
    read, torn = threading.Event(), threading.Event()

    def read_slowly() -> None:
        reading = chunks(manager, layers[0].table, [layer.table for layer in layers])
        chunk = next(reading)
        staged = manager.device_tier.slab[chunk.slots.flatten().long()].clone()
        read.set()
        assert torn.wait(SOON)
        threading.Event().wait(0.2)  # the other one wants to mend now
        assert torch.equal(manager.device_tier.slab[chunk.slots.flatten().long()], staged)
        list(reading)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_slowly)
        assert read.wait(SOON)
        with manager.lock, pytest.raises(KeyboardInterrupt), manager.blocks.changing:
            raise KeyboardInterrupt
        torn.set()
        with manager.lock:
            layers[1].append(1)
        reading.result(timeout=SOON)
    for layer in layers:
        layer.check()
    manager.check_integrity()
