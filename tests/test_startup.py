"""What starting costs, counted in modules: nothing is loaded before it is needed."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_tiered_cache
from hf_tiered_cache.devices import Device
from hf_tiered_cache.evaluation import names
from hf_tiered_cache.integration import registration

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "accelerate", "numpy", "safetensors"}
COMMANDS = ("env", "verify", "bench", "trace", "serve")
EXTRAS = {"datasets", "evaluate", "matplotlib", "fastapi", "uvicorn", "openai", "greenlet"}


def fresh(code: str) -> subprocess.CompletedProcess:
    """`code` in a fresh interpreter, which ends stderr with the modules it has, as JSON."""
    tell = "import json, sys\nprint(json.dumps(list(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after `code`."""
    return set(json.loads(fresh(code).stderr.splitlines()[-1]))


def test_the_package_alone_loads_errors_and_nothing_of_others():
    loaded = loaded_by("import hf_tiered_cache")
    ours = {name for name in loaded if name.startswith("hf_tiered_cache")}
    rooms = ("errors", "integration", "integration.registration")
    assert ours == {"hf_tiered_cache", *(f"hf_tiered_cache.{room}" for room in rooms)}
    assert not loaded & (HEAVY | EXTRAS | {"typer", "psutil", "huggingface_hub"})


MODELS_LATER = """
import inspect, sys
import hf_tiered_cache
assert "torch" not in sys.modules
import transformers
import transformers.modeling_utils as models
assert "hf_tiered_cache.integration.attention" in sys.modules
config = transformers.LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
)
model = transformers.AutoModelForCausalLM.from_config(config)
model.set_attn_implementation("tiered")
assert model.config._attn_implementation == "tiered"
assert "class PreTrainedModel" in inspect.getsource(models)
from hf_tiered_cache import TieredCache
"""


def test_the_name_is_there_for_models_that_come_later_and_no_command_is():
    loaded = loaded_by(MODELS_LATER)
    assert "hf_tiered_cache.integration.cache" in loaded
    above = ("hf_tiered_cache.evaluation", "hf_tiered_cache.commands")
    assert not [name for name in loaded if name.startswith(above)]
    assert not loaded & (EXTRAS | {"typer"})


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A file in the place of transformers' models, found nowhere yet."""
    path = tmp_path / "models_of_a_test.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "MODELS", path.stem)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield path
    sys.modules.pop(path.stem, None)


@pytest.fixture
def registered(monkeypatch) -> list[bool]:
    """Whether the models were complete, at every registration."""
    seen: list[bool] = []
    monkeypatch.setattr(
        registration,
        "_register",
        lambda: seen.append(hasattr(sys.modules[registration.MODELS], "LAST")),
    )
    return seen


def finders() -> list[object]:
    return [finder for finder in sys.meta_path if type(finder) is registration._Follower]


def test_the_name_comes_once_behind_the_models_and_the_finder_goes(models, registered):
    models.write_text("LAST = 1\n")
    before = len(finders())
    registration.follow_models()
    importlib.import_module("graphlib")
    assert registered == [] and len(finders()) == before + 1
    module = importlib.import_module(models.stem)
    assert registered == [True] and len(finders()) == before
    assert inspect.getsource(module) == "LAST = 1\n"


def test_models_that_fail_at_first_are_followed_when_they_come(models, registered):
    registration.follow_models()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(models.stem)
    models.write_text("raise ImportError('half installed')\n")
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match="half installed"):
        importlib.import_module(models.stem)
    assert registered == []
    models.write_text("LAST = 'now with the rest of it'\n")
    importlib.import_module(models.stem)
    assert registered == [True]


def test_models_that_are_there_are_not_waited_for(models, registered, monkeypatch):
    models.write_text("LAST = 1\n")
    importlib.import_module(models.stem)
    before = list(sys.meta_path)
    registration.follow_models()
    assert registered == [True] and sys.meta_path == before


def test_names_that_come_late_are_the_names_that_editors_see():
    tree = ast.parse(Path(hf_tiered_cache.__file__).read_text())
    (for_editors,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and node.body[0:1] and isinstance(node.body[0], ast.ImportFrom)
    )
    seen = {
        alias.name: statement.module.removeprefix("hf_tiered_cache.")
        for statement in for_editors.body
        for alias in statement.names
    }
    assert seen == hf_tiered_cache._ROOMS
    assert set(hf_tiered_cache.__all__) <= set(dir(hf_tiered_cache))
    with pytest.raises(AttributeError, match="has no attribute 'TieredCash'"):
        hf_tiered_cache.TieredCash  # noqa: B018


def answered_by(*arguments: str) -> tuple[set[str], int, list[str]]:
    """(modules loaded, exit code, lines on stderr) of the command line, in a fresh interpreter."""
    code = (
        f"import sys; sys.argv = ['hf-tiered-cache', *{arguments!r}]\n"
        "from hf_tiered_cache.commands.app import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code)"
    )
    done = fresh(code)
    *said, modules = done.stderr.splitlines()
    return set(json.loads(modules)), int(done.stdout.splitlines()[-1] or 0), said


@pytest.mark.parametrize(
    "arguments",
    [(), ("--help",), ("--version",), *((name, "--help") for name in COMMANDS)],
    ids=" ".join,
)
def test_help_and_version_load_nothing_heavy(arguments):
    loaded, code, said = answered_by(*arguments)
    assert (code, said) == (0, []) or not arguments  # which shows the help, as a mistake
    assert not loaded & (HEAVY | EXTRAS)


TINY_LM = str(ROOT / "eval" / "tiny_lm")
MISTAKES = [
    *("--frob", "--dtype=int8", "--device=abacus", "--device=cuda:x", "--data=nowhere"),
    *("--split=test", "--column=text", "--chunk=0", "--new-tokens=0", "--context=0"),
    *("--off-device=1.5", "--threads=1000000", "--disk-dir=/dev/null/folder"),
]
SERVER_MISTAKES = [
    *("--port=0", "--port=70000", "--max-num-seqs=0", "--queue-timeout=0", "--chunk=1"),
    *("--api-key-file=/nowhere/keys", "--device-bytes=lots", "--max-body-bytes=many"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        ("frob",),
        ("verify",),
        ("verify", "./nowhere"),
        *(("verify", TINY_LM, mistake) for mistake in MISTAKES),
        *(("bench", TINY_LM, mistake) for mistake in ("--rounds=0", "--disk-io=fast")),
        *(("serve", TINY_LM, mistake) for mistake in SERVER_MISTAKES),
        *(("trace", TINY_LM, mistake) for mistake in ("--block-tokens=7", "--output=/nowhere/x")),
    ],
    ids=lambda arguments: " ".join(argument for argument in arguments if argument != TINY_LM),
)
def test_a_mistake_that_needs_no_model_is_answered_without_loading_anything(arguments):
    loaded, code, said = answered_by(*arguments)
    assert code == 2
    (line,) = said
    assert line.startswith("error: ")
    assert not loaded & (HEAVY | EXTRAS)


def test_the_devices_that_may_be_named_are_supported():
    for kind in names.DEVICES:
        assert Device.kind_of(torch.device(kind)).name == kind
        names.check_device(kind)
    names.check_device("cuda:1")
