"""eval/bench_gpu.py: every section's code runs on the CPU, with no more packages than needed."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench_gpu
import pytest
import torch
from fake_cuda import GPU, FakeStream, fake_gpu
from gpu_bench import decode, machine, selftest, suite, workshop
from gpu_bench.workshop import TINY_SIZES, Bench
from sections import Row, Skipped, run_sections
from tiers.late_lane import RefusingPinning

ROOT = Path(__file__).parent.parent


@pytest.fixture
def without_packages(tmp_path) -> dict[str, str]:
    """An environment in which what a GPU machine may lack cannot be imported."""
    folder = tmp_path / "missing"
    folder.mkdir()
    for name in ("datasets", "evaluate"):
        (folder / f"{name}.py").write_text(f'raise ImportError("{name} is missing")')
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


def test_every_section_runs_on_the_cpu(tmp_path, without_packages):
    path = tmp_path / "results" / "gpu.json"
    logs = tmp_path / "logs"
    command = ["eval/bench_gpu.py", "--device", "cpu", "--tiny", "--json", str(path)]
    command += ["--log-dir", str(logs)]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=without_packages,
        timeout=bench_gpu.TIME_LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    assert {"torch", "transformers", "processor", "device", "sizes"} <= set(results)
    rows = {row["what"]: row for row in results["rows"]}
    assert not [row for row in rows.values() if row["verdict"] == "FAILED"]
    for part in (
        "tests/gpu",
        "copy host to device",
        "copy device to host",
        "both directions at once",
        "CPU attention over host blocks",
        "hand-off",
        "locking",
        "memory nodes",
        "everything fits",
        "build",
        "the CPU's thread after",
        "decode kernel",
        "DynamicCache, without cuDNN",
        "of the copy rate",
        "profile of 2 tokens",
        "prefill",
        "error against float64 over sdpa's, decode",
        "longest context on 24 GB",
        "device memory at its peak",
    ):
        assert any(part in what for what in rows), part
    for what, row in rows.items():
        assert what in done.stdout
        assert row["measured"] or row["verdict"] == "skipped", what
    skipped = [what for what, row in rows.items() if row["verdict"] == "skipped"]
    assert skipped == [
        "self-test: flags",
        "self-test: copies from registered memory",
        "decode 512: transformers' offloading",
    ], "they need CUDA"
    sides = [row for what, row in rows.items() if what.startswith("decode ") and "% off" in what]
    assert len([row for row in sides if "ours" in row["data"]]) == 5
    for time in sides[0]["data"]["ours"]:
        assert time["device"] >= time["host"] > 0 and time["cpu"] > 0
    assert "bars reached, 0 failed" in done.stdout
    assert {one.name for one in logs.iterdir()} == {"build.log", "profile.txt", "tests.log"}
    assert not list(path.parent.glob("*.partial"))


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--json", str(path)])
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()
    assert not path.exists()


@pytest.mark.parametrize(("verdict", "status"), [("FAILED", 1), ("MISSED", 0), ("skipped", 0)])
def test_a_failed_section_is_in_the_exit_status(tmp_path, monkeypatch, capsys, verdict, status):
    path = tmp_path / "gpu.json"

    def planted(sections, make_bench, *, time_limit, write):
        assert list(sections) == ["link", "error"]
        rows = [Row("link", verdict=verdict)]
        write(rows, {"device": "none"})
        return rows

    monkeypatch.setattr(bench_gpu, "run_sections", planted)
    arguments = ["--device", "cpu", "--json", str(path), "--sections", "link", "error"]
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main()
    assert ended.value.code == status
    assert verdict in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["verdict"] == verdict


def test_what_does_not_fit_is_halved_or_skipped(monkeypatch):
    bench = Bench("cpu", workshop.FULL, {})
    assert bench.token_bytes() == 128 * 1024
    free = {"device": 1 << 50, "host": 1 << 50}
    monkeypatch.setattr(machine.Machine, "free_bytes", lambda _: free["device"])
    monkeypatch.setattr(workshop, "free_memory_bytes", lambda: free["host"])
    assert bench.context_that_fits(131072, [0.5]) == 131072
    free["device"] = 24 << 30  # 1.6 times 16 GiB do not fit, 8 GiB do
    assert bench.context_that_fits(131072, [0.5]) == 65536
    free["host"] = 8 << 30
    assert bench.context_that_fits(131072, [0.5]) == 32768
    free["host"] = 1 << 20
    with pytest.raises(Skipped, match="too little memory"):
        bench.context_that_fits(131072, [0.5])
    free["device"] = 8 << 30
    with pytest.raises(Skipped, match="the model's 15 GiB do not fit into 8"):
        bench.model  # noqa: B018 - made when asked for


@pytest.fixture
def tiny(tmp_path) -> Bench:
    return Bench("cpu", TINY_SIZES, {}, tmp_path / "logs")


def test_a_side_that_runs_out_of_memory_costs_no_other(tiny, monkeypatch):
    whole = Bench.tiered

    def scarce(bench, context, share, **knobs):
        if share == 0.5:
            raise torch.OutOfMemoryError("planted: no memory\nwith details")
        return whole(bench, context, share, **knobs)

    monkeypatch.setattr(Bench, "tiered", scarce)
    monkeypatch.setattr(decode, "SETTLE_TOKENS", 2)
    rows = {row.what: row for row in decode.decode(tiny, 128, decode.SHORT, False)}
    failed = [what for what, row in rows.items() if row.verdict == "FAILED"]
    assert failed == ["decode 128: 50% off, both lanes"]
    assert rows[failed[0]].note == "OutOfMemoryError: planted: no memory"
    assert "in scarce" in rows[failed[0]].data["traceback"]
    for what in ("everything fits", "90% off, both lanes", "90% off, copy lane"):
        assert rows[f"decode 128: {what}"].measured


def test_a_build_that_fails_is_a_row_and_the_rest_goes_on(tmp_path):
    planted = ("-c", "raise SystemExit('planted: no nvcc')")
    rows = run_sections(
        {"build": (60.0, partial(suite.build, arguments=planted)), "next": (60.0, suite.build)},
        partial(bench_gpu.make_bench, "cpu", TINY_SIZES, tmp_path),
        time_limit=400.0,
        write=lambda *_: None,
    )
    assert [row.verdict for row in rows] == ["FAILED", ""]
    assert "planted: no nvcc; going on" in rows[0].note


def test_without_pytest_the_tests_are_a_row_that_failed(tiny, tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text('raise ImportError("planted: no pytest")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = suite.tests(tiny)
    assert row.verdict == "FAILED"
    assert "planted: no pytest" in row.note
    assert "planted: no pytest" in tiny.log("tests.log").read_text()


def test_a_command_that_hangs_is_ended_and_one_that_is_missing_is_told(tiny):
    sleeper = (sys.executable, "-u", "-c", "import time; print('begun'); time.sleep(100)")
    status, lines = suite.logged(tiny, "x.log", sleeper, 3)
    assert status == -1
    assert (lines[0], lines[-1]) == ("begun", "not finished in 3 s")
    status, lines = suite.logged(tiny, "x.log", ["/no/such/thing"], 3)
    assert status == -1
    assert "No such file" in suite.last_words(lines)


def test_the_self_test_asks_the_core_what_the_lanes_ask(tiny, monkeypatch):
    """On a device it is run by nobody before the one run that counts: here over the emulation."""
    with fake_gpu() as gpu:
        stream = FakeStream(GPU)
        stream.device_index = 0
        monkeypatch.setattr(selftest, "core_and_stream", lambda _: (gpu.module, stream))
        monkeypatch.setattr(selftest, "CudaPinning", lambda _device: RefusingPinning())
        monkeypatch.setattr(RefusingPinning, "unregister", lambda *_: None)
        assert [row.measured for row in selftest.flags(tiny)] == ["work"]
        rows = list(selftest.registered_copies(tiny))
        assert len(rows) == len(selftest.PIECE_BYTES)
        assert {row.note for row in rows} == {"right"}
        monkeypatch.setattr(gpu.module.module, "write_flag", lambda *_: None)
        with pytest.raises(RuntimeError, match="not raised"):
            list(selftest.flags(tiny))


def test_all_sections_fit_into_ten_minutes():
    """But for the last, which takes what is left."""
    *most, _ = (seconds for seconds, _ in bench_gpu.SECTIONS.values())
    assert sum(most) + 30 <= bench_gpu.TIME_LIMIT_SECONDS <= 480


def test_make_gpu_takes_the_python_it_is_given_and_makes_no_environment():
    command = ["make", "--dry-run", "--no-print-directory", "gpu", "PYTHON=python3", "GPU=--json x"]
    # Not as a part of the `make test` that may be running this.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1
    assert "python3 eval/bench_gpu.py --json x" in lines[0]
    assert not any(word in done.stdout for word in ("venv", "pip", ".ready"))
