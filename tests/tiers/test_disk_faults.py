"""Faults at every read, write and reserve call of a reference run: refused or right, never wrong.

The calls are enumerated from a run without faults, not sampled.
"""

import errno
import os
import threading

import pytest
import torch
from tiers import faulty_file as faults
from tiers.faulty_file import FaultyFile

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.tiers import Budget, DiskTier

BLOCK = 16384
NUM_SLOTS = 6

HARMLESS = {  # the tier makes these good: nobody notices
    "EINTR": faults.interrupted,
    "short": faults.short,
    "short within a page": faults.short_odd,
    "slow": faults.slow,
}
FATAL = {
    "EIO": faults.fails_with(errno.EIO),
    "ENOSPC": faults.fails_with(errno.ENOSPC),
    "EINVAL": faults.fails_with(errno.EINVAL),
    "nothing moves": faults.nothing,
}
READ_FAULTS = {**HARMLESS, **FATAL, "bit flip": faults.bit_flip}
WRITE_FAULTS = {**HARMLESS, **FATAL, "torn": faults.torn}


def content(seed: int) -> torch.Tensor:
    """uint8 [BLOCK], random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, generator=generator)


def open_tier(folder, plan=None, **knobs) -> DiskTier:
    tier = DiskTier(BLOCK, Budget("disk", NUM_SLOTS * BLOCK), folder, open_file=FaultyFile, **knobs)
    tier._file.plan = plan or {}
    return tier


class Shadow:
    """A tier, what should be in it, and the count of what came of every step."""

    def __init__(self, tier: DiskTier) -> None:
        self.tier = tier
        self.seeds: dict[int, int] = {}  # slot -> seed of the last write begun
        self.refused: list[TierIOError] = []
        self.wrong = 0

    def allocate(self) -> int:
        try:
            slot = self.tier.allocate()
        except TierIOError as error:
            self.refused.append(error)
            slot = self.tier.allocate()  # nothing had changed
        return slot

    def write(self, *seeds: tuple[int, int]) -> None:
        self.seeds.update(seeds)
        slots, data = [slot for slot, _ in seeds], [content(seed) for _, seed in seeds]
        try:
            self.tier.write(slots, data).wait()
        except TierIOError as error:
            self.refused.append(error)

    def free(self, slot: int) -> None:
        self.tier.free(slot)
        del self.seeds[slot]

    def read(self, *slots: int) -> None:
        out = [torch.zeros(BLOCK, dtype=torch.uint8) for _ in slots]
        try:
            self.tier.read(slots, out).wait()
        except TierIOError as error:
            self.refused.append(error)
        else:
            for slot, block in zip(slots, out, strict=True):
                self.wrong += not torch.equal(block, content(self.seeds[slot]))


def run_scenario(tier: DiskTier) -> Shadow:
    """Write, read, free, reuse, rewrite: batches of neighbours, of strangers, of one."""
    shadow = Shadow(tier)
    assert [shadow.allocate() for _ in range(5)] == [0, 1, 2, 3, 4]
    shadow.write((0, 10), (1, 11), (2, 12))
    shadow.write((4, 14), (3, 13))
    shadow.read(0, 1, 2, 3, 4)
    shadow.read(4, 2, 0)
    shadow.free(1)
    shadow.free(3)
    assert [shadow.allocate() for _ in range(3)] == [1, 3, 5]
    shadow.write((1, 21), (5, 25), (3, 23))
    shadow.write((0, 20))
    for slot in range(NUM_SLOTS):
        shadow.read(slot)
    return shadow


def assert_heals(shadow: Shadow) -> None:
    """After the fault: what was refused can be written again, and all is right."""
    shadow.tier._file.plan = {}
    num_refused = len(shadow.refused)
    shadow.write(*((slot, 30 + slot) for slot in range(NUM_SLOTS)))
    shadow.read(*range(NUM_SLOTS))
    assert len(shadow.refused) == num_refused
    assert shadow.wrong == 0
    budget = shadow.tier.budget
    shadow.tier.close()
    assert budget.used_bytes == 0


@pytest.fixture(params=["direct", "buffered"])
def io(request):
    return request.param


def reference_calls(folder, io, kind: str) -> int:
    """How many calls of a kind the scenario makes; it is right without faults."""
    tier = open_tier(folder, io=io, num_threads=1)
    shadow = run_scenario(tier)
    assert (shadow.refused, shadow.wrong) == ([], 0)
    tier.close()
    return tier._file.num_calls[kind]


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_fault_at_every_read_call(tmp_path, io, fault):
    num_calls = reference_calls(tmp_path, io, "read")
    assert num_calls > 8
    for number in range(num_calls):
        tier = open_tier(tmp_path, {("read", number): READ_FAULTS[fault]}, io=io, num_threads=1)
        shadow = run_scenario(tier)
        assert shadow.wrong == 0
        assert len(shadow.refused) == (0 if fault in HARMLESS else 1)
        assert_heals(shadow)


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_fault_at_every_write_call(tmp_path, io, fault):
    num_calls = reference_calls(tmp_path, io, "write")
    assert num_calls > 5
    for number in range(num_calls):
        tier = open_tier(tmp_path, {("write", number): WRITE_FAULTS[fault]}, io=io, num_threads=1)
        shadow = run_scenario(tier)
        assert shadow.wrong == 0
        if fault in HARMLESS:
            assert shadow.refused == []
        else:  # refused when it was written (but for the torn one) and whenever it was read
            assert len(shadow.refused) >= 1
        assert_heals(shadow)


def test_full_disk_at_every_reserve_call(tmp_path, io):
    num_calls = reference_calls(tmp_path, io, "reserve")
    assert num_calls == NUM_SLOTS
    for number in range(num_calls):
        tier = open_tier(tmp_path, {("reserve", number): FATAL["ENOSPC"]}, io=io, num_threads=1)
        shadow = run_scenario(tier)
        assert shadow.wrong == 0
        [error] = shadow.refused
        assert error.errno == errno.ENOSPC
        assert "cannot reserve space" in str(error)
        assert_heals(shadow)


def test_less_room_than_a_step_is_still_room_for_one(tmp_path):
    budget = Budget("disk", 64 * 4096)  # steps of two slots
    tier = DiskTier(4096, budget, tmp_path, open_file=FaultyFile)
    tier._file.plan = {("reserve", 1): FATAL["ENOSPC"]}
    assert [tier.allocate() for _ in range(3)] == [0, 1, 2]
    assert tier.committed_bytes == budget.used_bytes == 3 * 4096
    tier.close()


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", cannot_reserve)
    tier = open_tier(tmp_path)
    shadow = run_scenario(tier)
    assert (shadow.refused, shadow.wrong) == ([], 0)
    tier.close()


def cannot_reserve(fd, offset, num_bytes):
    raise OSError(errno.EOPNOTSUPP, "not supported")


def test_two_faults_in_one_batch_are_one_error_and_no_hang(tmp_path):
    tier = open_tier(tmp_path)
    slots = [tier.allocate() for _ in range(NUM_SLOTS)]
    tier._file.plan = {("write", number): FATAL["EIO"] for number in range(3)}
    transfer = tier.write(slots[::-1], [content(slot) for slot in slots])  # six single records
    with pytest.raises(TierIOError):
        transfer.wait()
    refused = []
    for slot in slots:
        out = torch.zeros(BLOCK, dtype=torch.uint8)
        try:
            tier.read([slot], [out]).wait()
        except TierIOError as error:
            refused.append(str(error))
        else:
            assert torch.equal(out, content(NUM_SLOTS - 1 - slot))
    assert len(refused) == 3
    assert all("was not stored" in text and "Input/output error" in text for text in refused)
    tier.close()


def test_a_failed_write_never_leaves_the_old_bytes_readable(tmp_path):
    tier = open_tier(tmp_path)
    slot = tier.allocate()
    tier.write([slot], [content(1)]).wait()
    tier._file.plan = {("write", 1): FATAL["EIO"]}
    transfer = tier.write([slot], [content(2)])
    with pytest.raises(TierIOError):
        transfer.wait()
    for _ in range(2):
        with pytest.raises(TierIOError, match="record 0, it was not stored"):
            tier.read([slot], [torch.zeros(BLOCK, dtype=torch.uint8)]).wait()
    tier.free(slot)
    assert tier.allocate() == slot
    tier.write([slot], [content(3)]).wait()
    tier.close()


def test_completions_in_another_order_than_submissions(tmp_path):
    """The first of four writes and of four reads are the slowest; data and order still hold."""

    go_on, has_begun = threading.Event(), threading.Semaphore(0)

    def very_slow(call, buffers):
        has_begun.release()
        go_on.wait(timeout=60)
        return call(buffers)

    tier = open_tier(tmp_path, {("write", 0): very_slow, ("read", 0): very_slow}, num_threads=4)
    slots = [tier.allocate() for _ in range(4)]
    writes = [tier.write(slots[:1], [content(slots[0])])]
    # Else another thread might come first, and be the slow one.
    assert has_begun.acquire(timeout=60)
    writes += [tier.write([slot], [content(slot)]) for slot in slots[1:]]
    for write in writes[1:]:
        write.wait()
    assert not writes[0].is_ready()
    out = torch.zeros(4, BLOCK, dtype=torch.uint8)
    reads = [tier.read([1], [out[1]])]
    assert has_begun.acquire(timeout=60)
    reads += [tier.read([slot], [out[slot]]) for slot in (0, 2, 3)]
    reads[2].wait()
    reads[3].wait()
    assert not reads[1].is_ready()  # it waits for the write of slot 0
    go_on.set()
    reads[1].wait()
    writes[0].wait()
    reads[0].wait()
    for slot in slots:
        assert torch.equal(out[slot], content(slot))
    tier.close()


def test_waiting_reads_do_not_starve_the_write_they_wait_for(tmp_path):
    """More reads than threads wait for one slow write."""
    tier = open_tier(tmp_path, {("write", 0): faults.slow}, num_threads=2)
    slot = tier.allocate()
    out = torch.zeros(16, BLOCK, dtype=torch.uint8)
    tier.write([slot], [content(7)])
    for read in [tier.read([slot], [out[index]]) for index in range(16)]:
        read.wait()
    assert all(torch.equal(block, content(7)) for block in out)
    tier.close()


class TestMessages:
    """Each error says what, which record, where, and what to do."""

    def test_io_error(self, tmp_path):
        tier = open_tier(tmp_path, {("write", 0): FATAL["EIO"]})
        tier.allocate()
        transfer = tier.write([0], [content(0)])
        with pytest.raises(TierIOError, match="cannot store record 0 ") as caught:
            transfer.wait()
        assert caught.value.errno == errno.EIO
        assert str(tmp_path) in str(caught.value)
        assert "disk_dir" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        tier.close()

    def test_full_disk(self, tmp_path):
        tier = open_tier(tmp_path, {("reserve", 0): FATAL["ENOSPC"]})
        with pytest.raises(TierIOError, match="No space left on device; free space") as caught:
            tier.allocate()
        assert caught.value.errno == errno.ENOSPC
        assert (tier.used_slots, tier.committed_bytes, tier.budget.used_bytes) == (0, 0, 0)
        tier.close()

    def test_neighbours_are_named_as_a_range(self, tmp_path):
        tier = open_tier(tmp_path, {("write", 0): FATAL["EIO"]})
        slots = [tier.allocate() for _ in range(3)]
        with pytest.raises(TierIOError, match=r"records \[0, 3\)"):
            tier.write(slots, [content(slot) for slot in slots]).wait()
        tier.close()

    def test_corruption(self, tmp_path):
        tier = open_tier(tmp_path)
        slots = [tier.allocate() for _ in range(3)]
        tier.write(slots, [content(slot) for slot in slots]).wait()
        os.pwrite(tier._file._fd, b"\x00\x01\x02", BLOCK + 77)  # in record 1, behind our back
        out = torch.zeros(3, BLOCK, dtype=torch.uint8)
        for _ in range(2):
            with pytest.raises(TierIOError, match="record 1 ") as caught:
                tier.read(slots, list(out)).wait()
        message = str(caught.value)
        assert caught.value.errno == errno.EBADMSG
        for part in (str(tmp_path), f"bytes {BLOCK} ", "expected xxh3_128 ", "got ", "disk_dir"):
            assert part in message
        tier.read([0, 2], [out[0], out[2]]).wait()  # the others are as they were
        assert torch.equal(out[2], content(2))
        tier.close()

    def test_truncated_file(self, tmp_path):
        tier = open_tier(tmp_path)
        slots = [tier.allocate() for _ in range(3)]
        tier.write(slots, [content(slot) for slot in slots]).wait()
        os.ftruncate(tier._file._fd, 2 * BLOCK + 4096)
        with pytest.raises(TierIOError, match="nothing more went through"):
            tier.read([2], [torch.zeros(BLOCK, dtype=torch.uint8)]).wait()
        tier.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_every_changed_bit_is_noticed(tmp_path, io):
    """200 single bit flips, spread over the file: all refused."""
    tier = open_tier(tmp_path, io=io)
    slots = [tier.allocate() for _ in range(NUM_SLOTS)]
    tier.write(slots, [content(slot) for slot in slots]).wait()
    fd = tier._file._fd
    out = torch.zeros(BLOCK, dtype=torch.uint8)
    num_wrong = num_refused = 0
    for number in range(200):
        offset = number * 491 % (NUM_SLOTS * BLOCK)
        [byte] = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 1 << number % 8]), offset)
        try:
            tier.read([offset // BLOCK], [out]).wait()
        except TierIOError:
            num_refused += 1
        else:
            num_wrong += 1
        os.pwrite(fd, bytes([byte]), offset)
    assert (num_wrong, num_refused) == (0, 200)
    for slot in slots:
        tier.read([slot], [out]).wait()
        assert torch.equal(out, content(slot))
    tier.close()


def test_swapped_records_are_noticed(tmp_path):
    tier = open_tier(tmp_path)
    slots = [tier.allocate() for _ in range(2)]
    tier.write(slots, [content(slot) for slot in slots]).wait()
    one, other = (os.pread(tier._file._fd, BLOCK, slot * BLOCK) for slot in slots)
    os.pwrite(tier._file._fd, other + one, 0)
    for slot in slots:
        with pytest.raises(TierIOError, match="is not what was stored"):
            tier.read([slot], [torch.zeros(BLOCK, dtype=torch.uint8)]).wait()
    tier.close()


def test_bytes_changed_while_they_are_written_are_noticed(tmp_path):
    """The caller's bug of reusing memory too early ends in an error, not in other bytes."""
    data = content(0)

    def changed_meanwhile(call, buffers):
        data[5] ^= 1
        return call(buffers)

    tier = open_tier(tmp_path, {("write", 0): changed_meanwhile}, io="buffered")
    tier.allocate()
    tier.write([0], [data]).wait()
    with pytest.raises(TierIOError, match="is not what was stored"):
        tier.read([0], [torch.zeros(BLOCK, dtype=torch.uint8)]).wait()
    tier.close()


def test_an_error_of_ours_in_a_thread_reaches_whoever_waits(tmp_path):
    def bug(call, buffers):
        raise ZeroDivisionError("a bug")

    tier = open_tier(tmp_path, {("write", 0): bug})
    tier.allocate()
    transfer = tier.write([0], [content(0)])
    with pytest.raises(TierIOError, match="a bug") as caught:
        transfer.wait()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    tier.write([0], [content(1)]).wait()  # the thread lives
    tier.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("hf_tiered_cache")]
