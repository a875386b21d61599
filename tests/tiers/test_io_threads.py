"""Jobs start in order, end before the last user left, and are done or cancelled, never both."""

import errno
import os
import threading
import time

import pytest

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.tiers.io_threads import IOThreads, Job, shared_threads


class Task(Job):
    def __init__(self, work=lambda: None) -> None:
        super().__init__()
        self.work = work
        self.outcomes = []

    def _run(self) -> None:
        self.work()
        self.outcomes.append("ran")

    def _cancel(self) -> None:
        self.outcomes.append("cancelled")


class User:
    """Somebody."""


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_one_thread_keeps_the_order():
    seen, user, threads = [], User(), IOThreads(1, "test")
    threads.enter(user)
    done = threading.Event()
    for number in range(100):
        threads.submit(Task(lambda number=number: seen.append(number)))
    threads.submit(Task(done.set))
    assert done.wait(5)
    assert seen == list(range(100))
    threads.leave(user)


def test_they_end_when_the_last_user_left_and_start_again_for_the_next():
    threads, one, other = IOThreads(2, "test"), User(), User()
    for _ in range(3):
        threads.enter(one)
        threads.enter(one)
        threads.enter(other)
        assert len(alive()) == 2
        threads.leave(one)
        threads.leave(one)
        done = threading.Event()
        threads.submit(Task(done.set))
        assert done.wait(5)
        assert len(alive()) == 2
        threads.leave(other)
        assert alive() == []


def test_who_enters_while_the_last_one_leaves_is_served():
    """Two threads come and go at the same time, many times."""
    threads, failures = IOThreads(2, "test"), []

    def come_and_go() -> None:
        for _ in range(200):
            user, done = User(), threading.Event()
            threads.enter(user)
            threads.submit(Task(done.set))
            if not done.wait(10):
                failures.append("a job was never done")
            threads.leave(user)

    callers = [threading.Thread(target=come_and_go) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert failures == []
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:  # the last to leave did not see all of them
        time.sleep(0.01)
    assert alive() == []


def test_a_job_is_run_or_cancelled_by_whoever_comes_first():
    task = Task()
    task.cancel()
    task.cancel()  # again, as after an interrupt
    task.run()
    assert set(task.outcomes) == {"cancelled"}
    task = Task()
    task.run()
    task.cancel()
    assert task.outcomes == ["ran"]
    assert task.runner == threading.get_ident()


def test_threads_are_shared_by_name_in_one_process():
    assert shared_threads(2, "test") is shared_threads(2, "test")
    assert shared_threads(2, "test") is not shared_threads(3, "test")
    assert shared_threads(2, "test") is not shared_threads(2, "other")
    before = shared_threads(2, "test")
    pid = os.fork()
    if pid == 0:
        os._exit(7 if shared_threads(2, "test") is not before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


class Scarce(threading.Thread):
    """The system starts `num_left` of them."""

    num_left = 0

    def start(self):
        if Scarce.num_left == 0:
            raise RuntimeError("can't start new thread")
        Scarce.num_left -= 1
        super().start()


def test_fewer_threads_than_asked_do_as_well(monkeypatch):
    monkeypatch.setattr(threading, "Thread", Scarce)
    Scarce.num_left = 2
    threads, user = IOThreads(4, "test"), User()
    for _ in range(2):
        threads.enter(user)
        assert len(alive()) == 2
    done = threading.Event()
    threads.submit(Task(done.set))
    assert done.wait(5)
    threads.leave(user)


def test_not_even_one_thread_is_an_error_that_heals(monkeypatch):
    monkeypatch.setattr(threading, "Thread", Scarce)
    threads, user = IOThreads(4, "test"), User()
    for _ in range(2):
        with pytest.raises(TierIOError, match=r"cannot start an I/O thread: .*ulimit -u") as caught:
            threads.enter(user)
        assert caught.value.errno == errno.EAGAIN
    monkeypatch.undo()
    threads.enter(user)
    assert len(alive()) == 4
    threads.leave(user)
    assert alive() == []


def test_an_interrupt_while_a_thread_starts_loses_none(monkeypatch):
    """`Thread.start` waits for the thread: it may be interrupted when that runs already."""
    interrupted = []

    class Interrupted(threading.Thread):
        def start(self):
            super().start()
            if not interrupted:
                interrupted.append(self)
                raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Thread", Interrupted)
    threads, user = IOThreads(2, "test"), User()
    with pytest.raises(KeyboardInterrupt):
        threads.enter(user)
    threads.enter(user)
    assert len(alive()) == 2
    threads.leave(user)
    assert alive() == []
