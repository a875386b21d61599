"""What the documents point to is there: files, headings, modules and names of the package."""

import re
from pathlib import Path

import pytest
import yaml

import hf_tiered_cache

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    folders = (ROOT, ROOT / "docs", ROOT / "eval", ROOT / "examples")
    return sorted(path for folder in folders for path in folder.glob("*.md"))


def anchors(path: Path) -> set[str]:
    """The names of a document's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path, text: str) -> list[str]:
    """Links of `text`, which stands in the file `path`, that lead nowhere in the repository."""
    dead = []
    for link in LINK.findall(FENCE.sub("", text)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert dead_links(path, path.read_text()) == []


def test_a_dead_link_is_found():
    text = "[a](LICENSE) [b](NOTHING.md) [c](README.md#limits) [d](README.md#no-limits) [e](#use)"
    assert dead_links(ROOT / "README.md", text) == ["NOTHING.md", "README.md#no-limits"]


def architecture() -> str:
    return (ROOT / "docs" / "architecture.md").read_text()


def test_the_rooms_of_the_architecture_are_those_of_the_package():
    table = architecture().split("## Rooms")[1].split("\n\n`csrc/`")[0]
    first_cells = re.findall(r"^\|(.*?)\|", table, re.MULTILINE)
    rooms = [name for cell in first_cells for name in cell.split("`")[1::2]]
    assert len(rooms) > 10
    for room in rooms:
        name = room if room.endswith("/") else f"{room}.py"
        assert (ROOT / "hf_tiered_cache" / name).exists(), room
    package = ROOT / "hf_tiered_cache"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert modules | folders == set(rooms)


def test_what_the_architecture_names_is_in_the_code():
    code = [path.read_text() for path in (ROOT / "hf_tiered_cache").rglob("*.py")]
    text = FENCE.sub("", architecture())
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
        homes = [
            source for source in code if f"class {owner}" in source or f"{owner}.{name}" in source
        ]
        assert any(re.search(rf"\b{name}\b", source) for source in homes), f"{owner}.{name}"
    files = re.findall(r"`(csrc/[\w./]+)`", text)
    assert files
    for file in files:
        assert (ROOT / file).exists(), file


def test_the_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hf_tiered_cache.__version__
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == citation["version"]


def test_the_forge_runs_what_the_readme_says():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make test PYTHON=python", "make test-kernels PYTHON=python"]
    assert "    make test " in (ROOT / "README.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for python in job["strategy"]["matrix"]["python"]:
        assert f"Python :: {python}" in project, python


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len([line for line in lines.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(tmp_path))
    (tmp_path / "book.txt").write_text("def square(x):\n    return x * x\n" * 40)
    model = re.search(r'name = (".*")', lines)[1]
    here = lines.replace(model, repr(str(ROOT / "eval" / "tiny_lm"))).replace("20GiB", "64MiB")
    exec(here, {})
    assert "TieredCache(" in capsys.readouterr().out


def test_every_example_is_in_their_list():
    folder = ROOT / "examples"
    listed = (folder / "README.md").read_text()
    for path in folder.iterdir():
        if path.is_file() and path.name != "README.md":
            assert f"[{path.name}]({path.name})" in listed, path.name
