"""What the system refuses is a typed error with the remedy; when it gives again, all works."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from tiers import faulty_file as faults
from tiers.faulty_file import FaultyFile

from hf_tiered_cache.errors import ConfigError, TierIOError
from hf_tiered_cache.tiers import Budget, DiskTier, HostTier
from hf_tiered_cache.tiers import host as host_module
from hf_tiered_cache.tiers.disk import tier as disk

BLOCK = 16384
NUM_SLOTS = 4


def open_tier(folder, **knobs) -> DiskTier:
    return DiskTier(BLOCK, Budget("disk", NUM_SLOTS * BLOCK), folder, **knobs)


def assert_works(tier) -> None:
    """All slots can be written and read; nothing is under way then, and nothing is lost."""
    slots = list(range(NUM_SLOTS))
    tier.keep_only([])
    assert [tier.allocate() for _ in slots] == slots
    data = torch.randint(0, 256, (NUM_SLOTS, BLOCK), dtype=torch.uint8)
    out = torch.zeros_like(data)
    tier.write(slots, list(data)).wait()
    tier.read(slots, list(out)).wait()
    assert torch.equal(out, data)
    assert tier.budget.used_bytes == tier.committed_bytes == NUM_SLOTS * BLOCK
    tier.close()
    assert tier.budget.used_bytes == 0


@contextlib.contextmanager
def no_more_descriptors():
    """As after `ulimit -n`: whatever is open stays open, nothing more can be opened."""
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class NoThread(threading.Thread):
    def start(self):
        raise RuntimeError("can't start new thread")


class TestThreads:
    def test_none_for_the_disk(self, tmp_path, monkeypatch):
        tier = open_tier(tmp_path, mover="python")
        slot, data = tier.allocate(), torch.zeros(BLOCK, dtype=torch.uint8)
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", NoThread)
            for _ in range(2):
                with pytest.raises(TierIOError, match="cannot start an I/O thread") as caught:
                    tier.write([slot], [data])
        assert caught.value.errno == errno.EAGAIN
        assert tier._table.users == []
        assert_works(tier)

    def test_none_for_the_host(self, monkeypatch):
        tier = HostTier(BLOCK, Budget("host", NUM_SLOTS * BLOCK))
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", NoThread)
            for _ in range(2):
                with pytest.raises(TierIOError, match="cannot start an I/O thread"):
                    tier.allocate()
        assert (tier.used_slots, tier.committed_bytes, tier.budget.used_bytes) == (0, 0, 0)
        assert_works(tier)

    def test_what_is_not_needed_yet_is_not_missed(self, monkeypatch):
        """Half of a slab is handed out, and no thread is there to get the next one."""
        tier = HostTier(BLOCK, Budget("host", 64 * BLOCK), slab_bytes=4 * BLOCK)
        assert tier.allocate() == 0
        for _ in range(100):
            tier._growth._threads.leave(tier._growth)
        monkeypatch.setattr(threading, "Thread", NoThread)
        assert [tier.allocate() for _ in range(3)] == [1, 2, 3]
        with pytest.raises(TierIOError, match="cannot start an I/O thread"):
            tier.allocate()
        assert tier.used_slots == 4
        tier.close()


class TestDescriptors:
    def test_none_for_a_file(self, tmp_path):
        with no_more_descriptors(), pytest.raises(ConfigError, match="raise `ulimit -n`"):
            open_tier(tmp_path)
        assert_works(open_tier(tmp_path))

    def test_none_for_the_probe_of_direct_io(self, tmp_path, monkeypatch):
        """It is not mistaken for a file system without direct I/O."""
        real_open = os.open

        def no_direct(path, flags, *args, **kwargs):
            if flags & os.O_DIRECT:
                raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
            return real_open(path, flags, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", no_direct)
            with pytest.raises(ConfigError, match="raise `ulimit -n`"):
                open_tier(tmp_path)
        assert_works(open_tier(tmp_path))

    @pytest.mark.parametrize("mover", ["compiled", "python"])
    def test_none_for_the_direct_entrance(self, tmp_path, mover):
        tier = open_tier(tmp_path, io="direct", mover=mover)
        slot, data = tier.allocate(), torch.zeros(BLOCK, dtype=torch.uint8)
        with no_more_descriptors():
            for _ in range(2):
                with pytest.raises(
                    TierIOError, match=r"cannot open record 0 .*`ulimit -n`"
                ) as caught:
                    tier.write([slot], [data])
        assert caught.value.errno == errno.EMFILE
        assert tier._table.users == []
        assert_works(tier)


class TestFolders:
    def test_one_that_vanishes_under_a_tier_takes_nothing_along(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        tier = open_tier(folder)
        folder.rmdir()
        assert_works(tier)

    def test_one_that_vanishes_before_its_file_is_made(self, tmp_path, monkeypatch):
        monkeypatch.setattr(disk, "_check_directory", lambda *_: None)
        with pytest.raises(ConfigError, match=r"cannot make a file in .*the folder is gone"):
            open_tier(tmp_path / "gone")


REFUSALS = {
    "EROFS": "the file system can only be read: choose another folder with disk_dir",
    "EIO": "check the disk",
    "EDQUOT": "free space there, or choose another folder with disk_dir",
    "ENOSPC": "free space there",
    "EFBIG": "raise `ulimit -f` or lower disk_bytes",
    "ENOMEM": "no memory is left for it",
}


@pytest.mark.parametrize("name", REFUSALS)
class TestRefusals:
    def test_of_a_write_and_a_read(self, tmp_path, name):
        tier = open_tier(tmp_path, open_file=FaultyFile)
        code, data = getattr(errno, name), torch.zeros(BLOCK, dtype=torch.uint8)
        slots = [tier.allocate() for _ in range(2)]
        tier.write(slots[:1], [data]).wait()
        tier._file.plan = {
            ("write", 1): faults.fails_with(code),
            ("read", 0): faults.fails_with(code),
        }
        for transfer in (tier.write(slots[1:], [data]), tier.read(slots[:1], [data])):
            with pytest.raises(TierIOError, match=REFUSALS[name]) as caught:
                transfer.wait()
            assert caught.value.errno == code
        assert_works(tier)

    def test_of_space(self, tmp_path, name):
        tier = open_tier(tmp_path, open_file=FaultyFile)
        tier._file.plan = {("reserve", 0): faults.fails_with(getattr(errno, name))}
        with pytest.raises(TierIOError, match=REFUSALS[name]):
            tier.allocate()
        assert (tier.used_slots, tier.committed_bytes, tier.budget.used_bytes) == (0, 0, 0)
        assert_works(tier)


class TestMemory:
    def test_none_in_a_thread_of_the_disk(self, tmp_path):
        def no_memory(call, buffers):
            raise MemoryError

        tier = open_tier(tmp_path, open_file=FaultyFile)
        tier._file.plan = {("write", 0): no_memory}
        transfer = tier.write([tier.allocate()], [torch.zeros(BLOCK, dtype=torch.uint8)])
        with pytest.raises(TierIOError, match="no memory is left for it: raise") as caught:
            transfer.wait()
        assert caught.value.errno == errno.ENOMEM
        assert_works(tier)

    def test_none_in_a_thread_of_the_host(self, monkeypatch):
        def no_memory(memory):
            raise MemoryError

        tier = HostTier(BLOCK, Budget("host", NUM_SLOTS * BLOCK))
        with monkeypatch.context() as patch:
            patch.setattr(host_module, "_touch", no_memory)
            for _ in range(2):
                with pytest.raises(
                    TierIOError, match="cannot get memory for the host tier"
                ) as caught:
                    tier.allocate()
        assert caught.value.errno == errno.ENOMEM
        assert_works(tier)

    @pytest.mark.parametrize("mover", ["compiled", "python"])
    def test_a_real_limit_refuses_threads_and_then_aligned_memory(self, tmp_path, mover):
        """`ulimit -v` in a fresh process: nothing aborts it, and it goes on when the limit goes."""
        script = """
            import resource, sys, time, torch
            from hf_tiered_cache.errors import TierIOError
            from hf_tiered_cache.tiers import Budget, DiskTier

            def size():
                with open("/proc/self/statm") as statm:
                    return int(statm.read().split()[0]) * resource.getpagesize()

            def limited(room):
                sizes = [size()]  # a thread gives its copy back behind the end of its transfer
                while len(sizes) < 15:
                    time.sleep(0.02)
                    now = size()
                    sizes = [*sizes, now] if now == sizes[-1] else [now]
                resource.setrlimit(resource.RLIMIT_AS, (now + room, before[1]))

            before = resource.getrlimit(resource.RLIMIT_AS)
            block = 32 * 2**20
            folder, mover = sys.argv[1:]
            tier = DiskTier(block, Budget("disk", 2 * block), folder, io="direct", mover=mover)
            slots = [tier.allocate(), tier.allocate()]
            room = torch.zeros(2 * block + 1, dtype=torch.uint8)
            data, out = room[1 : block + 1].fill_(7), room[block + 1 :]  # not aligned

            limited(2**20)
            for _ in range(3):
                try:
                    tier.write(slots[:1], [data])
                except TierIOError as error:
                    print("no thread:", error)
            assert tier._table.users == []
            resource.setrlimit(resource.RLIMIT_AS, before)
            tier.write(slots[:1], [data]).wait()

            limited(16 * 2**20)
            for verb, slot, memory in ((tier.write, 1, data), (tier.read, 0, out)):
                try:
                    verb([slot], [memory]).wait()
                except TierIOError as error:
                    print("no memory:", error.errno, error)
            resource.setrlimit(resource.RLIMIT_AS, before)
            tier.write([1], [data]).wait()
            tier.read([1], [out]).wait()
            print("right" if torch.equal(out, data) else "WRONG")
            tier.close()
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), mover],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        *refusals, last = done.stdout.splitlines()
        assert last == "right"
        assert sum("no thread: " in line and "ulimit" in line for line in refusals) == 3
        asked = [line for line in refusals if line.startswith(f"no memory: {errno.ENOMEM} ")]
        assert len(asked) == 2
        assert all("no memory is left for it" in line for line in asked)


@pytest.mark.parametrize("mover", ["compiled", "python"])
def test_a_host_program_that_lets_sigxfsz_kill_is_not_killed_by_our_threads(tmp_path, mover):
    """Python ignores the signal; embedded, it may have its default action."""
    tier = open_tier(tmp_path, io="buffered", mover=mover)
    slots = [tier.allocate() for _ in range(NUM_SLOTS)]
    data = torch.zeros(BLOCK, dtype=torch.uint8)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, limit[1]))
    try:
        with pytest.raises(TierIOError, match="ulimit -f"):
            tier.write(slots[3:], [data]).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert_works(tier)
