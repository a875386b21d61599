"""What is handed to others builds what is built here."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_an_sdist_holds_every_source_and_module(tmp_path):
    command = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command], cwd=ROOT, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    package = ROOT / "hf_tiered_cache"
    modules = [*package.rglob("*.py"), *package.rglob("*.pyi"), package / "py.typed"]
    wanted = {str(path.relative_to(ROOT)) for path in [*sources, *modules]}
    assert wanted - held == set()
