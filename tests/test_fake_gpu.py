"""Every line of the way of a GPU, on the CPU: torch's streams played, the CUDA core emulated."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import GPU, FakeEvent, FakeStream, fake_gpu
from test_generate_parity import SMALLEST, check_integrity, run, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

from hf_tiered_cache.devices import CudaDevice, cuda_lane
from hf_tiered_cache.devices.cuda_clock import CudaClock
from hf_tiered_cache.kernels import flash, ops
from hf_tiered_cache.kernels.loader import default_kernel
from hf_tiered_cache.transfers import DONE, last_of

BLOCK = 4096
RING = 2 * BLOCK
SIZES = {
    "host": {"host_bytes": 1000 * BLOCK, "disk_bytes": 0},
    "host and disk": {"host_bytes": 5 * BLOCK, "disk_bytes": 1000 * BLOCK},
    "disk": {"host_bytes": 0, "disk_bytes": 1000 * BLOCK},
}


@pytest.mark.parametrize(
    ("has_core", "sizes", "cpu_share"),
    [
        (True, "host", 0.5),
        (True, "host", "auto"),
        (True, "host and disk", 0),
        (True, "disk", "auto"),
        (False, "host", "auto"),
        (False, "host and disk", 0.5),
    ],
)
def test_tokens_are_those_of_a_dynamic_cache(make_cache, sizes, cpu_share, has_core):
    model = tiny_model("Llama")
    expected, reference = run(model, DynamicCache())
    with fake_gpu(has_core) as gpu:
        knobs = {**SIZES[sizes], "cpu_share": cpu_share, "staging_bytes": RING}
        cache = make_cache(model.config, SMALLEST[1], **knobs)
        tokens, logits = run(model, cache)
        assert torch.equal(tokens, expected)
        assert (logits - reference).abs().max() < 2e-4
        check_integrity(cache)
        stats = cache.stats()
        copy = stats.lanes[0]
        assert 0 < copy.moved_bytes <= stats.counters.loaded_bytes  # a disk read may be under way
        assert copy.busy_seconds > 0
        if has_core:
            cpu = stats.lanes[1]
            if cpu_share == 0:
                assert cpu.moved_bytes == 0
            elif sizes == "host" and cpu_share != "auto":
                assert cpu.moved_bytes > 0
            assert (copy.probed_rate > 0) == (cpu_share == "auto")
        else:
            assert len(stats.lanes) == 1
        cache.close()
        assert not gpu.pinning.pinned


@pytest.mark.parametrize("sizes", SIZES)
def test_nobody_holds_the_memory_of_a_closed_cache(make_cache, sizes):
    """Memory of a GPU goes when the last view of it has gone."""
    with fake_gpu() as gpu:
        model = tiny_model("Llama")
        cache = make_cache(model.config, SMALLEST[1], **SIZES[sizes], staging_bytes=RING)
        run(model, cache)
        (manager,) = cache._owned.pool.managers
        slab = StorageWeakRef(manager.device_tier.slab.untyped_storage())
        keys = cache.layers[0].keys
        cache.close()
        assert gpu.stream.seen[-1] == ("synchronize", None), "a user's stream may be attending"
        gpu.slabs.clear()
        assert slab.expired()
        assert keys.shape[1] == 2


def test_bits_do_not_depend_on_budgets_on_the_copy_lane(make_cache):
    model = tiny_model("GPT2")
    bits = None
    with fake_gpu():
        for device_blocks, host_blocks in ((64, 10), (SMALLEST[1] + 5, 9)):
            knobs = {"host_bytes": host_blocks * BLOCK, "cpu_share": 0, "staging_bytes": RING}
            cache = make_cache(model.config, device_blocks, **knobs)
            _, logits = run(model, cache)
            bits = logits if bits is None else bits
            assert torch.equal(logits, bits)
            cache.close()


@pytest.mark.parametrize("sizes", ["host", "disk"])
def test_chunks_are_what_flash_attention_takes(make_cache, monkeypatch, sizes):
    """Prefill goes to flash attention as on a GPU, whatever of the past is cold."""
    model = tiny_model("Llama")
    ids = torch.randint(2, 97, (1, 150), generator=torch.Generator().manual_seed(3))
    expected, _ = run(model, DynamicCache(), ids)
    calls = []
    whole = flash.attend_blocks

    def noted(state, query, view, call):
        calls.append((view.first_token, view.table.shape[1]))
        whole(state, query, view, call)

    monkeypatch.setattr(flash, "attend_blocks", noted)
    monkeypatch.setattr(
        ops,
        "_is_for_flash",
        lambda query, layout, call: not flash.not_supported_reasons(query, layout, call),
    )
    bits = None
    with fake_gpu() as gpu:
        gpu.group_columns = flash.group_columns
        for device_blocks in (200, 2 * 16 + 3):
            cache = make_cache(model.config, device_blocks, **SIZES[sizes], cpu_share=0)
            tokens, logits = run(model, cache, ids, prefill_chunk_size=50)
            assert torch.equal(tokens, expected)
            bits = logits if bits is None else bits
            assert torch.equal(logits, bits)
            assert (cache.stats().counters.cold_reads > 0) == (device_blocks < 200)
            cache.close()
    group = 16 * 4
    assert {first % group for first, _ in calls} == {0}
    assert len({first for first, _ in calls}) > 1


def refusing(*_: object) -> None:
    raise RuntimeError("planted: not supported")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"write_flag": lambda *_: None}, "not raised within 0.01 s"),
        ({"write_flag": refusing}, "planted: not supported"),
        ({"wait_flag": refusing}, "planted: not supported"),
        ({}, ""),
    ],
)
def test_a_device_that_refuses_flags_has_no_cpu_lane_and_says_so_once(
    told_by, monkeypatch, broken, said
):
    told, device = told_by("devices.cuda"), SimpleNamespace(torch_device=torch.device("cuda", 0))
    with fake_gpu() as gpu:
        for name, function in broken.items():
            monkeypatch.setattr(gpu.module.module, name, function)
        monkeypatch.setattr(cuda_lane, "TRY_SECONDS", 0.01)
        with ops.use_kernel(default_kernel()):
            lane = CudaDevice._in_place(device, gpu.module)
    assert (lane is None) == bool(said)
    assert len(told) == bool(said)
    assert not said or said in told[0]


def test_loads_come_behind_the_marks_and_the_stream_waits_for_them():
    with fake_gpu() as gpu:
        lane = gpu.make_lane()
        device, host = torch.zeros(2, BLOCK, dtype=torch.uint8), torch.ones(2, BLOCK).byte()
        gpu.slabs.append(device)
        lane.mark().hold_loads()
        marked = gpu.stream.seen[-1][1]
        assert lane._loads.seen == [("wait", marked)]
        transfer = lane.load(list(host), list(device))
        assert torch.equal(device, host)
        transfer._end.at = None  # the copy is not done yet
        assert not transfer.is_ready()
        transfer._end.at = ended = next(FakeEvent.clock)
        transfer._is_ready, query = False, FakeEvent.query
        FakeEvent.query = lambda event: event is not transfer._end and query(event)
        try:
            transfer.hold_device()
        finally:
            FakeEvent.query = query
        assert ("wait", ended) in gpu.stream.seen
        assert lane.measure().moved_bytes == 2 * BLOCK
        assert lane.measure().wait_seconds > 0


def test_stores_come_behind_what_the_current_stream_was_given():
    with fake_gpu() as gpu:
        lane = gpu.make_lane()
        device, host = torch.ones(3, BLOCK).byte(), torch.zeros(3, BLOCK, dtype=torch.uint8)
        lane.store(list(device), list(host), is_pinned=False).wait()
        assert torch.equal(device, host)
        assert lane._stores.seen[0] == ("wait", gpu.stream.seen[-1][1])
        lane.settle()
        assert ("synchronize", None) in lane._stores.seen
        assert ("synchronize", None) in lane._loads.seen


def test_a_clock_adds_up_what_has_passed():
    clock, stream = CudaClock(), FakeStream(GPU)
    with fake_gpu():
        for _ in range(3):
            clock.end(clock.begin(stream), stream)
        late = clock.begin(stream)
        clock.end(late, stream).at = None
        assert clock.seconds() == pytest.approx(3 / 1000)


def test_of_copies_in_one_direction_only_the_last_is_waited_for():
    with fake_gpu() as gpu:
        lane, other = gpu.make_lane(), gpu.make_lane()
        blocks, host = torch.ones(3, BLOCK).byte(), torch.zeros(3, BLOCK, dtype=torch.uint8)
        loads = [lane.load([host[i]], [blocks[i]]) for i in range(3)]
        store = lane.store([blocks[0]], [host[0]])
        elsewhere = other.load([host[0]], [blocks[0]])
        assert last_of(loads) == [loads[2]]
        assert last_of(loads[::-1]) == loads  # they are told in the order of their use
        assert last_of([loads[2], store, elsewhere]) == [elsewhere, store, loads[2]]
        assert last_of([DONE, loads[0], DONE]) == [DONE, loads[0]]


def test_loads_wait_once_for_a_mark_and_for_every_mark():
    with fake_gpu() as gpu:
        lane = gpu.make_lane()
        marks = [lane.mark(), lane.mark()]
        for mark in [*marks, *marks]:
            mark.hold_loads()
        moments = [at for what, at in gpu.stream.seen if what == "record"]
        assert lane._loads.seen == [("wait", at) for at in moments]
