"""lm-evaluation-harness through a `TieredCache`: its own model's scores, by its own loader."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
TINY_LM = str(ROOT / "eval" / "tiny_lm")
TASKS = str(ROOT / "eval" / "lm_eval_tasks")
TEXT = (ROOT / "README.md").read_text()[:700]

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'hf_tiered_cache[lm-eval]'")


@pytest.fixture(scope="module")
def models():
    """(the harness's own, ours with most of its blocks on disk), around one model."""
    from lm_eval.models.huggingface import HFLM

    from hf_tiered_cache.evaluation.harness import TieredHFLM

    model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32)
    how = {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(TINY_LM)}
    knobs = {"device_bytes": "1MiB", "disk_bytes": "64MiB", "block_tokens": 16, "chunk": 100}
    return HFLM(**how), TieredHFLM(**how, **knobs)


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, one, index, ("task", index, 1)) for index, one in enumerate(arguments)
    ]


def test_log_likelihoods_are_the_harness_own(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(tmp_path))
    choices = [(TEXT, " model"), (TEXT, " cache."), (TEXT[:300], " and the blocks"), ("", "x")]
    own, ours = (one.loglikelihood(requests("loglikelihood", *choices)) for one in models)
    for (expected, is_greedy), got in zip(own, ours, strict=True):
        assert got == (pytest.approx(expected, abs=2e-4), is_greedy)
    assert list(tmp_path.iterdir()) == []


def test_what_requests_have_in_common_is_read_once(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(tmp_path))
    ours = models[1]
    seen = []
    hook = ours.model.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].shape[1])
    )
    choices = [(TEXT, f" {number}") for number in range(4)]
    ours.loglikelihood(requests("loglikelihood", *choices))
    hook.remove()
    assert len(TEXT) < sum(seen) < len(TEXT) + 20
    assert ours._cache is None, "closed behind the last"


def test_rolling_log_likelihoods_and_batches(models):
    own, ours = models
    rolling = requests("loglikelihood_rolling", (TEXT,))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        own.loglikelihood_rolling(rolling), abs=2e-3
    )
    choices = requests("loglikelihood", (TEXT[:90], " a longer one"), (TEXT[:60], " one"))
    expected = own.loglikelihood(choices)
    ours.batch_size_per_gpu = 2
    try:
        got = ours.loglikelihood(choices)
    finally:
        ours.batch_size_per_gpu = 1
    assert [one for one, _ in got] == pytest.approx([one for one, _ in expected], abs=2e-4)


def test_generates_as_the_harness_own(models):
    asked = requests("generate_until", (TEXT, {"until": ["\n"], "max_gen_toks": 8}))
    own, ours = (one.generate_until(asked) for one in models)
    assert own == ours


def test_a_local_task_runs_by_the_harness_own_loader(models):
    found = lm_eval.simple_evaluate(
        models[1],
        tasks=["needle"],
        task_manager=lm_eval.tasks.TaskManager(
            include_path=TASKS, metadata={"max_seq_lengths": [600], "samples": 1}
        ),
    )
    assert found["results"]["needle"]["acc,none"] == 1.0
    assert found["n-samples"]["needle"]["effective"] == 3


def test_it_is_registered():
    from lm_eval.api.registry import get_model

    from hf_tiered_cache.evaluation.harness import TieredHFLM

    assert get_model("hf-tiered") is TieredHFLM


def test_an_encoder_decoder_model_is_refused():
    from families import tiny_model

    from hf_tiered_cache import UnsupportedInputError
    from hf_tiered_cache.evaluation.harness import TieredHFLM

    with pytest.raises(UnsupportedInputError, match="expected a causal model"):
        TieredHFLM(tiny_model("T5"), tokenizer=AutoTokenizer.from_pretrained(TINY_LM))
