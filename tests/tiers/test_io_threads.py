"""Jobs start in order, end before close returns, and are cancelled when queued."""

import threading

import pytest

from hf_tiered_cache.tiers.io_threads import IOThreads


class Job:
    def __init__(self, work=lambda: None) -> None:
        self.work = work
        self.outcome = ""

    def run(self) -> None:
        self.work()
        self.outcome = "ran"

    def cancel(self) -> None:
        self.outcome = "cancelled"


def test_one_thread_keeps_the_order():
    seen = []
    pool = IOThreads(1, "test")
    pool.start()
    done = threading.Event()
    for number in range(100):
        pool.submit(Job(lambda number=number: seen.append(number)))
    pool.submit(Job(done.set))
    assert done.wait(5)
    assert seen == list(range(100))
    pool.close()


def test_close_ends_the_running_and_cancels_the_queued():
    pool = IOThreads(2, "test")
    pool.start()
    running, go_on = threading.Barrier(3), threading.Event()
    under_way = [Job(lambda: (running.wait(5), go_on.wait(5))) for _ in range(2)]
    queued = [Job() for _ in range(5)]
    for job in [*under_way, *queued]:
        pool.submit(job)
    running.wait(5)
    threading.Timer(0.05, go_on.set).start()
    pool.close()
    pool.close()
    assert [job.outcome for job in under_way] == ["ran"] * 2
    assert [job.outcome for job in queued] == ["cancelled"] * 5
    assert not [t for t in threading.enumerate() if t.name.startswith("test-")]


def test_fewer_threads_than_asked_do_as_well(monkeypatch):
    started = []

    class Scarce(threading.Thread):
        def start(self):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    monkeypatch.setattr(threading, "Thread", Scarce)
    pool = IOThreads(4, "test")
    pool.start()
    assert len(started) == 2
    pool.start()
    job, done = Job(), threading.Event()
    pool.submit(job)
    pool.submit(Job(done.set))
    assert done.wait(5)
    pool.close()


def test_not_even_one_thread_is_an_error(monkeypatch):
    class Never(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "Thread", Never)
    with pytest.raises(RuntimeError):
        IOThreads(4, "test").start()
