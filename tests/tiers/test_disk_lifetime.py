"""Nothing of a disk tier survives close, collection, an exception, exit, Ctrl-C or a kill."""

import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback

import pytest
import torch
from tiers.faulty_file import FaultyFile

from hf_tiered_cache.errors import ClosedCacheError, ConfigError, TierIOError
from hf_tiered_cache.tiers import Budget, DiskTier
from hf_tiered_cache.tiers.disk import block_file, movers
from hf_tiered_cache.tiers.disk import tier as disk

BLOCK = 65536
NUM_SLOTS = 32


@pytest.fixture(params=["auto", "python"], autouse=True)
def mover(request):
    """The mover of every tier here; "auto" is the compiled one. Faulty files are under Python's."""

    def make_mover(name: str, num_threads: int):
        return movers.make_mover(request.param if name == "auto" else name, num_threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "make_mover", make_mover)
        yield request.param


def threads() -> list[str]:
    """The I/O threads of this process, Python's and the compiled core's."""
    found = [t.name for t in threading.enumerate() if t.name.startswith("hf_tiered_cache")]
    for task in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/self/task/{task}/comm", encoding="ascii") as comm,
        ):
            name = comm.read().strip()
            found += [name] if name == "tiered-cache-io" else []
    return found


def files_in(folder) -> list[str]:
    """Open descriptors of this process that lead into `folder`."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


def busy_tier(folder, **knobs):
    """A tier with written slots and reads under way."""
    budget = Budget("disk", NUM_SLOTS * BLOCK)
    tier = DiskTier(BLOCK, budget, folder, **knobs)
    data = torch.randint(0, 256, (NUM_SLOTS, BLOCK), dtype=torch.uint8)
    slots = [tier.allocate() for _ in range(NUM_SLOTS)]
    transfers = [tier.write(slots, list(data))]
    transfers += [tier.read(slots[::-1], list(torch.empty_like(data))) for _ in range(4)]
    return tier, budget, transfers


def assert_nothing_left(folder, budget, transfers):
    assert threads() == []
    assert files_in(folder) == []
    assert os.listdir(folder) == []
    assert budget.used_bytes == 0
    for transfer in transfers:
        assert transfer.is_ready()


def test_file_has_no_name_and_is_its_owners(tmp_path):
    tier, _, _ = busy_tier(tmp_path)
    assert os.listdir(tmp_path) == []
    assert len(files_in(tmp_path)) == 2  # direct as well: all but page_cache_bytes, here none
    assert all(target.endswith("(deleted)") for target in files_in(tmp_path))
    tier.close()


@pytest.mark.parametrize("umask", [0o000, 0o777])
@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_mode_is_0600_whatever_the_umask(tmp_path, monkeypatch, umask, has_tmpfile):
    if not has_tmpfile:
        monkeypatch.delattr(os, "O_TMPFILE")
    before = os.umask(umask)
    try:
        tier, _, _ = busy_tier(tmp_path)
    finally:
        os.umask(before)
    assert os.fstat(tier._file._fd).st_mode & 0o7777 == 0o600
    assert tier._file.has_direct
    assert os.listdir(tmp_path) == []
    tier.close()


def test_a_file_system_without_unnamed_files(tmp_path, monkeypatch):
    real_open = os.open

    def no_tmpfile(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_tmpfile)
    tier, budget, transfers = busy_tier(tmp_path)
    for transfer in transfers:
        transfer.wait()
    assert os.listdir(tmp_path) == []
    tier.close()
    assert_nothing_left(tmp_path, budget, transfers)


def test_a_file_system_without_direct_io_says_so_once(tmp_path, monkeypatch, caplog):
    real_open = os.open

    def no_direct(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_direct)
    block_file._say_no_direct.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tier, budget, transfers = busy_tier(tmp_path, io="direct")
            for transfer in transfers:
                transfer.wait()
            tier.close()
            assert_nothing_left(tmp_path, budget, transfers)
    assert len([record for record in caplog.records if "no direct I/O" in record.message]) == 1


def test_a_file_system_that_takes_the_flag_but_not_the_io(tmp_path, monkeypatch):
    real_write = os.pwritev

    def refuse_pages(fd, buffers, offset):
        if offset == 4096 and len(buffers[0]) == 4096:
            raise OSError(errno.EINVAL, "sectors are larger")
        return real_write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse_pages)
    tier, _, transfers = busy_tier(tmp_path, io="direct")
    assert not tier._file.has_direct
    assert len(files_in(tmp_path)) == 1
    for transfer in transfers:
        transfer.wait()
    tier.close()


class TestGoldenBytes:
    """What is in the file is what was given, record by record, at slot * block_bytes."""

    @pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
    def test_record_is_the_block(self, tmp_path, io):
        tier = DiskTier(8192, Budget("disk", 4 * 8192), tmp_path, io=io)
        slots = [tier.allocate() for _ in range(4)]
        data = torch.arange(4 * 8192).remainder(251).to(torch.uint8).view(4, 8192)
        tier.write([slots[2], slots[0]], [data[2], data[0]]).wait()
        tier.write([slots[3], slots[1]], [data[3], data[1]]).wait()
        raw = os.pread(tier._file._fd, 5 * 8192, 0)
        assert raw == bytes(i % 251 for i in range(4 * 8192))
        tier.close()

    def test_auto_sends_a_record_the_same_way_always(self, tmp_path):
        """Records [0, 3) buffered, [3, 6) direct, also when one batch has both."""
        ways = {}

        class Watching(FaultyFile):
            def pread_into(self, buffers, offset, *, direct):
                for number in range(len(buffers)):
                    ways.setdefault(offset // 8192 + number, set()).add(direct)
                return super().pread_into(buffers, offset, direct=direct)

            pwrite_from = FaultyFile.pwrite_from

        tier = DiskTier(
            8192,
            Budget("disk", 6 * 8192),
            tmp_path,
            page_cache_bytes=3 * 8192 + 100,
            open_file=Watching,
        )
        slots = [tier.allocate() for _ in range(6)]
        data = torch.randint(0, 256, (6, 8192), dtype=torch.uint8)
        tier.write(slots, list(data)).wait()
        out = torch.zeros_like(data)
        tier.read(slots, list(out)).wait()
        tier.read(slots[::-1], list(out.flip(0).unbind())).wait()
        assert torch.equal(out, data)
        assert ways == {slot: {slot >= 3} for slot in slots}
        tier.close()


class TestBadFolders:
    def test_missing(self, tmp_path):
        with pytest.raises(ConfigError, match=r"disk_dir .*nowhere.* is not a folder"):
            DiskTier(BLOCK, Budget("disk", BLOCK), tmp_path / "nowhere")

    def test_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="is not a folder"):
            DiskTier(BLOCK, Budget("disk", BLOCK), tmp_path / "file")

    def test_not_writable(self):
        with pytest.raises(ConfigError, match="disk_dir"):
            DiskTier(BLOCK, Budget("disk", BLOCK), "/proc")

    def test_more_asked_than_free(self, tmp_path):
        space = os.statvfs(tmp_path)
        asked = space.f_bavail * space.f_frsize * 2
        with pytest.raises(ConfigError) as caught:
            DiskTier(BLOCK, Budget("disk", asked), tmp_path)
        for part in (str(tmp_path), str(asked), "bytes free", "disk_bytes", "disk_dir"):
            assert part in str(caught.value)
        assert files_in(tmp_path) == []

    def test_names_with_spaces_and_unicode(self, tmp_path):
        folder = tmp_path / "a b%s ü\n"
        folder.mkdir()
        tier, _, transfers = busy_tier(folder)
        for transfer in transfers:
            transfer.wait()
        tier.close()

    @pytest.mark.parametrize("knobs", [{"io": "mmap"}, {"num_threads": 0}])
    def test_bad_knobs(self, tmp_path, knobs):
        with pytest.raises(ConfigError, match=next(iter(knobs)).split("_")[0]):
            DiskTier(BLOCK, Budget("disk", BLOCK), tmp_path, **knobs)


class TestNothingSurvives:
    def test_close(self, tmp_path):
        tier, budget, transfers = busy_tier(tmp_path)
        tier.close()
        assert_nothing_left(tmp_path, budget, transfers)

    def test_close_fails_what_is_queued_and_ends_what_is_under_way(self, tmp_path):
        under_way = threading.Event()

        def slow(call, buffers):
            under_way.set()
            time.sleep(0.1)
            return call(buffers)

        budget = Budget("disk", 3 * BLOCK)
        tier = DiskTier(BLOCK, budget, tmp_path, num_threads=1, open_file=FaultyFile)
        tier._file.plan = {("write", 0): slow}
        slots = [tier.allocate() for _ in range(3)]
        data = torch.zeros(BLOCK, dtype=torch.uint8)
        first = tier.write(slots[:1], [data])
        queued = [tier.write([slot], [data]) for slot in slots[1:]]
        waiting = tier.read(slots[:1], [data.clone()])
        under_way.wait(5)
        tier.close()
        first.wait()
        for transfer in [*queued, waiting]:
            with pytest.raises(TierIOError, match="was closed or interrupted before"):
                transfer.wait()
        assert_nothing_left(tmp_path, budget, [first, *queued, waiting])

    def test_close_does_not_wait_for_a_write_that_was_never_queued(self, tmp_path):
        budget = Budget("disk", BLOCK)
        tier = DiskTier(BLOCK, budget, tmp_path, mover="python")
        slot = tier.allocate()
        submit = tier._mover.submit
        tier._mover.submit = lambda *_: None
        write = tier.write([slot], [torch.zeros(BLOCK, dtype=torch.uint8)])
        tier._mover.submit = submit
        read = tier.read([slot], [torch.zeros(BLOCK, dtype=torch.uint8)])
        time.sleep(0.05)
        assert not read.is_ready()
        tier.close()
        for transfer in (read, write):
            with pytest.raises(TierIOError):
                transfer.wait()
        assert_nothing_left(tmp_path, budget, [read, write])

    def test_ctrl_c_while_a_write_is_queued(self, tmp_path, monkeypatch):
        """Two of four pieces are queued when it comes: all end, and the tier stays usable."""
        tier = DiskTier(BLOCK, Budget("disk", 4 * BLOCK), tmp_path)
        slots = [tier.allocate() for _ in range(4)]
        data = torch.randint(0, 256, (4, BLOCK), dtype=torch.uint8)
        submit, num_calls = tier._mover.submit, []

        def interrupted(job, before):
            submit(job, before)
            num_calls.append(job)
            if len(num_calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(tier._mover, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tier.write(slots[::-1], list(data.flip(0)))
        monkeypatch.undo()
        out = torch.zeros_like(data)
        for slot in slots:
            with contextlib.suppress(TierIOError):
                tier.read([slot], [out[slot]]).wait()
                assert torch.equal(out[slot], data[slot])
        for slot in slots:
            tier.free(slot)
        slots = [tier.allocate() for _ in range(4)]
        tier.write(slots, list(data)).wait()
        tier.read(slots, list(out)).wait()
        assert torch.equal(out, data)
        tier.close()

    def test_garbage_collection(self, tmp_path):
        tier, budget, transfers = busy_tier(tmp_path)
        del tier
        gc.collect()
        assert_nothing_left(tmp_path, budget, transfers)

    def test_garbage_collection_of_a_cycle(self, tmp_path):
        tier, budget, transfers = busy_tier(tmp_path)
        cycle = [tier]
        cycle.append(cycle)
        del tier, cycle
        gc.collect()
        assert_nothing_left(tmp_path, budget, transfers)

    def test_garbage_collection_in_one_of_its_own_threads(self, tmp_path):
        """The collector runs where it likes; here in the middle of a read of the dead tier."""

        def collect(call, buffers):
            gc.collect()
            return call(buffers)

        gc.disable()
        try:
            budget = Budget("disk", 4 * BLOCK)
            tier = DiskTier(BLOCK, budget, tmp_path, open_file=FaultyFile)
            slots = [tier.allocate() for _ in range(4)]
            data = torch.zeros(4, BLOCK, dtype=torch.uint8)
            tier.write(slots, list(data)).wait()
            started = threading.Event()

            def collect_later(call, buffers):
                started.wait(5)
                return collect(call, buffers)

            tier._file.plan = {("read", number): collect_later for number in range(4)}
            transfers = [tier.read([slot], [torch.zeros_like(data[0])]) for slot in slots]
            cycle = [tier]
            cycle.append(cycle)
            del tier, cycle
            started.set()
            deadline = time.monotonic() + 5
            while (threads() or files_in(tmp_path)) and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            gc.enable()
        assert_nothing_left(tmp_path, budget, transfers)

    def test_an_exception_in_the_constructor(self, tmp_path, monkeypatch):
        monkeypatch.setattr(disk, "RecordTable", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            DiskTier(BLOCK, Budget("disk", BLOCK), tmp_path)
        gc.collect()
        assert files_in(tmp_path) == []

    def test_an_exception_in_the_user_s_code(self, tmp_path):
        def generate():
            _tier, budget, transfers = busy_tier(tmp_path)
            left.extend([budget, transfers])
            raise KeyboardInterrupt

        left = []
        with contextlib.suppress(KeyboardInterrupt):
            generate()
        gc.collect()
        assert_nothing_left(tmp_path, *left)

    def test_idle_threads_keep_no_tensors(self, tmp_path):
        tier, _, transfers = busy_tier(tmp_path)
        for transfer in transfers:
            transfer.wait()
        transfers.clear()
        time.sleep(0.05)
        gc.collect()
        kept = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == BLOCK]
        assert kept == []
        tier.close()

    def test_no_threads_before_the_first_transfer(self, tmp_path):
        tier = DiskTier(BLOCK, Budget("disk", BLOCK), tmp_path)
        tier.allocate()
        assert threads() == []
        tier.close()


def in_child(function, children=None, beside: threading.Thread | None = None) -> int:
    """Run `function` in a forked child, without finalizers; its exit code, 0 if it returns.

    beside: a thread to start in the parent, which finds the child's id in `children`.
    """
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # its OpenMP threads stayed in the parent
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if beside is not None:
        children.append(pid)
        beside.start()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestOtherProcesses:
    def test_a_killed_process_leaves_no_file(self, tmp_path):
        ready, say_ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            _tier, _, _ = busy_tier(tmp_path)
            os.write(say_ready, b".")
            time.sleep(60)
            os._exit(1)
        os.read(ready, 1)
        targets = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                targets.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        assert any(target.startswith(str(tmp_path)) for target in targets)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(ready)
        os.close(say_ready)
        assert os.listdir(tmp_path) == []

    def test_a_forked_child_is_refused_and_does_no_harm(self, tmp_path):
        tier, _, transfers = busy_tier(tmp_path)
        out = torch.zeros(NUM_SLOTS, BLOCK, dtype=torch.uint8)

        def child():
            for verb in (
                tier.allocate,
                lambda: tier.free(0),
                lambda: tier.read([0], [out[0]]),
                lambda: tier.write([0], [out[0]]),
            ):
                with pytest.raises(ClosedCacheError, match="fork"):
                    verb()
            tier.close()
            assert files_in(tmp_path) == []

        assert in_child(child) == 0
        for transfer in transfers:
            transfer.wait()
        tier.read(range(NUM_SLOTS), list(out)).wait()
        assert out.any()
        tier.close()

    def test_a_real_limit_of_the_system_at_allocate(self, tmp_path):
        """`ulimit -f` of 20 records: known when the slot is asked for, the rest stays usable."""
        data = torch.randint(0, 256, (20, BLOCK), dtype=torch.uint8)

        def child():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20 * BLOCK, 20 * BLOCK))
            tier = DiskTier(BLOCK, Budget("disk", NUM_SLOTS * BLOCK), tmp_path)
            slots = [tier.allocate() for _ in range(20)]
            for _ in range(2):
                with pytest.raises(TierIOError, match="ulimit -f"):
                    tier.allocate()
            assert tier.budget.used_bytes == tier.committed_bytes == 20 * BLOCK
            tier.write(slots, list(data)).wait()
            out = torch.zeros_like(data)
            tier.read(slots, list(out)).wait()
            assert out.numpy().tobytes() == data.numpy().tobytes()

        assert in_child(child) == 0

    def test_ctrl_c_interrupts_a_wait_and_nothing_is_left(self, tmp_path):
        def stand_still(call, buffers):
            time.sleep(0.5)
            return call(buffers)

        def child():
            def generate():
                tier = DiskTier(BLOCK, budget, tmp_path, open_file=FaultyFile)
                tier._file.plan = {("write", 0): stand_still}
                transfers.append(tier.write([tier.allocate()], [data]))
                os.write(say_ready, b".")
                transfers[0].wait()

            budget, transfers = Budget("disk", BLOCK), []
            with pytest.raises(KeyboardInterrupt) as caught:
                generate()
            assert not transfers[0].is_ready()
            del caught
            gc.collect()
            assert_nothing_left(tmp_path, budget, transfers)

        data = torch.zeros(BLOCK, dtype=torch.uint8)
        ready, say_ready = os.pipe()
        interrupter = threading.Thread(
            target=lambda: (os.read(ready, 1), time.sleep(0.1), os.kill(children[0], signal.SIGINT))
        )
        children = []
        assert in_child(child, children, interrupter) == 0
        interrupter.join()
        os.close(ready)
        os.close(say_ready)

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["exit", "ctrl-c while waiting"])
    def test_a_real_end_with_reads_under_way_is_quick_and_leaves_nothing(
        self, tmp_path, end, mover
    ):
        script = """
            import os, signal, sys, threading, time
            import torch
            from hf_tiered_cache.tiers import Budget, DiskTier

            tier = DiskTier(65536, Budget("disk", 64 * 65536), sys.argv[1], mover=sys.argv[3])
            data = torch.zeros(64, 65536, dtype=torch.uint8)
            slots = [tier.allocate() for _ in range(64)]
            tier.write(slots, list(data)).wait()
            reads = [tier.read(slots[::-2], list(data)[::2]) for _ in range(100)]
            if sys.argv[2] != "exit":
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                while True:
                    tier.read(slots[::-2], list(data)[::2]).wait()
            print(time.time())
        """
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), end, mover],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if end == "exit":
            assert (process.returncode, process.stderr) == (0, "")
            assert time.time() - float(process.stdout) < 5
        else:
            assert process.returncode == -signal.SIGINT
            assert "KeyboardInterrupt" in process.stderr
        assert "Exception ignored" not in process.stderr
        assert os.listdir(tmp_path) == []


def test_a_transfer_of_a_closed_tier_can_still_be_waited_for(tmp_path):
    tier, _, transfers = busy_tier(tmp_path)
    transfers[0].wait()
    tier.close()
    transfers[0].wait()
    with pytest.raises(ClosedCacheError):
        tier.allocate()
