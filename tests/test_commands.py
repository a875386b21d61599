"""The command line as a user meets it: what it prints, how it ends, and that it can say no."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import without_cold_blocks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
)
from typer.main import get_command
from typer.testing import CliRunner, Result

from hf_tiered_cache.commands.app import app
from hf_tiered_cache.evaluation import models, pace

ROOT = Path(__file__).parent.parent
TINY_LM = str(ROOT / "eval" / "tiny_lm")
SHORT = ("--context", "256", "--decode-tokens", "8", "--new-tokens", "4", "--chunk", "100")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing here may reach a hub, nor the user's own folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(tmp_path / "blocks"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_env_names_versions_kernels_tiers_and_rates(tmp_path):
    done = run("env")
    assert done.exit_code == 0, done.output
    for expected in ("transformers", "compiled core", "reference", "O_DIRECT", "GB/s"):
        assert expected in done.output
    assert str(tmp_path / "blocks") in done.output
    assert list((tmp_path / "blocks").iterdir()) == [], "what was measured left no file"


def test_env_as_json_without_measuring(monkeypatch):
    monkeypatch.setenv("HF_TIERED_CACHE_KERNEL", "abacus")
    found = json.loads(run("env", "--no-measure", "--json").stdout)
    assert set(found) == {"versions", "machine", "kernels", "tiers", "environment"}
    assert "GB/s" not in str(found)
    assert "reference" in found["kernels"]["available"]
    assert found["environment"]["HF_TIERED_CACHE_KERNEL"] == "abacus"


def test_env_says_why_a_folder_is_unusable(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("env", "--no-measure", "--disk-dir", str(tmp_path / "file"))
    assert done.exit_code == 0
    assert "disk_dir" in done.output and "cannot be made" in done.output


@pytest.fixture
def config_alone(tmp_path):
    folder = tmp_path / "outline"
    LlamaConfig(**SIZES, num_attention_heads=4).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return str(folder)


def test_plan_needs_a_config_alone(config_alone, tmp_path):
    done = run("plan", config_alone, "--context", "4096", "--device-bytes", "4MiB", "--threads=1")
    assert done.exit_code == 0, done.output
    for expected in (
        "a token in",
        "read from here",
        "probe: ",
        "prefill",
        "decode, plain",
        "binds",
    ):
        assert expected in done.stdout
    assert len(done.stdout.splitlines()) < 25, "one screen"
    assert list((tmp_path / "blocks").iterdir()) == [], "what was measured left no file"


def test_plan_by_a_profile_as_json(config_alone):
    done = run("plan", config_alone, "--device-profile", "h200", "--device-bytes=4MiB", "--json")
    found = json.loads(done.stdout)
    assert found["is_prediction"] and not found["rates_are_measured"]
    assert sum(tier["home_blocks"] for tier in found["tiers"]) * found["block_tokens"] >= 32768
    assert all(rate["source"] for rate in found["rates"].values())
    assert found["decode"]["plain"]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--device-profile", "abacus"), "expected h200, h100, 4090, 3060"),
        (("--device-bytes", "4KiB", "--device-profile", "h100"), "smallest device_bytes"),
        (("--context", "0"), "--context 0: expected 1 or more"),
        (("--disk-bytes", "many"), "disk_bytes='many'"),
    ],
)
def test_plan_says_what_cannot_be(config_alone, arguments, complaint):
    done = run("plan", config_alone, *arguments)
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_verify_reaches_every_bar(tmp_path):
    done = run("verify", TINY_LM, *SHORT, "--off-device", "0.8", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("parity: every bar met; new tokens identical\n")
    assert "idlelib" in done.stdout or ".py" in done.stdout
    assert len(done.stdout.splitlines()) < 20, "one screen"
    assert list((tmp_path / "blocks").iterdir()) == []


def test_verify_as_json_on_a_text_of_ones_own(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night; the cache fell in torrents. " * 20)
    done = run("verify", TINY_LM, *SHORT, "--data", str(text), "--json", "--dtype", "bfloat16")
    found = json.loads(done.stdout)
    assert [row["share_asked"] for row in found["rows"]] == [None, None, 0.0, 0.5, 0.9]
    assert [row["attention"] for row in found["rows"]] == ["sdpa", "eager", *["sdpa"] * 3]
    assert found["rows"][0]["dtype"] == "bfloat16"
    assert found["model"] == "tiny_lm"
    assert found["parity"] is all(bar["is_reached"] for bar in found["bars"])
    assert done.exit_code == (0 if found["parity"] else 1)
    noise = found["rows"][1]
    assert noise["max_delta_logit"] > 0
    assert found["bars"][0]["noise"].startswith(f"{abs(noise['delta_nll']):.1e} +- ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_verify_fails_for_a_cache_that_loses_blocks(dtype):
    """In half precision too: what is lost is more than the noise."""
    with without_cold_blocks():
        done = run("verify", TINY_LM, *SHORT, "--off-device", "0.8", "--dtype", dtype)
    assert done.exit_code == 1
    assert "NO PARITY: MISSED |delta NLL|" in done.stdout.splitlines()[-1]
    lines = [line for line in done.stdout.splitlines() if "MISSED" in line]
    assert any(line.startswith("|delta NLL|") for line in lines)
    assert any("OTHERS" in line for line in lines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verify_takes_noise_for_noise(dtype):
    """The same model through another right implementation is what the bars allow: it is held
    against the noise as ours is, and passes."""
    done = run("verify", TINY_LM, *SHORT, "--attention", "eager", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    assert "noise: DynamicCache (eager)" in done.stdout
    assert "TieredCache (eager)" in done.stdout


@pytest.fixture
def matmuls_take(monkeypatch):
    """Let half precision take so many times float32's time."""

    def take(times: float) -> None:
        monkeypatch.setattr(models, "matmul_slowdown", lambda _: times)

    return take


