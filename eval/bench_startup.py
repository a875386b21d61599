"""What starting costs: CPU seconds of fresh interpreters, before anything is computed.

    python eval/bench_startup.py

Every way is started in turn, and the least of the rounds counts: whatever else runs on the machine
only adds. A first round fills the page cache. From the imports of others an interpreter that does
nothing is taken off.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import benchmarking

ROOT = Path(__file__).parent.parent
RUN = "import sys; sys.argv = ['', *{!r}]; import hf_tiered_cache.__main__ as m; m.main()"
AUTO = "from transformers import AutoModelForCausalLM"
MODEL = "from transformers import AutoModelForCausalLM, LlamaForCausalLM"  # as loading one does
PACKAGE, CACHE = "import hf_tiered_cache", "from hf_tiered_cache import TieredCache"
COMMANDS = {
    "hf-tiered-cache --help": ["--help"],
    "hf-tiered-cache --version": ["--version"],
    "hf-tiered-cache verify --help": ["verify", "--help"],
    "hf-tiered-cache verify MODEL --chunk=0 (an error)": [
        *("verify", str(ROOT / "eval" / "tiny_lm"), "--chunk=0")
    ],
}
BESIDE = {  # (what stands before, what is added, whether it has a bar)
    "import hf_tiered_cache": ("pass", PACKAGE, True),
    "import hf_tiered_cache, beyond AutoModelForCausalLM": (AUTO, PACKAGE, True),
    "import TieredCache, beyond a model's class": (MODEL, CACHE, True),
    "import TieredCache, beyond AutoModelForCausalLM": (AUTO, CACHE, False),
    "a model's class, beyond AutoModelForCausalLM": (AUTO, MODEL, False),
}
BAR_COMMAND, BAR_PACKAGE = 1.0, 0.3


def main() -> None:
    arguments = parse_arguments()
    codes = ["pass", "import torch", AUTO, MODEL]
    codes += [RUN.format(given) for given in COMMANDS.values()]
    beside = [beyond(before, added) for before, added, _ in BESIDE.values()]
    least = dict.fromkeys([*codes, *beside], float("inf"))
    for number in range(arguments.rounds + 1):
        for code in least:
            seconds = cpu_seconds(code)
            if number:
                least[code] = min(least[code], seconds)

    table = benchmarking.Table("start-up: CPU seconds of a fresh interpreter")
    for code in ("import torch", AUTO, MODEL):
        table.value(code, f"{least[code] - least['pass']:.2f} s")
    for what, given in COMMANDS.items():
        add(table, what, least[RUN.format(given)], BAR_COMMAND)
    for what, (before, added, has_bar) in BESIDE.items():
        add(table, what, least[beyond(before, added)], BAR_PACKAGE if has_bar else None)
    table.finish(arguments.json)


def beyond(before: str, added: str) -> str:
    """Code that prints the CPU seconds of `added` behind `before`, in one process: the difference
    of two would be lost in what they vary."""
    clock = "from time import process_time; start = process_time()"
    return f"{before}; {clock}; {added}; print(process_time() - start)"


def add(table: benchmarking.Table, what: str, seconds: float, bar: float | None) -> None:
    """A row, in seconds, that should be below its bar."""
    if bar is None:
        table.value(what, f"{seconds:.2f} s", note="transformers' own, which any model needs")
    else:
        table.value(what, f"{seconds:.2f} s", bar=f"{bar:g} s", is_reached=seconds < bar)


def cpu_seconds(code: str) -> float:
    """What `code` prints as its own in a fresh interpreter, else the user and system time of that
    interpreter with all its threads."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    with process.stdout as output:
        printed = output.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or it would be waited for again
    if process.returncode not in (0, 2):  # 2: the error that was asked for
        raise RuntimeError(f"exit code {process.returncode} of: {code}")
    if "process_time" in code:
        return float(printed)
    return usage.ru_utime + usage.ru_stime


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
