"""Flags between a stream and host threads."""

import threading
import time

import pytest
import torch


@pytest.fixture
def word():
    """A flag, down."""
    return torch.zeros(1, dtype=torch.int32)


def test_a_written_flag_is_seen(core, word):
    core.module.write_flag(0, 1, word.data_ptr(), 41)
    assert word.item() == 41


@pytest.mark.parametrize("value", [5, 6])
def test_a_stream_passes_a_flag_that_is_up(core, word, value):
    word.fill_(value)
    core.module.wait_flag(0, 1, word.data_ptr(), 5)


def test_flags_may_wrap_around(core, word):
    word.fill_(3)
    core.module.wait_flag(0, 1, word.data_ptr(), 2**32 - 2)


def test_a_stream_waits_for_a_host_thread_without_the_interpreter_lock(core, word):
    raised = []

    def raise_later() -> None:
        time.sleep(0.05)
        raised.append(True)
        word.fill_(9)

    host = threading.Thread(target=raise_later)
    host.start()
    core.module.wait_flag(0, 1, word.data_ptr(), 9)  # the emulated stream is the caller
    assert raised == [True]
    host.join()
