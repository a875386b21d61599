"""Budgets, transfers, the registry."""

import gc
import os
import threading

import pytest
import torch

from hf_tiered_cache.errors import (
    ClosedCacheError,
    ConfigError,
    TierIOError,
    UnsupportedInputError,
    io_error,
)
from hf_tiered_cache.tiers import Budget
from hf_tiered_cache.tiers.base import check_blocks
from hf_tiered_cache.transfers import DONE, Transfer


class Holder:
    """Holds bytes of a budget."""


class TestBudget:
    def test_is_a_hard_cap(self):
        budget, one, other = Budget("disk", 100), Holder(), Holder()
        assert budget.hold(one, 60)
        assert not budget.hold(other, 41)
        assert budget.used_bytes == 60
        assert budget.hold(other, 40)
        assert budget.free_bytes == 0
        assert not budget.hold(one, 61)
        assert budget.used_bytes == 100

    def test_a_holder_says_how_much_it_holds_in_all(self):
        budget, holder = Budget("disk", 100), Holder()
        for num_bytes in (70, 70, 20, 30):
            assert budget.hold(holder, num_bytes)
        assert (budget.used_bytes, budget.peak_bytes) == (30, 70)

    def test_what_a_dropped_holder_held_is_free(self):
        budget, holder = Budget("disk", 100), Holder()
        budget.hold(holder, 100)
        del holder
        gc.collect()
        assert budget.free_bytes == 100

    def test_negative_limit_names_the_knob(self):
        with pytest.raises(ConfigError, match="disk_bytes is -1"):
            Budget("disk", -1)

    def test_is_never_exceeded_by_threads(self):
        budget = Budget("disk", 1000)
        holders = [Holder() for _ in range(8)]
        held = []

        def take(holder: Holder) -> None:
            num_bytes = 0
            for _ in range(200):
                num_bytes += 7 * budget.hold(holder, num_bytes + 7)
            held.append(num_bytes)

        threads = [threading.Thread(target=take, args=[holder]) for holder in holders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(held) == 1000 // 7 * 7
        assert budget.used_bytes == budget.peak_bytes == 1000 // 7 * 7


class TestTransfer:
    """pending -> done, pending -> failed: every state and transition of the docstring."""

    def test_pending_until_its_last_part_ended(self):
        transfer = Transfer(2)
        assert not transfer.is_ready()
        for _ in range(2):  # a part ends once
            transfer.end_part(part="first")
            assert not transfer.is_ready()
        assert repr(transfer) == "Transfer(pending)"
        transfer.end_part(part="second")
        assert transfer.is_ready()
        assert repr(transfer) == "Transfer(done)"
        transfer.wait()

    def test_failed_part_fails_it_once_all_ended(self):
        transfer = Transfer(2)
        transfer.end_part(io_error(5, "record 3"), part="first")
        assert not transfer.is_ready()  # the other part still touches memory
        transfer.end_part(part="second")
        assert transfer.is_ready()
        assert repr(transfer) == "Transfer(failed)"

    def test_failed_raises_every_time_with_errno(self):
        transfer = Transfer()
        transfer.end_part(io_error(28, "record 3"))
        raised = []
        for _ in range(3):
            with pytest.raises(TierIOError, match="record 3") as caught:
                transfer.wait()
            raised.append(caught.value)
        assert {error.errno for error in raised} == {28}
        assert len({id(error) for error in raised}) == 3  # fresh: no growing traceback

    def test_first_error_wins_and_the_cause_is_kept(self):
        cause = OSError(5, "device")
        first = io_error(5, "first")
        first.__cause__ = cause
        transfer = Transfer(2)
        transfer.end_part(first, part="first")
        transfer.end_part(io_error(5, "second"), part="second")
        with pytest.raises(TierIOError, match="first") as caught:
            transfer.wait()
        assert caught.value.__cause__ is cause

    def test_all_waiting_threads_go_on(self):
        transfer = Transfer()
        gone = threading.Barrier(5)
        for _ in range(4):
            threading.Thread(target=lambda: (transfer.wait(), gone.wait(5))).start()
        transfer.end_part()
        gone.wait(5)

    def test_an_end_stays_as_it_was_said_first(self):
        transfer = Transfer()
        transfer.end_part()
        transfer.end_part(io_error(5, "too late"))
        transfer.wait()

    def test_an_interrupt_while_it_ends_is_made_good_by_the_next_look(self, monkeypatch):
        transfer = Transfer()
        with monkeypatch.context() as patch:
            patch.setattr(Transfer, "_look", lambda _: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                transfer.end_part()
        assert transfer.is_ready()
        transfer.wait()

    def test_its_bytes_moved_from_the_first_begin_to_the_last_end(self):
        transfer = Transfer(3)
        transfer.end_part(part=0, began=2.0, ended=5.0)
        transfer.end_part(part=1, began=1.0, ended=3.0)
        assert (transfer.began_at, transfer.ended_at) == (None, None)
        transfer.end_part(part=2, ended=4.0)
        assert (transfer.began_at, transfer.ended_at) == (1.0, 5.0)

    def test_done_is_shared_and_ready(self):
        assert DONE.is_ready()
        DONE.wait()

    def test_pending_one_does_not_hang_a_forked_child(self):
        transfer = Transfer()
        pid = os.fork()
        if pid == 0:
            try:
                transfer.wait()
            except ClosedCacheError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


class TestCheckBlocks:
    def test_every_reason_is_named(self):
        good = torch.zeros(4096, dtype=torch.uint8)
        bad = [
            good,
            torch.zeros(4096),
            torch.zeros(8, dtype=torch.uint8),
            torch.zeros(8192, dtype=torch.uint8)[::2],
            torch.zeros(1, 4096, dtype=torch.uint8),
        ]
        with pytest.raises(UnsupportedInputError) as caught:
            check_blocks(range(5), bad, 4096)
        message = str(caught.value)
        assert "slot 0" not in message
        assert "slot 1: expected a contiguous uint8 tensor [4096], got float32 [4096]" in message
        assert "slot 2" in message
        assert "not contiguous" in message
        assert "[1, 4096]" in message

    def test_lengths_must_agree(self):
        with pytest.raises(UnsupportedInputError, match="2 slots but 1 tensors"):
            check_blocks([0, 1], [torch.zeros(4096, dtype=torch.uint8)], 4096)
