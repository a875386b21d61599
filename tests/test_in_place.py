"""In-place attention: a compiled thread attends host blocks when a flag says so."""

import gc
import threading
import time
from itertools import pairwise

import pytest
import torch

from hf_tiered_cache.devices.in_place import MAX_ROWS, InPlaceAttention
from hf_tiered_cache.errors import ClosedCacheError, TierIOError, UnsupportedInputError
from hf_tiered_cache.kernels import ops, worker
from hf_tiered_cache.kernels.worker import AttentionWorker, attention_rate
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.observe.metrics import LaneCounters

LAYOUT = BlockLayout(kv_heads=2, key_dim=64, value_dim=32, block_tokens=16, dtype=torch.float32)
BLOCKS, TOKENS = 6, 90
CALL = ops.AttentionCall(kv_tokens=TOKENS, query_start=TOKENS - 1, scale=0.1)


class Flags:
    """A device that does what it is given at once, unless it is told to hold its flags back."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] | None = None
        self.words: dict[int, torch.Tensor] = {}

    def mailbox(self, num_bytes: int) -> torch.Tensor:
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        if num_bytes == 8:
            words = memory.view(torch.int32)
            self.words = {words[i].data_ptr(): words[i] for i in range(2)}
        return memory

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def raise_flag(self, address: int, value: int) -> None:
        if self.held is None:
            self.words[address].fill_(value)
        else:
            self.held.append((address, value))

    def release(self) -> None:
        held, self.held = self.held, None
        for address, value in held:
            self.raise_flag(address, value)

    def wait_for_flag(self, address: int, value: int) -> None:
        while int(self.words[address]) != value:
            time.sleep(0)

    def wait_seconds(self) -> float:
        return 0.5


@pytest.fixture
def flags():
    return Flags()


@pytest.fixture
def lane(flags):
    lane = InPlaceAttention(flags)
    yield lane
    if flags.held is not None:
        flags.release()
    lane.close()


@pytest.fixture
def blocks():
    memory = torch.randn(BLOCKS + 2, LAYOUT.num_bytes // 4, generator=torch.Generator())
    return memory.view(torch.uint8)


def query(rows: int = 2, queries: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, rows * LAYOUT.kv_heads, queries, LAYOUT.key_dim, generator=generator)


def views(blocks: torch.Tensor, *borders: int) -> list[ops.BlockView]:
    """The table 3, 1, 5, 0, 2, 4 cut at borders."""
    table = torch.tensor([[3, 1, 5, 0, 2, 4]], dtype=torch.int32)
    cuts = [0, *borders, BLOCKS]
    return [
        ops.BlockView(blocks, table[:, first:last], LAYOUT, first * LAYOUT.block_tokens)
        for first, last in pairwise(cuts)
    ]


def attended(one: torch.Tensor, parts: list[ops.BlockView]) -> ops.RunningState:
    state = ops.RunningState.begin(one, LAYOUT.value_dim)
    for part in parts:
        ops.attend_blocks(state, one, part, CALL)
    return state


def assert_same_bits(a: ops.RunningState, b: ops.RunningState) -> None:
    for one, other in ((a.acc, b.acc), (a.max, b.max), (a.sum, b.sum)):
        assert torch.equal(one, other)


def test_the_state_is_that_of_the_kernel_and_joins_the_devices(lane, blocks):
    parts = views(blocks, 2, 4)
    for seed in range(5):
        one = query(queries=2, seed=seed)
        lane.begin(one, parts[:2], CALL)
        state = attended(one, parts[2:])
        lane.join(state)
        expected = attended(one, parts[2:])
        ops.join_states(expected, attended(one, parts[:2]))
        assert_same_bits(state, expected)
        whole = ops.finish_attention(attended(one, parts)).out
        torch.testing.assert_close(ops.finish_attention(state).out, whole)


def test_two_processors_are_left_to_others(monkeypatch):
    """The lane's threads are pinned; who gives the device its work must not share one."""
    for processors, threads, expected in ((16, 16, 14), (16, 8, 8), (2, 2, 1), (1, 1, 1)):
        monkeypatch.setattr(worker, "num_processors", lambda number=processors: number)
        monkeypatch.setattr(torch, "get_num_threads", lambda number=threads: number)
        assert AttentionWorker().num_threads == expected


def test_nothing_is_attended_before_the_query_is_there(lane, flags, blocks):
    flags.held = []
    transfer = lane.begin(query(), views(blocks), CALL)
    time.sleep(0.02)
    assert not transfer.is_ready()
    flags.release()
    transfer.wait()
    assert transfer.is_ready()


def test_batches_of_other_sizes_get_another_mailbox(lane, blocks):
    for rows, queries in ((1, 1), (4, 3), (2, 1), (4, 4)):
        one = query(rows, queries)
        lane.begin(one, views(blocks, 3), CALL)
        state = ops.RunningState.begin(one, LAYOUT.value_dim)
        lane.join(state)
        expected = ops.RunningState.begin(one, LAYOUT.value_dim)
        ops.join_states(expected, attended(one, views(blocks)))
        assert_same_bits(state, expected)


def test_a_step_that_failed_before_it_joined_leaves_the_lane_usable(lane, blocks):
    lane.begin(query(seed=1), views(blocks), CALL)
    one = query(seed=2)
    lane.begin(one, views(blocks), CALL)
    state = ops.RunningState.begin(one, LAYOUT.value_dim)
    lane.join(state)
    torch.testing.assert_close(
        ops.finish_attention(state).out, ops.finish_attention(attended(one, views(blocks))).out
    )


