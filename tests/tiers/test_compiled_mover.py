"""The compiled mover under real faults: no calls are replaced, the system itself refuses."""

import errno
import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import xxhash

from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.tiers import Budget, DiskTier
from hf_tiered_cache.tiers.disk import movers, record_jobs

BLOCK = 16384
NUM_SLOTS = 6
core = movers.moving_core()


def test_the_core_is_built_and_chosen(tmp_path):
    assert core is not None
    tier = open_tier(tmp_path, mover="auto")
    assert isinstance(tier._mover, movers.CompiledMover)
    tier.close()
    assert record_jobs.END_OF_FILE == core.END_OF_FILE
    assert record_jobs.CANCELLED == core.CANCELLED


def test_without_the_core_python_s_threads_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(movers, "moving_core", lambda: None)
    tier, slots, data = stored_tier(tmp_path, mover="auto")
    assert isinstance(tier._mover, movers.PythonMover)
    out = torch.zeros_like(data)
    tier.read(slots, list(out)).wait()
    assert torch.equal(out, data)
    tier.close()
    with pytest.raises(ConfigError, match="was not built"):
        open_tier(tmp_path, mover="compiled")


def test_an_unknown_mover_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown mover 'rust'; expected one of auto, compiled"):
        open_tier(tmp_path, mover="rust")


@pytest.mark.parametrize("offset", [0, 1])
def test_checksum_is_xxh3_128(offset):
    sizes = [241, 1024, 1025, 4095, *range(4096, 70000, 4096), 1 << 20, (1 << 22) - 4096, 1 << 22]
    data = torch.randint(0, 256, (max(sizes) + 1,), dtype=torch.uint8)
    for size in sizes:
        part = data[offset : offset + size]
        assert core.xxh3_128(part.data_ptr(), size) == xxhash.xxh3_128_digest(part.numpy()), size


def open_tier(folder, mover="compiled", **knobs) -> DiskTier:
    return DiskTier(BLOCK, Budget("disk", NUM_SLOTS * BLOCK), folder, mover=mover, **knobs)


def stored_tier(folder, **knobs):
    """A tier of which all slots are stored: (tier, slots, data)."""
    tier = open_tier(folder, **knobs)
    slots = [tier.allocate() for _ in range(NUM_SLOTS)]
    data = torch.randint(0, 256, (NUM_SLOTS, BLOCK), dtype=torch.uint8)
    tier.write(slots, list(data)).wait()
    return tier, slots, data


class Replaced:
    """Inside the `with`, the descriptor of the tier's file leads to another file."""

    def __init__(self, tier: DiskTier, path: str, flags: int) -> None:
        self.fd, self.path, self.flags = tier._file._fd, path, flags

    def __enter__(self):
        self.real = os.dup(self.fd)
        other = os.open(self.path, self.flags)
        os.dup2(other, self.fd)
        os.close(other)

    def __exit__(self, *exc):
        os.dup2(self.real, self.fd)
        os.close(self.real)


def assert_heals(tier, slots) -> None:
    data = torch.randint(0, 256, (NUM_SLOTS, BLOCK), dtype=torch.uint8)
    out = torch.zeros_like(data)
    tier.write(slots, list(data)).wait()
    tier.read(slots[::-1], list(out.flip(0).unbind())).wait()
    reverse = torch.zeros_like(data)
    tier.read(slots[::-1], list(reverse)).wait()
    assert torch.equal(reverse.flip(0), data)
    tier.close()
    assert tier.budget.used_bytes == 0


READ_FAULTS = {"EIO": ("/proc/self/mem", os.O_RDONLY), "EBADF": ("/dev/null", os.O_WRONLY)}
WRITE_FAULTS = {"ENOSPC": ("/dev/full", os.O_RDWR), "EBADF": ("/dev/null", os.O_RDONLY)}


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_refused_read_says_what_and_where_and_heals(tmp_path, fault):
    tier, slots, _ = stored_tier(tmp_path, io="buffered")
    with Replaced(tier, *READ_FAULTS[fault]):
        transfer = tier.read(slots[:1], [torch.zeros(BLOCK, dtype=torch.uint8)])
        with pytest.raises(TierIOError, match="cannot load record 0 ") as caught:
            transfer.wait()
    assert caught.value.errno == getattr(errno, fault)
    assert isinstance(caught.value.__cause__, OSError)
    for part in (str(tmp_path), "at byte 0: ", "disk_dir"):
        assert part in str(caught.value)
    assert_heals(tier, slots)


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_refused_write_makes_the_slot_unreadable_and_heals(tmp_path, fault):
    tier, slots, data = stored_tier(tmp_path, io="buffered")
    out = torch.zeros(BLOCK, dtype=torch.uint8)
    with Replaced(tier, *WRITE_FAULTS[fault]):
        write = tier.write(slots[1:3], list(data[:2]))
        read = tier.read(slots[2:3], [out])  # behind the write that fails
        with pytest.raises(TierIOError, match=r"cannot store records \[1, 3\)") as caught:
            write.wait()
        with pytest.raises(TierIOError, match=r"record 2, it was not stored: .*cannot store"):
            read.wait()
    assert caught.value.errno == getattr(errno, fault)
    for slot in slots[1:3]:  # never the old bytes
        with pytest.raises(TierIOError, match=f"record {slot}, it was not stored"):
            tier.read([slot], [out]).wait()
    tier.read(slots[:1], [out]).wait()
    assert torch.equal(out, data[0])
    assert_heals(tier, slots)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_truncated_file(tmp_path, io):
    tier, slots, data = stored_tier(tmp_path, io=io)
    os.ftruncate(tier._file._fd, 2 * BLOCK + 4096)
    out = torch.zeros_like(data)
    with pytest.raises(TierIOError, match=f"nothing more went through at byte {2 * BLOCK + 4096}"):
        tier.read(slots, list(out)).wait()
    tier.read(slots[:2], list(out[:2])).wait()
    assert torch.equal(out[:2], data[:2])
    assert_heals(tier, slots)


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_changed_bit_is_noticed(tmp_path, io, offset):
    """Also when direct I/O goes through aligned memory."""
    tier, slots, data = stored_tier(tmp_path, io=io)
    out = torch.zeros(BLOCK + 1, dtype=torch.uint8)[offset : offset + BLOCK]
    fd, num_refused = tier._file._fd, 0
    for number in range(100):
        place = number * 991 % (NUM_SLOTS * BLOCK)
        [byte] = os.pread(fd, 1, place)
        os.pwrite(fd, bytes([byte ^ 1 << number % 8]), place)
        with pytest.raises(TierIOError, match=f"record {place // BLOCK} .*is not what was stored"):
            tier.read([place // BLOCK], [out]).wait()
        num_refused += 1
        os.pwrite(fd, bytes([byte]), place)
    assert num_refused == 100
    for slot in slots:
        tier.read([slot], [out]).wait()
        assert torch.equal(out, data[slot])
    tier.close()


def test_a_write_cut_short_by_a_limit_of_the_system(tmp_path):
    """`ulimit -f` within a record: a part goes through, then EFBIG."""
    tier, slots, data = stored_tier(tmp_path, io="buffered")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK + 8192, before[1]))
    try:
        transfer = tier.write(slots, list(data.flip(0)))
        with pytest.raises(TierIOError, match="ulimit -f") as caught:
            transfer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(TierIOError, match="was not stored"):
        tier.read(slots[:1], [data[0]]).wait()
    assert_heals(tier, slots)


