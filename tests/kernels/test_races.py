"""ThreadSanitizer over all of the CPU core that runs in threads."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = (
    *("thread_pool.cpp", "attention_worker.cpp", "block_io.cpp", "xxh3.cpp"),
    *("cpu/dispatch.cpp", "cpu/isa_portable.cpp"),
)
# What breaks the order in which a disk thread's results are seen.
PLANTED = ("block_io.h", "std::atomic<bool> is_done{false};", "Unordered is_done{false};")
UNORDERED = """
struct Unordered {
  bool value;
  void store(bool to, std::memory_order = std::memory_order_relaxed) { value = to; }
  bool load(std::memory_order = std::memory_order_relaxed) const { return value; }
  operator bool() const { return value; }
  Unordered& operator=(bool to) { value = to; return *this; }
};
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with ThreadSanitizer"),
]


def sanitized(sources: Path, program: Path) -> subprocess.CompletedProcess[str]:
    """What a build of these sources says when it runs."""
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{sources}"]
    files = [ROOT / "tests/cpp/races.cpp", *(sources / unit for unit in UNITS)]
    subprocess.run([*command, *map(str, files), "-o", str(program)], check=True, timeout=300)
    # Under much randomness of addresses the sanitizer finds no room for its shadow.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
    )


def test_nothing_races(tmp_path):
    done = sanitized(ROOT / "csrc", tmp_path / "races")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[:4000]}"


def test_the_sanitizer_would_notice(tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    name, ordered, unordered = PLANTED
    text = (sources / name).read_text()
    assert ordered in text
    broken = text.replace(ordered, unordered).replace(
        "namespace hf_tiered_cache {", f"namespace hf_tiered_cache {{{UNORDERED}", 1
    )
    (sources / name).write_text(broken)
    done = sanitized(sources, tmp_path / "races")
    assert done.returncode == 66
    assert "data race" in done.stderr
