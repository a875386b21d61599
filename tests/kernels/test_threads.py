"""Threads change nothing: not their number, not callers at once, not a fork."""

import contextvars
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import emulated
import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def large(make_case, queries: int, dtype: torch.dtype):
    """A case with enough bytes for several threads."""
    return make_case(
        batch=2, kv_heads=4, group=4, queries=queries, tokens=1100, block_tokens=64, dtype=dtype
    )


def in_this_context(call, *arguments) -> threading.Thread:
    """A thread that is forced to the kernel of the test."""
    return threading.Thread(target=contextvars.copy_context().run, args=(call, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 120])
def test_number_of_threads_gives_the_same_bits(make_case, kernel, queries, dtype, two_threads):
    if kernel == "reference":
        pytest.skip("torch's matmul decides")
    case = large(make_case, queries, dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results += [case.attend() for _ in range(3)]
    assert all(torch.equal(result.out, results[0].out) for result in results)
    assert all(torch.equal(result.lse, results[0].lse) for result in results)


def test_calls_from_several_python_threads_at_once(make_case, kernel, two_threads):
    if kernel == emulated.NAME:
        pytest.skip("the emulation does one call at a time")
    cases = [large(make_case, queries, torch.bfloat16) for queries in (1, 30)]
    expected = [case.attend().out for case in cases]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(8):
            if not torch.equal(cases[index].attend().out, expected[index]):
                wrong.append(index)

    callers = [in_this_context(call, number % 2) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    if kernel != "reference":
        assert wrong == []


def test_the_interpreter_runs_on_during_a_call(make_case, kernel, two_threads):
    if kernel == "reference":
        pytest.skip("torch's own matter")
    if kernel == emulated.NAME:
        pytest.skip("takes minutes; tests/cuda/test_flags.py has the same")
    case = make_case(kv_heads=4, group=8, queries=600, tokens=1200, block_tokens=64)
    ticks = 0
    done = threading.Event()

    def call() -> None:
        case.attend()
        done.set()

    caller = in_this_context(call)
    interval = sys.getswitchinterval()
    caller.start()
    while not done.is_set():
        ticks += 1
    caller.join()
    assert ticks > 0
    assert sys.getswitchinterval() == interval


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(make_case, kernel, two_threads):
    if kernel == "reference":
        pytest.skip("torch's OpenMP does not survive a fork")
    if kernel == emulated.NAME:
        pytest.skip("CUDA does not survive a fork")
    case = large(make_case, 1, torch.bfloat16)
    expected = case.attend().out  # the parent's pool exists now
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if torch.equal(case.attend().out, expected) else 2
        finally:
            os._exit(status)
    for _ in range(3):
        assert torch.equal(case.attend().out, expected)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_of_two_callers_none_is_left_alone(tmp_path):
    """As the lanes of two GPUs: who comes second gets the threads when the first has ended."""
    if shutil.which("g++") is None:
        pytest.skip("a small program is compiled by g++, which is missing")
    root = Path(__file__).parents[2]
    program = tmp_path / "two_callers"
    sources = [root / "tests" / "cpp" / "two_callers.cpp", root / "csrc" / "thread_pool.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{root / 'csrc'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