def test_slow_half_precision_is_not_measured_unless_asked_for(matmuls_take, tmp_path):
    model = save_tiny(
        tmp_path / "half", LlamaConfig(**SIZES, num_attention_heads=4), torch.bfloat16
    )
    matmuls_take(20)
    done = run("verify", model, *SHORT)
    assert done.exit_code == 0, done.output
    assert "half, float32 on cpu" in done.stdout
    assert "bfloat16, which the weights are in, takes torch 20x as long" in done.stderr
    done = run("verify", model, *SHORT, "--dtype", "bfloat16")
    assert "half, bfloat16 on cpu" in done.stdout and "x as long" not in done.stderr
    matmuls_take(1.5)
    done = run("verify", model, *SHORT)
    assert "half, bfloat16 on cpu" in done.stdout and "x as long" not in done.stderr


def test_quick_runs_take_the_context_that_ends_in_time(monkeypatch):
    def measure(model):
        return pace.Pace(prefill=0.012, decode=0.012, growth=0.0)

    monkeypatch.setattr(pace, "measure_pace", measure)
    done = run("verify", TINY_LM, "--quick", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    # 4 passes of 512 + 16 tokens take 25.3 s, more than QUICK_SECONDS.
    assert "256 tokens: about 13 s" in done.stderr and ": 256 tokens, the last 8" in done.stdout
    done = run("bench", TINY_LM, "--quick", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "about 13 s" in done.stderr and done.stdout.splitlines()[-1].startswith("   1,024")


NUMBERS = ("0", "-3", "many")
SHARED = {  # a wrong value of every option that several commands take, and words of the answer
    "model": {"./nowhere": "no such folder", "LATIN": "config.json", "MAMBA": "keeps no layer"},
    "data": {"nowhere": "no such file or folder; expected", "SHORT": "no text of 2,0"},
    "split": {"test": "--split test: --data stdlib is no data set"},
    "column": {"text": "--column text: --data stdlib is no data set"},
    "chunk": dict.fromkeys(("1", *NUMBERS), "--chunk"),
    "dtype": dict.fromkeys(("int8", "float64", "half"), "expected auto, float32, bfloat16"),
    "device": {"abacus": "--device abacus", "meta": "--device meta", "cuda:77": "--device cuda:77"},
    "disk_dir": {"FILE": "disk_dir"},
    "threads": dict.fromkeys((*NUMBERS, "1000000"), "--threads"),
    "new_tokens": dict.fromkeys(NUMBERS, "--new-tokens") | {"99999": "made for 32,768 positions"},
    "context": dict.fromkeys(NUMBERS, "--context") | {"40000": "made for 32,768 positions"},
    "off_device": dict.fromkeys(("1.5", "-0.1", "nan", "half"), "--off-device"),
}
ATTENTION = {
    "attention": {"foo": "--attention foo", "flash_attention_2": "--attention flash", "": "--att"},
    "block_tokens": dict.fromkeys(("7", "2", "-4", "many"), "block"),
}
DISK_IO = {"disk_io": {"fast": "disk_io='fast': expected one of"}}
BUDGETS = {
    name: dict.fromkeys(("many", "-1"), name)
    for name in ("device_bytes", "host_bytes", "disk_bytes")
}
CONFIG_ALONE = {
    **{name: SHARED[name] for name in ("dtype", "device", "disk_dir", "threads", "chunk")},
    "model": {"./nowhere": "no such folder", "LATIN": "config.json"},
}
COUNTS = ("max_num_seqs", "max_num_queued_tokens")
COUNTS_OR_NONE = ("max_num_parked", "max_num_queued_reqs")
WRONG = {
    "env": {},
    "verify": SHARED
    | ATTENTION
    | {
        "documents": dict.fromkeys(NUMBERS, "--documents"),
        "decode_tokens": dict.fromkeys((*NUMBERS, "2048"), "--decode-tokens"),
        "packing": {"zip": "unknown codec 'zip'"},
    },
    "plan": CONFIG_ALONE
    | DISK_IO
    | BUDGETS
    | {
        "context": dict.fromkeys(NUMBERS, "--context"),
        "batch": dict.fromkeys(NUMBERS, "--batch"),
        "staging_bytes": dict.fromkeys(("many", "-1"), "staging_bytes"),
        "block_tokens": ATTENTION["block_tokens"],
        "device_profile": {"abacus": "expected h200, h100, 4090, 3060"},
    },
    "serve": CONFIG_ALONE
    | ATTENTION
    | BUDGETS
    | {name: dict.fromkeys(NUMBERS, f"--{name.replace('_', '-')}") for name in COUNTS}
    | {name: dict.fromkeys(NUMBERS[1:], f"--{name.replace('_', '-')}") for name in COUNTS_OR_NONE}
    | {
        "port": dict.fromkeys((*NUMBERS, "70000"), "--port"),
        "store": {"FILE": "the store's folder"},
        "store_bytes": {"many": "store_bytes", "-1": "store_bytes"},
        "queue_timeout": dict.fromkeys((*NUMBERS, "nan"), "--queue-timeout"),
        "request_timeout": dict.fromkeys((*NUMBERS, "nan"), "--request-timeout"),
        "max_body_bytes": dict.fromkeys(("many", "-1", "auto"), "max"),
        "api_key_file": {
            "/nowhere/keys": "--api-key-file /nowhere/keys",
            "LATIN": "--api-key-file",
        },
    },
    "bench": SHARED
    | DISK_IO
    | {
        "rounds": dict.fromkeys(NUMBERS, "--rounds"),
        "off_device": SHARED["off_device"] | {"1": "expected a share from 0 to 0.99"},
    },
    "trace": SHARED
    | ATTENTION
    | DISK_IO
    | {
        "new_tokens": SHARED["new_tokens"] | {"1": "--new-tokens 1: expected 2 or more"},
        "output": {"/nowhere/run": "no folder that can be written to"},
    },
}
WITHOUT_WRONG_VALUES = {
    *("env.disk_dir",),  # what is wrong with it is what `env` is asked to tell
    *("env.measure", "env.as_json", "verify.as_json", "bench.as_json", "bench.reload"),  # flags
    *("verify.join", "bench.join", "trace.join"),
    *("verify.quick", "bench.quick", "trace.quick", "plan.as_json"),
    *("serve.host",),  # the system says what is wrong with it when the server begins to listen
}


def test_every_option_of_every_command_has_a_wrong_value():
    commands = get_command(app).commands
    options = {
        f"{name}.{one.name}" for name, it in commands.items() for one in it.params
    } - WITHOUT_WRONG_VALUES
    assert options == {f"{name}.{option}" for name, of_it in WRONG.items() for option in of_it}


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **keywords):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What stands for a path in `WRONG`."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "latin").mkdir()
    for name in ("file", "short.txt"):
        (folder / name).write_text("A short text.")
    return {
        "LATIN": str(folder / "latin"),
        "MAMBA": save_tiny(folder / "mamba", MambaConfig(**SIZES, state_size=4)),
        "SHORT": str(folder / "short.txt"),
        "FILE": str(folder / "file"),
    }


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        (name, option, value, message)
        for name, of_command in WRONG.items()
        for option, values in of_command.items()
        for value, message in values.items()
    ],
)
def test_a_wrong_value_is_one_line_and_2_before_weights(
    nothing_is_loaded, places, name, option, value, message
):
    if (name, value) == ("bench", "MAMBA"):
        message = "layers other than full attention"
    value = places.get(value, value)
    model = [value] if option == "model" else [TINY_LM]
    done = run(name, *model, *([f"--{option.replace('_', '-')}={value}"] * (option != "model")))
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify",), "Missing argument"),
        (("verify", TINY_LM, "--frob"), "No such option: --frob"),
        (("frob",), "No such command"),
        (("--frob",), "No such option"),
    ],
)
def test_what_does_not_parse_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_attention_is_not_set_where_the_model_computes_its_own(nothing_is_loaded, tmp_path):
    own = save_tiny(
        tmp_path / "own", GPTJConfig(vocab_size=384, n_embd=32, n_layer=2, n_head=2, rotary_dim=4)
    )
    done = run("verify", own, *SHORT, "--attention", "tiered")
    assert done.exit_code == 2
    assert "GPTJForCausalLM computes attention by itself" in done.stderr


