"""The examples run as a user would run them, offline, on a shorter prompt."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_example(name: str, *arguments: str) -> str:
    """Run `examples/<name>` in a fresh process and return what it printed."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_long_document_says_that_its_tokens_are_those_of_dynamic_cache(tmp_path):
    printed = run_example(
        "long_document.py",
        *("--prompt-tokens", "3000", "--new-tokens", "8", "--chunk", "512"),
        *("--disk-dir", str(tmp_path)),
    )
    assert "the 8 new tokens are identical" in printed
    assert "3,000 prompt tokens" in printed
    tiers = {line.split()[0]: line.split() for line in printed.splitlines() if "cpu" in line}
    assert "device" in tiers
    assert list(tmp_path.iterdir()) == [], "the disk tier's file has no name"
