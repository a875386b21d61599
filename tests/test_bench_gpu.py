"""eval/bench_gpu.py: every section's code runs on the CPU, with no more packages than needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
import torch
from sections import Row, Skipped

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
    command = ["eval/bench_gpu.py", "--device", "cpu", "--tiny", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=without_packages,
        timeout=550,
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
        "copy lane's share",
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
    assert skipped == ["decode: over transformers' offloading"], "it needs CUDA"
    shares = [what for what in rows if "off the device" in what]
    assert len(shares) == 4, "two shares at each of two contexts"
    assert "bars reached, 0 failed" in done.stdout


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
    bench = bench_gpu.Bench("cpu", bench_gpu.FULL, {})
    assert bench.token_bytes() == 128 * 1024
    free = {"device": 1 << 50, "host": 1 << 50}
    monkeypatch.setattr(bench_gpu.Machine, "free_bytes", lambda _: free["device"])
    monkeypatch.setattr(bench_gpu, "free_memory_bytes", lambda: free["host"])
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


def test_all_sections_fit_into_ten_minutes():
    seconds = sum(seconds for seconds, _ in bench_gpu.SECTIONS.values())
    assert seconds + 60 <= bench_gpu.TIME_LIMIT_SECONDS < 600


def test_make_gpu_takes_the_python_it_is_given_and_makes_no_environment():
    command = ["make", "--dry-run", "--no-print-directory", "gpu", "PYTHON=python3"]
    # Not as a part of the `make test` that may be running this.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2
    assert "python3 setup.py build_ext --inplace" in lines[0]
    assert "python3 eval/bench_gpu.py" in lines[1]
    assert not any(word in done.stdout for word in ("venv", "pip", ".ready"))