def test_reads_behind_many_writes_of_their_slot_see_the_last(tmp_path):
    tier = open_tier(tmp_path, num_threads=4)
    slot = tier.allocate()
    out = torch.zeros(8, BLOCK, dtype=torch.uint8)
    for number in range(50):
        block = torch.full((BLOCK,), number, dtype=torch.uint8)
        tier.write([slot], [block])
        reads = [tier.read([slot], [row]) for row in out]
        for read in reads:
            read.wait()
        assert (out == number).all()
    tier.close()


def test_memory_of_a_dropped_transfer_lives_until_it_is_done(tmp_path):
    tier, slots, data = stored_tier(tmp_path)
    for _ in range(30):
        tier.write(slots, [block.clone() for block in data])
        tier.read(slots, [torch.empty(BLOCK, dtype=torch.uint8) for _ in slots])
        out = torch.zeros_like(data)
        tier.read(slots, list(out)).wait()
        assert torch.equal(out, data)
        deadline = time.monotonic() + 5
        while tier._table.users and time.monotonic() < deadline:
            tier._mover.settle(tier._table.users)  # one with a transfer may not be written
        assert not tier._table.users
        assert not movers._kept
    tier.close()


@pytest.fixture
def stuck(tmp_path):
    """(tier, transfer, let_go): a write that begins only when `let_go` was called; it then fails,
    for what it follows was cancelled."""
    tier = open_tier(tmp_path)
    blocker = core.Move(
        is_write=False, fd=-1, offset=0, record_bytes=BLOCK, addresses=[], is_direct=False, after=[]
    )
    tier._mover._core = SimpleNamespace(
        Move=lambda after, **fields: core.Move(after=[*after, blocker], **fields)
    )
    transfer = tier.write([tier.allocate()], [torch.zeros(BLOCK, dtype=torch.uint8)])
    yield tier, transfer, lambda: tier._mover._io.cancel(blocker)
    tier._mover._io.cancel(blocker)
    tier.close()


def test_waiting_lets_other_threads_run(stuck):
    _, transfer, let_go = stuck
    assert not transfer.is_ready()
    threading.Timer(0.05, let_go).start()
    with pytest.raises(TierIOError, match="closed or interrupted"):
        transfer.wait()
    assert transfer.is_ready()


def test_ctrl_c_interrupts_a_wait_and_the_transfer_goes_on(stuck):
    _, transfer, let_go = stuck
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        transfer.wait()
    assert time.monotonic() - before < 2
    assert not transfer.is_ready()
    let_go()
    with pytest.raises(TierIOError):
        transfer.wait()


def test_allocate_waits_for_a_retired_slot(stuck):
    tier, transfer, let_go = stuck
    taken = [tier.allocate() for _ in range(NUM_SLOTS - 1)]
    tier.free(0)
    assert tier.num_free() == 1
    threading.Timer(0.05, let_go).start()
    assert tier.allocate() == 0
    assert transfer.is_ready()
    assert len(taken) == NUM_SLOTS - 1


def test_several_threads_wait_for_one_transfer(stuck):
    _, transfer, let_go = stuck
    failed = []

    def wait():
        try:
            transfer.wait()
        except TierIOError as error:
            failed.append(error)

    waiting = [threading.Thread(target=wait) for _ in range(4)]
    for thread in waiting:
        thread.start()
    let_go()
    for thread in waiting:
        thread.join(5)
    assert len(failed) == 4


def test_what_was_interrupted_while_it_was_settled_is_settled_by_the_next_wait(
    tmp_path, monkeypatch
):
    tier, slots, data = stored_tier(tmp_path)
    out = torch.zeros_like(data)

    def interrupted(record):
        raise KeyboardInterrupt

    transfer = tier.read(slots, list(out))
    with monkeypatch.context() as patch:
        patch.setattr(tier._table, "written", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transfer.wait()
    transfer.wait()
    assert torch.equal(out, data)
    assert_heals(tier, slots)