def test_it_starts_without_the_packages_of_the_evaluations():
    """As from a wheel without extras: no eval/, no datasets, evaluate or matplotlib."""
    refuse = (
        "import sys; sys.modules.update(dict.fromkeys(['datasets', 'evaluate', 'matplotlib']))\n"
        f"sys.argv = ['hf-tiered-cache', 'verify', {TINY_LM!r}, *{SHORT!r}]\n"
        "from hf_tiered_cache.commands.app import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", refuse]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "parity: every bar met" in done.stdout


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-tiered-cache", "--help"])
    monkeypatch.delitem(sys.modules, "hf_tiered_cache.__main__", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("hf_tiered_cache", run_name="__main__")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name in ("env", "verify", "bench", "trace"):
        assert f"  {name}" in printed


def save_tiny(folder: Path, config, dtype: torch.dtype = torch.float32) -> str:
    """A random model of that config with the byte-level tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LM).save_pretrained(folder)
    return str(folder)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 384, "pad_token_id": 0}


def test_a_model_without_full_attention_is_refused_in_one_line(tmp_path):
    mamba = save_tiny(tmp_path / "mamba", MambaConfig(**SIZES, state_size=4))
    done = run("verify", mamba, *SHORT)
    assert done.exit_code == 2, done.output
    assert "keeps no layer in blocks" in done.stderr.splitlines()[-1]


def test_a_model_with_sliding_windows_is_verified_but_not_raced(tmp_path):
    config = Gemma3TextConfig(
        **SIZES,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    gemma = save_tiny(tmp_path / "gemma", config)
    done = run("verify", gemma, *SHORT, "--off-device", "0.8")
    assert done.exit_code == 0, done.output
    done = run("bench", gemma, "--context", "200", "--rounds", "1")
    assert done.exit_code == 2, done.output
    assert "layers other than full attention" in done.stderr


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(TINY_LM, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    done = run("verify", str(folder), *SHORT)
    assert done.exit_code == 2, done.output
    assert "damaged cannot be loaded" in done.stderr.splitlines()[-1]


def test_bench_prints_every_side_and_all_tokens_are_identical(tmp_path):
    quick = ("--context", "700", "--rounds", "1", "--new-tokens", "3", "--chunk", "256")
    done = run("bench", TINY_LM, *quick, "--off-device", "0", "--off-device", "0.5", "--reload")
    assert done.exit_code == 0, done.output
    assert "DIFFER" not in done.stdout
    sides = done.stdout.splitlines()[2:]
    assert ["TieredCache" in side for side in sides] == [False, True, True, False]
    assert list((tmp_path / "blocks").iterdir()) == []
    with without_cold_blocks():
        broken = run("bench", TINY_LM, *quick, "--off-device", "0.5", "--json")
    assert broken.exit_code == 1
    rows = json.loads(broken.stdout)["rows"]
    assert [row["is_identical"] for row in rows] == [True, False]
    assert "TOKENS DIFFER" in broken.stderr


SHORT_TRACE = ("--context", "600", "--new-tokens", "4", "--chunk", "256", "--block-tokens", "32")


def test_trace_writes_a_file_for_perfetto_and_a_picture(tmp_path):
    done = run("trace", TINY_LM, *SHORT_TRACE, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert "loads hidden behind compute" in done.stdout
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("prefill") == 3 and names.count("decode") == 3
    loaded = sum(event["args"].get("blocks", 0) for event in events if "load l" in event["name"])
    assert f"loads {loaded:,} (" in done.stdout, "as the cache counted them"
    picture = (tmp_path / "run.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 200_000


def test_trace_without_matplotlib_and_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("trace", TINY_LM, *SHORT_TRACE, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert "no picture: drawing needs matplotlib: pip install" in done.stdout
    assert not (tmp_path / "run.png").exists()
    done = run("trace", TINY_LM, *SHORT_TRACE, "--output", str(tmp_path / "no" / "run"))
    assert done.exit_code == 2
    assert "no folder that can be written to" in done.stderr


def test_a_data_set_without_the_package_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = run("verify", TINY_LM, "--data", "pg19")
    assert done.exit_code == 2
    assert "pip install 'hf_tiered_cache[eval]'" in done.stderr