def test_a_slot_outside_the_slab_is_refused_before_anything_is_begun(lane, blocks):
    table = torch.tensor([[0, 99]], dtype=torch.int32)
    view = ops.BlockView(blocks, table, LAYOUT)
    with pytest.raises(UnsupportedInputError, match="99"):
        lane.begin(query(), [view], CALL)
    one = query()
    lane.begin(one, views(blocks), CALL)
    lane.join(ops.RunningState.begin(one, LAYOUT.value_dim))


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("starts", torch.zeros(1, dtype=torch.int32)),
        ("mask", torch.zeros(1, 1, 1, TOKENS, dtype=torch.bool)),
        ("bias", torch.zeros(1, 1, 1, TOKENS)),
    ],
)
def test_a_fact_that_its_thread_does_not_know_is_refused_before_anything_is_begun(
    lane, flags, blocks, name, fact
):
    call = CALL._replace(**{name: fact})
    with pytest.raises(UnsupportedInputError, match=f"CPU's thread: got {name}, expected"):
        lane.begin(query(), views(blocks), call)
    assert not any(int(word) for word in flags.words.values())
    one = query()
    lane.begin(one, views(blocks), CALL)
    state = ops.RunningState.begin(one, LAYOUT.value_dim)
    lane.join(state)
    torch.testing.assert_close(
        ops.finish_attention(state).out, ops.finish_attention(attended(one, views(blocks))).out
    )


def test_what_it_did_is_counted(lane, blocks):
    assert lane.measure() == LaneCounters(wait_seconds=0.5)
    lane.begin(query(), views(blocks), CALL).wait()
    counted = lane.measure()
    assert counted.moved_bytes == BLOCKS * LAYOUT.data_bytes
    assert 0 < counted.busy_seconds < 1
    assert lane.probe(torch.empty(4, 8192, dtype=torch.uint8)) == counted.probed_rate > 0


def test_the_probe_works_on_blocks_of_any_size():
    for num_bytes in (4096, 65536 + 4096):
        blocks = torch.full((3, num_bytes), 255, dtype=torch.uint8)
        assert attention_rate(AttentionWorker(), blocks) > 0


@pytest.mark.parametrize(
    ("rows", "queries", "changes", "can"),
    [
        (2, 1, {}, True),
        (MAX_ROWS, 1, {}, True),
        (MAX_ROWS, 2, {}, False),
        (2, 1, {"mask": torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)}, False),
        (2, 1, {"bias": torch.zeros(1, 1, 1, TOKENS)}, False),
        (2, 1, {"starts": torch.zeros(1, dtype=torch.int32)}, False),
        (2, 1, {"softcap": 3.0}, True),
    ],
)
def test_only_few_queries_without_masks_are_for_the_cpu(rows, queries, changes, can):
    one = query(rows, queries)
    assert InPlaceAttention.can_attend(one, LAYOUT.kv_heads, CALL._replace(**changes)) is can


@pytest.mark.parametrize("is_raised", [False, True])
def test_a_job_that_an_interrupt_left_unnoted_ends_before_the_next(
    lane, flags, blocks, monkeypatch, is_raised
):
    """Its memory belongs to nobody any more, and its flag may never be raised."""
    parts, lost, submit = views(blocks), [], AttentionWorker.submit

    def interrupted(*arguments):
        lost.append((submit(*arguments), arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AttentionWorker, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lane.begin(query(), parts, CALL)
    if is_raised:
        flags.raise_flag(lane._addresses[0], lane._number)
    one = query(seed=3)
    transfer = lane.begin(one, parts, CALL)
    ((job, _),) = lost
    assert job.is_done
    transfer.wait()
    state = ops.RunningState.begin(one, LAYOUT.value_dim)
    lane.join(state)
    expected = ops.RunningState.begin(one, LAYOUT.value_dim)
    ops.join_states(expected, attended(one, parts))
    assert_same_bits(state, expected)


def test_close_lets_what_the_device_waits_for_end(flags, blocks):
    lane = InPlaceAttention(flags)
    flags.held = []
    transfer = lane.begin(query(), views(blocks), CALL)
    threading.Timer(0.05, flags.release).start()
    lane.close()
    transfer.wait()
    lane.close()


def test_close_does_not_wait_for_ever_and_raises_every_flag(flags, blocks, monkeypatch):
    monkeypatch.setattr("hf_tiered_cache.devices.in_place.CLOSE_SECONDS", 0.05)
    lane = InPlaceAttention(flags)
    flags.held = []
    transfer = lane.begin(query(), views(blocks), CALL)
    lane.close()
    with pytest.raises(TierIOError, match="closed before the CPU attended"):
        transfer.wait()
    (_, number), done = flags.held[0], list(flags.words.values())[1]
    assert int(done) == number
    with pytest.raises(ClosedCacheError):
        lane.begin(query(), views(blocks), CALL)


def test_a_lane_that_is_dropped_leaves_no_thread(flags, blocks):
    gc.collect()  # lanes of tests before
    before = count_threads()
    lane = InPlaceAttention(flags)
    lane.begin(query(), views(blocks), CALL).wait()
    assert count_threads() == before + 1
    del lane
    gc.collect()
    assert count_threads() == before


def count_threads() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
