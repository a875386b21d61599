"""Everything about a GPU in one command: build, self-test, kernels, decode, tests, link, capacity.

    make gpu                              (builds in place first; PYTHON=python3 is the default)
    make gpu GPU="--json path --log-dir dir"
    python eval/bench_gpu.py --quick
    python eval/bench_gpu.py --sections link decode_short
    python eval/bench_gpu.py --device cpu --tiny          (tries the code of every section)

A random model of Llama-3.1-8B's shape in bfloat16 decodes behind random keys and values (a prefill
would take minutes and is the same model code on both sides). Ratios are of medians of sides timed
in turn, in one process: ours over `DynamicCache` all on the GPU (with torch's choice of attention
or without cuDNN's, whichever is faster), over transformers' offloading, and over the machine's own
copy rate. Beside the time of the device stands that of the host. Predictions are those of a
closed-form model with the constants of an H200: copies at 52 GB/s, 25 ms of launches per token; the
range is copies alone to both lanes.

A section that fails does not keep the others from running, nor a part of one its neighbours (see
sections.py); rows are printed and written as they come, and the exit status is then 1. The sections
are in gpu_bench/. Needs no network and no packages but the library's and pytest.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_bench import decode, kernels, link, memory, prefill, selftest, suite
from gpu_bench.workshop import FULL, LOG_DIR, QUICK, TINY_SIZES, Bench, Sizes
from sections import Row, Section, print_table, run_sections
from transformers.utils import logging

import benchmarking

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TIME_LIMIT_SECONDS = 480  # whoever lends a GPU for ten minutes takes some of them to start it

# Name -> (seconds it may need, what it does); in the order of what one wants to know first.
SECTIONS: dict[str, tuple[float, Section]] = {
    "build": (suite.BUILD_SECONDS, suite.build),
    "selftest": (10, selftest.selftest),
    "kernels": (15, kernels.kernels),
    "link": (35, link.link),
    "decode_short": (80, decode.decode_short),
    "profile": (20, decode.profile),
    "decode_long": (60, decode.decode_long),
    "tests": (suite.TESTS_SECONDS, suite.tests),
    "prefill": (25, prefill.prefill),
    "error": (10, prefill.error),
    "memory": (15, memory.memory),
    "capacity": (40, memory.capacity),
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False (--device cpu --tiny tries)")
    rows = run_sections(
        {name: SECTIONS[name] for name in arguments.sections},
        partial(make_bench, arguments.device, sizes_named(arguments), Path(arguments.log_dir)),
        time_limit=arguments.time_limit,
        write=partial(write, arguments),
    )
    has_no_failure = print_table(rows)
    print(f"written to {arguments.json}, logs in {arguments.log_dir}")
    sys.exit(0 if has_no_failure else 1)


def make_bench(device: str, sizes: Sizes, log_dir: Path, rates: dict[str, float]) -> Bench:
    torch.manual_seed(0)
    logging.set_verbosity_error()
    return Bench(device, sizes, rates, log_dir)


def sizes_named(arguments: argparse.Namespace) -> Sizes:
    return TINY_SIZES if arguments.tiny else QUICK if arguments.quick else FULL


def write(arguments: argparse.Namespace, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """The JSON as far as it got, whole at every moment."""
    path = Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        **benchmarking.environment(),
        **facts,
        "sizes": "tiny" if arguments.tiny else "quick" if arguments.quick else "full",
        "rows": [asdict(row) for row in rows],
    }
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial_path, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="shorter contexts, 2 rounds")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: only tries the code")
    parser.add_argument("--json", default=str(RESULTS), help="where the results go")
    parser.add_argument("--log-dir", default=str(LOG_DIR), help="for build, tests and profile")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_SECONDS, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
