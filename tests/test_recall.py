"""eval/recall.py: facts on disk are recalled, token for token as without the cache, and are gone
once the blocks that hold them are dropped."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import recall
from support import without_cold_blocks

from hf_tiered_cache.evaluation import standard_library

ROOT = Path(__file__).parent.parent
QUICK = ["--lengths", "500", "--depths", "0.1", "0.9", "--samples", "1", "--block-tokens", "16"]


def run(tmp_path: Path, *more: str) -> tuple[int, dict]:
    folder = tmp_path / "results"
    code = recall.main([*QUICK, "--output", str(folder), "--disk-dir", str(tmp_path), *more])
    return code, json.loads((folder / "recall.json").read_text())


def test_facts_on_disk_are_recalled_and_dropped_ones_are_not(tmp_path):
    code, results = run(tmp_path, "--tasks", "needle", "keys")
    assert code == 0
    assert all(bar["is_reached"] for bar in results["bars"]) and len(results["bars"]) == 3
    cells = {(cell["task"], cell["depth"]): cell for cell in results["cells"]}
    assert all(cell["identical"] for cell in cells.values())
    for task in ("needle", "keys"):
        assert cells[task, 0.1]["on_disk"] == 1 and cells[task, 0.9]["on_disk"] == 0
        assert (cells[task, 0.1]["tiered"], cells[task, 0.1]["dropped"]) == (1, 0)
        assert (tmp_path / "results" / f"recall_{task}.png").stat().st_size > 1000
    assert "| needle | 500 | 0.10 | 100% |" in (tmp_path / "results" / "recall.md").read_text()


def test_a_cache_that_loses_blocks_fails(tmp_path):
    with without_cold_blocks():
        code, results = run(tmp_path, "--tasks", "needle")
    assert code == 1
    assert not all(cell["identical"] for cell in results["cells"])


def test_variables_are_a_chain_to_the_value():
    question = recall.make_question(
        random.Random(0),
        "variables",
        800,
        0.5,
        800,
        standard_library.read_files(standard_library.train_files()[:3]),
    )
    known = dict(line.split("=") for line in question.text.splitlines() if "=" in line[4:5])
    followed = question.key
    for _ in range(recall.HOPS + 1):
        followed = known[followed]
    assert followed == question.value
    told = question.text.encode()[: question.fact_end].decode()
    assert told.splitlines()[-1].startswith(f"{question.key}=")


def test_two_processes_give_the_numbers_of_one(tmp_path):
    _, expected = run(tmp_path, "--tasks", "keys")
    config = ROOT / "examples" / "accelerate_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    script = [str(ROOT / "eval" / "recall.py"), *QUICK, "--tasks", "keys"]
    output = ["--output", str(tmp_path / "two"), "--disk-dir", str(tmp_path)]
    subprocess.run([*launch, *script, *output], check=True, timeout=300, capture_output=True)
    results = json.loads((tmp_path / "two" / "recall.json").read_text())
    assert results["cells"] == expected["cells"]


@pytest.mark.parametrize("wrong", [["--depths", "1.5"], ["--off-device", "1"], ["--samples", "0"]])
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        recall.main(wrong)
    assert "expected" in capsys.readouterr().err
