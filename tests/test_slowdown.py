"""eval/slowdown.py: every side continues alike, and is timed; a side that does not is told."""

import copy
import json

import pytest
import slowdown
from support import without_cold_blocks

QUICK = ["--contexts", "700", "--rounds", "1", "--new-tokens", "3", "--chunk", "256"]


def run(monkeypatch, tmp_path, *more: str) -> None:
    output = ["--output", str(tmp_path / "results"), "--disk-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["slowdown.py", *QUICK, *output, *more])
    slowdown.main()


def test_the_table_has_every_side_and_all_tokens_are_identical(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--shares", "0", "0.5")
    results = json.loads((tmp_path / "results" / "slowdown.json").read_text())
    rows = results["rows"]
    assert [row["cache"] for row in rows] == [
        "DynamicCache",
        "TieredCache",
        "TieredCache",
        "re-reading layers",
    ]
    assert all(row["is_identical"] and row["seconds"] > 0 for row in rows)
    assert rows[0]["slowdown"] == 1.0
    assert [row["share"] for row in rows] == [None, 0.0, pytest.approx(0.5, abs=0.2), None]
    assert "slowdown.py" in results["command"]
    table = (tmp_path / "results" / "slowdown.md").read_text()
    assert table.count("identical |") == 4 and "DIFFERENT" not in table
    assert (tmp_path / "results" / "slowdown.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "no files are left"


def test_other_tokens_are_told_and_fail(monkeypatch, tmp_path, capsys):
    with without_cold_blocks(), pytest.raises(SystemExit, match="differ"):
        run(monkeypatch, tmp_path, "--shares", "0.5", "--no-reload")
    assert "TOKENS DIFFER" in capsys.readouterr().out


def test_a_random_model_of_a_known_shape(monkeypatch, tmp_path):
    tiny = copy.deepcopy(slowdown.SHAPES["qwen2.5-0.5b"])
    tiny.update({"num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 64})
    tiny.layer_types = tiny.layer_types[:1]
    monkeypatch.setitem(slowdown.SHAPES, "qwen2.5-0.5b", tiny)
    run(monkeypatch, tmp_path, "--shape", "qwen2.5-0.5b", "--shares", "0", "--no-reload")


def test_a_share_that_cannot_be_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--shares", "1.0")
    assert "below 1" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(monkeypatch, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(SystemExit, match="expected more than the longest context"):
        run(monkeypatch, tmp_path, "--prompt", str(text))
