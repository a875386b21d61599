"""The examples run as a user would run them, offline, on a shorter prompt."""

import re
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


def test_chat_reads_only_what_is_new_and_takes_an_answer_back(tmp_path):
    printed = run_example("chat.py", "--disk-dir", str(tmp_path))
    assert "all answers are those of DynamicCache" in printed
    assert "'972605'" in printed and printed.count("'318240'") == 2
    assert "[197 tokens were known, 6 were read]" in printed
    assert "loads 0" not in printed


def test_forks_of_a_prompt_answer_from_shared_blocks(tmp_path):
    printed = run_example("shared_prompt.py", "--disk-dir", str(tmp_path))
    assert "6 of 6 answers are those that were hidden" in printed
    before, after = (
        sum(map(int, re.findall(r"(\d+) blocks on", line)))
        for line in printed.splitlines()
        if "blocks on" in line
    )
    layers = 4
    assert after <= before + 6 * 2 * layers, "forks hold a few blocks of their own"
    assert list(tmp_path.iterdir()) == []
