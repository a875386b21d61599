"""A document that was read once is not read again: by another process, and after `kill -9`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from generate_with_store import BLOCK_TOKENS, load, prompt

from hf_tiered_cache import BlockStore

HERE = Path(__file__).parent
DOCUMENT_TOKENS = 1500


def start(root, question):
    process = subprocess.Popen(
        [sys.executable, HERE / "generate_with_store.py", root, str(DOCUMENT_TOKENS), question],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "2"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out)


def stored(root):
    return len(list(root.glob("v1/*/??/??/*.htc")))


def expected(question):
    ids = prompt(DOCUMENT_TOKENS, question)
    out = load().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


def test_a_killed_publisher_leaves_good_blocks_and_a_restart_goes_on_from_them(tmp_path):
    killed = start(tmp_path, " What is it?")
    deadline = time.monotonic() + 60
    while stored(tmp_path) < 5 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    num_blocks = stored(tmp_path)
    assert num_blocks >= 5
    with BlockStore(tmp_path) as store:
        assert list(store.verify()) == []
    question = " Who needs it?"
    second = finish(start(tmp_path, question))
    assert second["tokens"] == expected(question)
    assert second["fed"] <= DOCUMENT_TOKENS + len(question) - num_blocks * BLOCK_TOKENS
    other = " Where does it run?"
    third = finish(start(tmp_path, other))
    assert third["tokens"] == expected(other)
    assert third["fed"] <= len(other) + BLOCK_TOKENS
