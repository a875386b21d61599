"""The build for this machine's own GPU, and tests/gpu, each in a process of its own; what they say
goes to a file."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from sections import Row

from gpu_bench.workshop import Bench

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 70
TESTS_SECONDS = 100
BUILD = ("setup.py", "build_ext", "--inplace")
PROCESSES = 6  # of tests: each has a context of a few hundred MiB on the device
LAST_LINES = 40


def build(bench: Bench, arguments: Sequence[str] = BUILD) -> Iterator[Row]:
    """Compile the cores in place, before anybody loads them; on the CPU, where only the code is
    tried, they are left alone. Where that fails, whatever is there is measured."""
    start = perf_counter()
    if arguments is BUILD and not bench.machine.is_cuda:
        arguments = ("setup.py", "--version")
    command, choice = (sys.executable, *arguments), {"HF_TIERED_CACHE_BUILD_CUDA": "native"}
    status, lines = logged(bench, "build.log", command, BUILD_SECONDS, choice)
    if status:
        note = f"status {status}: {last_words(lines)}; going on with what is there"
        yield Row("build", verdict="FAILED", note=note, data={"output": lines[-LAST_LINES:]})
    else:
        yield Row("build", f"{perf_counter() - start:.0f} s", note=str(bench.log("build.log")))


def tests(bench: Bench) -> Iterator[Row]:
    """tests/gpu; with pytest-xdist several at a time."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=60"]  # one that hangs says where
    # Those that run on the CPU too, and on the CPU one: the rest is run by the suite itself.
    command += ["-k", "not cpu" if bench.machine.is_cuda else "whole_table"]
    if importlib.util.find_spec("xdist") and bench.machine.is_cuda:
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    status, lines = logged(bench, "tests.log", command, TESTS_SECONDS - 5)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    passed = re.search(r"(\d+) passed", last_words(lines))
    print("\n".join(lines[-LAST_LINES:] if status else lines[-1:]), flush=True)
    yield Row(
        "tests/gpu",
        f"{passed[1]} passed" if passed else f"status {status}",
        "all",
        "all",
        "FAILED" if status else "reached",
        f"{last_words(lines)}; {bench.log('tests.log')}",
        {"failed": failed, "output": lines[-1000:] if status else []},
    )


def logged(
    bench: Bench,
    name: str,
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, list[str]]:
    """(exit status, lines) of a command, which are in the log of that name as they come."""
    path = bench.log(name)
    with path.open("w") as file:
        try:
            status = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
            file.write(f"\nnot finished in {seconds:.0f} s\n")
        except OSError as error:
            status = -1
            file.write(f"{error}\n")
    return status, path.read_text(errors="replace").splitlines()


def last_words(lines: Sequence[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "nothing was said")
