"""A trace tells the truth: spans lie where things happened, nest, and are as many as counted."""

import errno
import json
from time import perf_counter, sleep

import pytest
import torch
from test_generate_parity import SMALLEST, run, tiny_model
from test_late_device import RING, SIZES, Late

import hf_tiered_cache
from hf_tiered_cache.blocks import assembly
from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.observe import tracing
from hf_tiered_cache.tiers.disk import DiskTier
from hf_tiered_cache.tiers.disk.block_file import BlockFile
from hf_tiered_cache.tiers.disk.movers import moving_core

READ_SECONDS = 0.02
SOON = 0.015  # what a busy machine may add


class SlowFile(BlockFile):
    """Every read takes its time."""

    def pread_into(self, buffers, offset, *, direct):
        sleep(READ_SECONDS)
        return super().pread_into(buffers, offset, direct=direct)


class SlowDisk(DiskTier):
    """A disk tier on a slow link, moved by Python's threads."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, open_file=SlowFile)


class BrokenDisk(DiskTier):
    """A disk tier whose reads fail."""

    class File(BlockFile):
        def pread_into(self, buffers, offset, *, direct):
            raise OSError(errno.EIO, "broken")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, open_file=self.File)


def generate(make_cache, **knobs):
    """A short generate through the smallest budget, recorded; (trace, counters)."""
    model = tiny_model("Llama")
    with make_cache(model.config, SMALLEST[1], **knobs) as cache, tracing.trace() as recorded:
        run(model, cache)
        counters = cache.stats().counters
    return recorded, counters


def test_transfers_are_as_many_as_were_counted_and_lie_where_they_belong(make_cache):
    recorded, counters = generate(make_cache)
    assert counters.loads > 100 and counters.stores > 10
    assert sum(span.num_blocks for span in recorded.loads) == counters.loads
    assert sum(span.num_bytes for span in recorded.loads) == counters.loaded_bytes
    assert sum(span.num_blocks for span in recorded.stores) == counters.stores
    assert sum(span.num_bytes for span in recorded.stores) == counters.stored_bytes
    assert {span.tier for span in recorded.transfers} == {"disk"}
    assert {layer for span in recorded.loads for layer in span.layers} == {0, 1, 2}
    for span in recorded.transfers:
        assert recorded.start <= span.issued <= span.began <= span.ended <= recorded.end


def test_every_rung_of_a_chain_is_named(make_cache):
    recorded, counters = generate(make_cache, host_bytes=6 * 4096)
    by_tier = dict.fromkeys(("host", "disk"), 0)
    for span in recorded.stores:
        by_tier[span.tier] += span.num_blocks
    assert by_tier["host"] > by_tier["disk"] > 0
    assert sum(by_tier.values()) == counters.stores
    assert sum(span.num_blocks for span in recorded.loads) == counters.loads
    # Copies into memory are made on the spot; and the CPU attends them there, without a load.
    assert all(span.is_inline == (span.tier == "host") for span in recorded.stores)
    assert {span.tier for span in recorded.loads} == {"disk"}
    assert counters.in_place_reads > 0


def test_a_device_whose_copies_tell_no_times_is_not_said_to_hide_them(make_cache):
    """Behind a copy lane a load has ended when somebody sees it; that proves no overlap."""
    with Late(seed=3):
        knobs = {**SIZES["host and disk"], "staging_bytes": RING, "cpu_share": 0}
        recorded, counters = generate(make_cache, **knobs)
    assert sum(span.num_blocks for span in recorded.loads) == counters.loads > 0
    assert sum(span.num_blocks for span in recorded.stores) == counters.stores > 0
    assert not all(span.is_timed for span in recorded.loads)  # but for those under way at the end
    assert recorded.hidden_load_seconds() is None
    assert "did not say when" in str(recorded)


def test_waits_are_those_of_the_counters(make_cache, monkeypatch):
    monkeypatch.setattr(assembly, "DiskTier", SlowDisk)
    recorded, counters = generate(make_cache)
    assert counters.load_wait_seconds > 5 * READ_SECONDS
    waited = recorded.seconds(tracing.LOAD_WAIT)
    assert waited == pytest.approx(counters.load_wait_seconds, rel=0.05, abs=0.005)
    assert recorded.hidden_load_seconds() < recorded.seconds(tracing.LOAD)


def decode(cache, module, compute, steps: int) -> None:
    """Two layers of "a model": append, attend, then `compute` something else."""
    for _ in range(steps):
        for layer in range(2):
            keys, values = torch.randn(2, 1, 2, 1, 16).unbind(0)
            handles = cache.update(keys, values, layer)
            query = torch.randn(1, 2, 1, 16)
            hf_tiered_cache.tiered_attention_forward(module, query, *handles, None, scaling=0.25)
            compute()


@pytest.fixture
def filled(make_cache):
    """Makes a cache of two layers with 10 blocks each, of which all but the filling ones are cold;
    staging holds all of them."""

    def make(**knobs):
        cache = make_cache(None, 24, staging_bytes=20 * 4096, block_tokens=16, **knobs)
        for layer in range(2):
            cache.update(*torch.randn(2, 1, 2, 10 * 16, 16).unbind(0), layer)
        return cache

    return make


@pytest.fixture
def module():
    made = torch.nn.Module().eval()
    made.is_causal, made.num_key_value_groups = True, 1
    return made


def test_loads_of_a_slow_link_are_seen_beside_compute(filled, module, monkeypatch):
    """Each read takes 20 ms; while the model computes for 60 ms after a layer, the reads of the
    next one go on. They end during compute, long before anybody looks."""
    monkeypatch.setattr(assembly, "DiskTier", SlowDisk)
    cache = filled()
    with tracing.trace() as recorded:

        def compute() -> None:
            with recorded.span("compute"):
                sleep(3 * READ_SECONDS)

        decode(cache, module, compute, steps=3)
    computing = [span for span in recorded.spans if span.name == "compute"]
    assert len(computing) == 6
    beside = 0
    for load in recorded.loads:
        assert load.ended - load.began >= READ_SECONDS
        beside += any(
            load.ended < one.end and load.ended - max(one.start, load.began) > READ_SECONDS / 2
            for one in computing
        )
    assert beside >= 5
    assert recorded.hidden_load_seconds() >= 4 * READ_SECONDS
    assert "hidden behind compute" in str(recorded)


@pytest.mark.skipif(moving_core() is None, reason="the compiled core was not built")
def test_the_compiled_movers_spans_end_when_bytes_came_not_when_somebody_looked(filled, module):
    cache = filled(disk_io="buffered")
    seen: list[float] = []
    with tracing.trace() as recorded:

        def compute() -> None:
            seen.append(perf_counter())
            sleep(0.1)

        decode(cache, module, compute, steps=2)
    ahead = [
        load for load in recorded.loads if any(0 <= start - load.issued < 0.05 for start in seen)
    ]
    assert ahead, "loads were issued ahead of the sleep"
    for load in ahead:
        start = min(start for start in seen if start >= load.issued)
        assert load.ended < start + 0.08, "it ended while the main thread slept"


def chrome_rows(recorded) -> dict[str, list[dict]]:
    """Events by the name of their row, as a reader of the file finds them."""
    events = json.loads(json.dumps(recorded.chrome()))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows: dict[str, list[dict]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            rows[names[event["tid"]]].append(event)
    return rows


def test_the_file_nests_on_every_row(make_cache, tmp_path):
    path = tmp_path / "run.json"
    model = tiny_model("Llama")
    with (
        make_cache(model.config, SMALLEST[1]) as cache,
        hf_tiered_cache.trace(path) as recorded,
        recorded.span("generate"),
    ):
        run(model, cache)
    assert json.loads(path.read_text()) == json.loads(json.dumps(recorded.chrome()))
    rows = chrome_rows(recorded)
    assert {"compute", "load disk 1", "store disk 1"} <= set(rows)
    for events in rows.values():
        open_ends: list[float] = []
        for event in events:
            start, end = event["ts"], event["ts"] + event["dur"]
            assert start >= 0 and event["dur"] >= 0
            while open_ends and open_ends[-1] <= start + 1e-6:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-6, "it ends before what it is in"
            open_ends.append(end)
    names = {event["name"] for event in rows["compute"]}
    assert {"generate", "attention", "attend", "merge"} <= names
    attend = next(event for event in rows["compute"] if event["name"] == "attend")
    assert attend["args"] == {"layer": 0, "blocks": attend["args"]["blocks"]}


def test_nothing_is_recorded_after_the_end_and_an_exception_still_leaves_a_file(
    make_cache, tmp_path, monkeypatch
):
    path = tmp_path / "run.json"
    monkeypatch.setattr(assembly, "DiskTier", BrokenDisk)
    model = tiny_model("Llama")
    cache = make_cache(model.config, SMALLEST[1])
    with pytest.raises(TierIOError), hf_tiered_cache.trace(path) as recorded:
        run(model, cache)
    assert tracing.recorder is None
    assert json.loads(path.read_text())["traceEvents"]
    number = len(recorded.spans), len(recorded.transfers)
    monkeypatch.undo()
    run(model, make_cache(model.config, SMALLEST[1]))
    assert (len(recorded.spans), len(recorded.transfers)) == number


def test_one_trace_at_a_time_and_a_path_that_can_be_written(tmp_path):
    with hf_tiered_cache.trace(), pytest.raises(ConfigError, match="recorded already"):
        hf_tiered_cache.trace().__enter__()
    with pytest.raises(ConfigError, match=r"no/run\.json.* cannot be written"):
        hf_tiered_cache.trace(tmp_path / "no" / "run.json").__enter__()
    assert tracing.recorder is None


def test_a_trace_is_bounded(make_cache, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_EVENTS", 50)
    recorded, _ = generate(make_cache)
    assert len(recorded.spans) + len(recorded.transfers) == 50
    assert recorded.num_dropped > 100
    assert f"{recorded.num_dropped:,} more events were left out" in str(recorded)


def test_times_of_spans_are_joined_and_taken_away():
    union = tracing._union([(4, 5), (0, 2), (1, 3), (5, 6)])
    assert union == [(0, 3), (4, 6)]
    assert tracing._without(union, [(1, 2), (2.5, 4.5), (5, 9)]) == [(0, 1), (2, 2.5), (4.5, 5)]
    assert tracing._without(union, []) == union
    assert tracing._length(union) == 5
