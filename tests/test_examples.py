"""The examples run as a user would run them, offline, on a shorter prompt; with models of many
layers, of sliding windows and in half precision as well."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from hf_tiered_cache.evaluation.names import ModelError

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
    assert "[the last turn taken back, 103 tokens read again: '318240']" in printed
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


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 384,
    "pad_token_id": 0,
    "eos_token_id": None,
    "max_position_embeddings": 2048,
}
WINDOW = 32
CONFIGS = {
    "many layers": LlamaConfig(**SIZES, num_hidden_layers=30),
    "windows": Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=6,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    ),
    "windows only": Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 2,
    ),
}
FACTS = "code=318240\n" * 4  # longer than a window
RUNS = {
    "chat": ("--say", FACTS, FACTS, "code=", "--new-tokens", "4"),
    "shared_prompt": ("--num-facts", "3", "--new-tokens", "4", "--chunk", "1024"),
    "long_document": ("--prompt-tokens", "500", "--new-tokens", "4", "--chunk", "128"),
}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_random(folder: Path, config: PreTrainedConfig) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "eval" / "tiny_lm").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["many layers", "windows"])
@pytest.mark.parametrize("name", RUNS)
def test_examples_take_any_decoder(tmp_path, capsys, name, model, dtype):
    folder = save_random(tmp_path / "model", CONFIGS[model])
    disk = str(tmp_path / "disk")
    example(name).main(["--model", folder, "--dtype", dtype, "--disk-dir", disk, *RUNS[name]])
    printed = capsys.readouterr().out
    assert "disk" in printed and " 0 blocks on disk" not in printed
    if dtype == "float32" and name != "shared_prompt":
        assert "those of DynamicCache" in printed or "new tokens are identical" in printed
        assert "NOT" not in printed


@pytest.mark.parametrize("name", RUNS)
def test_a_model_that_keeps_nothing_in_blocks_is_said(tmp_path, name):
    folder = save_random(tmp_path / "model", CONFIGS["windows only"])
    with pytest.raises(ModelError, match="keeps no layer in blocks"):
        example(name).main(["--model", folder, "--disk-dir", str(tmp_path), *RUNS[name]])


def test_a_prompt_is_no_longer_than_the_model_was_made_for(tmp_path, capsys):
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 256}, num_hidden_layers=2)
    folder = save_random(tmp_path / "model", config)
    example("long_document").main(
        ["--model", folder, "--disk-dir", str(tmp_path), "--new-tokens=6"]
    )
    assert "250 prompt tokens" in capsys.readouterr().out


def test_a_chat_goes_on_where_a_template_rewrites_the_last_answer(tmp_path, capsys):
    folder = Path(save_random(tmp_path / "model", CONFIGS["windows"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: "
        "{{ message.content if message.role == 'user' else 'something' }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    example("chat").main(["--model", str(folder), "--disk-dir", str(tmp_path), *RUNS["chat"]])
    assert "all answers are those of DynamicCache" in capsys.readouterr().out


def test_a_budget_that_is_too_small_is_one_line(tmp_path):
    folder = save_random(tmp_path / "model", CONFIGS["many layers"])
    command = [sys.executable, str(ROOT / "examples" / "long_document.py"), "--model", folder]
    command += ["--device-bytes", "64KiB", "--prompt-tokens", "500", "--disk-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: device_bytes=64.0 KiB is too small")


def test_a_library_of_prompts_is_read_once(tmp_path):
    texts = []
    for name in ("chat.py", "shared_prompt.py"):
        texts.append(tmp_path / name)
        texts[-1].write_bytes((ROOT / "examples" / name).read_bytes()[:700])
    arguments = ("--store", str(tmp_path / "kv"), *map(str, texts))
    first, second = (run_example("prompt_library.py", *arguments) for _ in range(2))
    assert "512 tokens in the store, 700 read for it" in first
    assert "512 tokens in the store, 188 read for it" in second
    answers = [re.findall(r"(\S+): 7\d\d tokens, \d+ read: (.*)", one) for one in (first, second)]
    assert len(answers[0]) == 2 and answers[0] == answers[1]


def test_a_chat_survives_a_restart(tmp_path):
    arguments = ("--folder", str(tmp_path / "chat"), "--say")
    text = (ROOT / "examples" / "chat.py").read_text()[:300]
    first = run_example("chat_restart.py", *arguments, text)
    second = run_example("chat_restart.py", *arguments, "\nkey=")
    assert first.startswith("[300 tokens, 300 read]")
    assert second.startswith("[313 tokens, 57 read]")
