"""The notebook runs as a reader would run it, on a shorter prompt; and is committed as it ran."""

import base64
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "long_context.ipynb"
FULL = "PROMPT_TOKENS = 33_000"


def execute(monkeypatch, **parameters: int) -> str:
    """Run it with other parameters; what it printed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert FULL in cell.source
    cell.source += "".join(f"\n{name} = {value}" for name, value in parameters.items())
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    before = set(NOTEBOOK.parent.iterdir())
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert set(NOTEBOOK.parent.iterdir()) == before, "the disk tier's file has no name"
    return printed(notebook)


def printed(notebook) -> str:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def pictures(notebook) -> list[bytes]:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    data = [out.get("data", {}).get("image/png") for out in outputs]
    return [base64.b64decode(one) for one in data if one]


def test_a_shorter_prompt_goes_through_every_tier_with_identical_tokens(monkeypatch):
    said = execute(monkeypatch, PROMPT_TOKENS=4_500, NEW_TOKENS=4)
    assert "the 4 tokens are identical" in said
    assert "loads hidden behind compute" in said
    for tier in ("device", "host", "disk"):
        assert f"\n  {tier} " in said


@pytest.mark.slow
def test_the_whole_notebook(monkeypatch):
    assert "the 16 tokens are identical" in execute(monkeypatch)


def test_it_is_committed_with_outputs_of_the_full_length_that_are_small():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert "33,000 tokens; they end with" in printed(notebook)
    assert "the 16 tokens are identical" in printed(notebook)
    assert len(pictures(notebook)) == 4
    assert all(len(picture) < 60_000 for picture in pictures(notebook))
    assert NOTEBOOK.stat().st_size < 200_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out.output_type for cell in code for out in cell.outputs]
    assert set(outputs) <= {"stream", "display_data"}, "no errors"
    assert not [out for cell in code for out in cell.outputs if out.get("name") == "stderr"]
