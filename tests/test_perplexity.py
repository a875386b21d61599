"""`eval/perplexity.py` as a user runs it, on the tiny model and short contexts: figures, bars,
files, processes; and that it notices a cache that loses blocks."""

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from support import without_cold_blocks
from transformers import AutoTokenizer

from hf_tiered_cache.evaluation import (
    documents,
    parity,
    passes,
    scoring,
    standard_library,
)
from hf_tiered_cache.evaluation.documents import DataError, Document, HubDataset, Text

import perplexity

ROOT = Path(__file__).parent.parent
CONTEXT, DECODED, NEW_TOKENS = 384, 12, 6
SMALL = (
    *("--dtype", "float32", "--threads", "1", "--chunk", "100"),
    *("--decode-tokens", str(DECODED), "--new-tokens", str(NEW_TOKENS), "--block-tokens", "32"),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The command sets torch's threads and the seed; nothing here may reach a hub."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(perplexity.TINY_LM)


def command(folder: Path) -> list[str]:
    """Arguments of a run that writes all it can into `folder`."""
    return [
        *SMALL,
        *("--contexts", "256", str(CONTEXT), "--off-device", "0.5", "0.8", "--documents", "3"),
        *("--output", str(folder), "--save-tokens", str(folder / "tokens.parquet")),
        *("--disk-dir", str(folder / "disk")),
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder with everything that one run of the command writes."""
    folder = tmp_path_factory.mktemp("perplexity")
    threads = torch.get_num_threads()
    assert perplexity.main(command(folder)) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def results(measured) -> dict:
    return json.loads((measured / "perplexity.json").read_text())


def test_losses_logits_and_tokens_are_those_of_dynamic_cache(results):
    rows = results["rows"]
    assert [(row["context"], row["cache"], row["share_asked"]) for row in rows] == [
        (context, cache, share)
        for context in (256, CONTEXT)
        for cache, share in (
            ("DynamicCache", None),
            ("DynamicCache, noise", None),
            *(("TieredCache", share) for share in (0, 0.5, 0.8)),
        )
    ]
    for row in rows:
        assert row["tokens"] == 3 * (row["context"] - 1)
        assert 1.0 < row["nll"] < 4.0, "the tiny model knows code, a little"
        # A byte is a token, and a document's first byte is not scored.
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / np.log(2), rel=1e-3)
        if row["cache"] == "TieredCache":
            assert abs(row["delta_nll"]) < 1e-6
            assert row["mean_abs_delta_nll"] >= abs(row["delta_nll"])
            assert 0 < row["max_delta_logit"] < 1e-3
            assert row["compared_tokens"] == 3 * (row["context"] + NEW_TOKENS - 1)
            assert row["continuations_identical"] == 3
            assert row["bits_of_resident"]
            assert row["share_off_device"] == pytest.approx(row["share_asked"], abs=0.1)
            assert ("disk" in row["peak_bytes"]) == (row["share_asked"] > 0)
    assert results["bars"]
    assert all(bar["is_reached"] for bar in results["bars"])


def test_positions_cover_every_scored_token_and_average_to_the_loss(results):
    for row in results["rows"]:
        parts = row["by_position"]
        assert sum(part["tokens"] for part in parts) == row["tokens"]
        total = sum(part["tokens"] * part["nll"] for part in parts)
        assert total / row["tokens"] == pytest.approx(row["nll"])
        decoded, prefilled = 3 * (DECODED - 1), row["tokens"] - 3 * (DECODED - 1)
        both = prefilled * row["nll_prefilled"] + decoded * row["nll_decoded"]
        assert both / row["tokens"] == pytest.approx(row["nll"])


def test_the_files_say_what_was_run_and_where(measured, results):
    assert {"command", "processor", "torch", "transformers", "kernel", "seed", "model"} <= set(
        results
    )
    assert results["documents"] == [
        standard_library.relative_path(p) for p in standard_library.held_out_files()[:3]
    ]
    table = (measured / "perplexity.md").read_text()
    assert table.count("| TieredCache (sdpa) |") == 6
    assert table.count("| DynamicCache, noise (eager) |") == 2
    assert "bars reached" in table
    for name in ("perplexity_by_position.png", "perplexity_slowdown.png"):
        picture = (measured / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 100_000
    assert list((measured / "disk").iterdir()) == []


def test_a_cache_that_loses_blocks_is_noticed(tmp_path, capsys):
    """Were the cold blocks left out, losses and bits would change and the command would fail."""
    options = ("--contexts", str(CONTEXT), "--off-device", "0.8", "--documents", "1")
    with without_cold_blocks():
        code = perplexity.main([*SMALL, *options, "--output", str(tmp_path)])
    assert code == 1
    assert "MISSED" in capsys.readouterr().out
    _, _, resident, cold = json.loads((tmp_path / "perplexity.json").read_text())["rows"]
    assert abs(resident["delta_nll"]) < 1e-6
    assert abs(cold["delta_nll"]) > 1e-3
    assert cold["flips_beyond_rounding"] > 0
    assert not cold["bits_of_resident"]
    assert "MISSED" in (tmp_path / "perplexity.md").read_text()


def test_two_processes_give_the_numbers_of_one(measured, results, tmp_path):
    launched = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "examples" / "accelerate_cpu.yaml")),
        *("--main_process_port", "0", "--num_cpu_threads_per_process", "1"),
        *(str(ROOT / "eval" / "perplexity.py"), *command(tmp_path)),
    ]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        launched, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bars reached") == 1, "only one process prints"
    bars = {line.split("%")[0] for line in done.stderr.replace("\r", "\n").splitlines()}
    assert "float32: 100" in bars
    together = json.loads((tmp_path / "perplexity.json").read_text())
    assert (results["processes"], together["processes"]) == (1, 2)
    assert together["documents"] == results["documents"]
    for one, two in zip(results["rows"], together["rows"], strict=True):
        assert exact_figures(one) == exact_figures(two)
    assert list((tmp_path / "disk").iterdir()) == []


def exact_figures(row: dict) -> dict:
    """A row without its times."""
    return {key: row[key] for key in row if not key.startswith(("slowdown", "prefill", "decode"))}


@pytest.fixture
def metric(monkeypatch, tmp_path):
    """The module as `evaluate` loads it, without a network."""

    def refuse(*arguments):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = ROOT / "eval" / "metrics" / "perplexity_parity"
    return evaluate.load(str(folder), cache_dir=str(tmp_path))


def test_the_metric_gives_the_commands_figures_from_its_tokens(metric, measured, results):
    runs = pyarrow.parquet.read_table(measured / "tokens.parquet").to_pylist()
    runs = [run for run in runs if run["context"] == CONTEXT]
    tiered = [run for run in runs if run["share_asked"] == 0.8]
    dynamic = [run for run in runs if run["cache"] == "DynamicCache"]
    got = metric.compute(
        predictions=[run["log_likelihoods"] for run in tiered],
        references=[run["log_likelihoods"] for run in dynamic],
        prediction_tokens=[run["tokens"] for run in tiered],
        reference_tokens=[run["tokens"] for run in dynamic],
        num_bytes=sum(run["num_bytes"] for run in tiered),
    )
    row = results["rows"][-1]
    assert got["is_parity"] is True
    assert got["flips"] == row["flips"] == 0
    for name in ("tokens", "nll", "perplexity", "bits_per_byte", "max_abs_delta_nll"):
        assert got[name] == pytest.approx(row[name], rel=1e-12), name
    assert got["delta_nll"] == pytest.approx(row["delta_nll"], abs=1e-15)


def test_the_metric_judges_flips_and_refuses_what_does_not_belong_together(metric):
    likelihoods = [[-1.0, -2.0], [-0.5]]
    same = metric.compute(predictions=likelihoods, references=likelihoods)
    assert same["is_parity"] and same["delta_nll"] == 0.0
    worse = metric.compute(predictions=[[-1.0, -2.0], [-0.6]], references=likelihoods)
    assert worse["delta_nll"] == pytest.approx(0.1 / 3)
    assert not worse["is_parity"]
    flipped = {
        "predictions": likelihoods,
        "references": likelihoods,
        "prediction_tokens": [[4, 5], [6]],
        "reference_tokens": [[4, 5], [7]],
        "reference_margins": [[0.0, 0.0], [0.25]],
    }
    assert metric.compute(**flipped, rounding=0.5)["is_parity"]
    found = metric.compute(**flipped, rounding=0.1)
    assert (found["flips"], found["max_flip_margin"], found["is_parity"]) == (1, 0.25, False)
    with pytest.raises(ValueError, match=r"prediction_tokens: got documents of \[3\]"):
        metric.compute(**{**flipped, "prediction_tokens": [[1, 2, 3]]})


def test_texts_of_files_folders_and_parquet(tmp_path):
    (tmp_path / "texts" / "deeper").mkdir(parents=True)
    (tmp_path / "texts" / "b.md").write_text("second")
    (tmp_path / "texts" / "a.txt").write_text("first")
    (tmp_path / "texts" / "deeper" / "c.py").write_text("third")
    (tmp_path / "texts" / ".hidden").write_text("not this")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\xff")
    rows = Dataset.from_dict({"number": [1, 2], "body": ["first", "second"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")

    def texts(name: str, **knobs: str) -> list[str]:
        return [text.text for text in documents.read_texts(str(tmp_path / name), **knobs)]

    assert texts("texts") == ["first", "second", "third"]
    assert texts("texts/a.txt") == ["first"]
    assert texts("rows.parquet", column="body") == ["first", "second"]
    assert texts("saved", column="body") == ["first", "second"]
    with pytest.raises(DataError, match=r"--column text .*columns of text: body"):
        texts("rows.parquet")
    (reference,) = documents.read_texts(documents.LANGUAGE_REFERENCE)
    assert len(reference.text) > 300_000 and 'The "with" statement' in reference.text
    with pytest.raises(
        DataError, match=r"no such file or folder; expected stdlib, python-reference, a"
    ):
        list(documents.read_texts("nowhere"))


def test_hub_data_sets_are_asked_for_by_path_config_split_and_revision(monkeypatch):
    """What cannot be downloaded here: the call, with rows as `datasets` streams them."""
    asked = []

    class Streaming:
        def load_dataset(self, *args, **kwargs):
            asked.append((args, kwargs))
            return iter([{"text": "a line"}, {"text": "another"}])

    of_datasets = inspect.signature(datasets.load_dataset)
    monkeypatch.setattr(documents, "_datasets", Streaming)
    monkeypatch.setitem(documents.HUB_DATASETS, "book", HubDataset("org/book", "raw", revision="r"))
    assert [text.text for text in documents.read_texts("book")] == ["a line", "another"]
    list(documents.read_texts("someone/something", split="train"))
    (named, book), (given, something) = asked
    assert named == ("org/book", "raw")
    assert given == ("someone/something", None)
    assert book == {"split": "test", "revision": "r", "streaming": True}
    assert something["split"] == "train"
    for args, kwargs in asked:
        bound = of_datasets.bind(*args, **kwargs).arguments
        assert {"path", "name", "split", "revision", "streaming"} <= set(bound)
    assert documents.is_joined("wikitext")
    assert not documents.is_joined("pg19")


def test_a_name_of_the_hub_goes_through_datasets_own_streaming(monkeypatch, tmp_path):
    """As far as it can be without a hub: a folder of parquet files under the name, read by
    `datasets` itself, split by split, one row at a time."""
    for split in ("train", "test"):
        rows = Dataset.from_dict({"text": [f"{split} {n}" for n in range(3)], "url": ["u"] * 3})
        (tmp_path / "book" / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "book" / "data" / f"{split}-00000-of-00001.parquet")
    folder = str(tmp_path / "book")
    monkeypatch.setitem(documents.HUB_DATASETS, "pg19", HubDataset(folder))

    def texts(**knobs: str) -> list[str]:
        return [text.text for text in documents.read_texts("pg19", **knobs)]

    assert texts() == ["test 0", "test 1", "test 2"]
    assert texts(split="train")[0] == "train 0"
    assert texts(column="url") == ["u", "u", "u"]
    with pytest.raises(DataError, match=r"--split validation: .*; expected a data set of the hub"):
        texts(split="validation")
    with pytest.raises(DataError, match=r"--column body .*columns of text: text, url"):
        texts(column="body")


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"--data emozilla/pg19, --split test: .*local file"):
        list(documents.read_texts("pg19"))


def test_short_texts_are_joined_or_refused(tokenizer):
    texts = [Text(str(n), "ten bytes." * (n + 1)) for n in range(6)]

    def found(min_tokens: int, join: bool) -> list[tuple[str, int]]:
        documents_ = documents.long_documents(texts, tokenizer, min_tokens, 2, join)
        return [(document.name, len(document.ids)) for document in documents_]

    assert found(40, join=False) == [("3", 40), ("4", 50)]
    # Two bytes between texts: 10 + 20 + 30 + 4, then 40 + 50 + 2.
    assert found(60, join=True) == [("0", 64), ("3", 92)]
    with pytest.raises(DataError, match=r"no text of 1,000 tokens .* --join"):
        found(1000, join=False)


def test_strided_windows_score_every_token_once(tokenizer):
    document = Document("d", torch.arange(1000) % 200 + 3)
    windows = list(scoring.make_windows(document, tokenizer, 400, 150, 16))
    assert [(window.start, window.first_scored) for window in windows] == [
        (0, 1),
        *((start, 250) for start in (150, 300, 450, 600)),
    ]
    scored = [
        window.start + position
        for window in windows
        for position in range(window.first_scored, window.context)
    ]
    assert scored == list(range(1, 1000))
    (whole,) = scoring.make_windows(document, tokenizer, 400, None, 16)
    assert (whole.start, whole.first_scored, whole.context) == (0, 1, 400)


@torch.no_grad()
def test_scores_are_those_of_one_plain_forward(tokenizer, tmp_path):
    """Of the second window of a slide: only its last tokens, given everything in the window."""
    model = perplexity.load_model(str(perplexity.TINY_LM), "float32")
    text = standard_library.held_out_files()[0].read_text()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, :400]
    window = list(scoring.make_windows(Document("d", ids), tokenizer, 200, 80, 2))[1]
    shape = scoring.block_shape(model, 16, str(tmp_path))
    found = passes.score_window(
        model, window, scoring.Plan(60, 10, 3), shape, [0.8], None, str(tmp_path)
    )
    logits = model(ids[None, 80:280], use_cache=False).logits[0].double()
    expected = logits[119:199].log_softmax(-1)[torch.arange(80), ids[200:280]]
    assert [one.attention for one in found] == ["sdpa", "eager", "sdpa"]
    assert model.config._attn_implementation == "sdpa", "as it was"
    for one in found:
        assert one.log_likelihoods.shape == (80,)
        assert np.abs(one.log_likelihoods - expected.numpy()).max() < 1e-4
        assert one.guesses[119:].tolist() == logits[119:199].argmax(-1).tolist()
        assert one.continuation[0] == logits[-1].argmax().item()


def test_a_flip_counts_as_rounding_up_to_the_dtypes_rounding_only(tmp_path):
    one = 8.0 * torch.finfo(torch.bfloat16).eps
    kept = torch.tensor([[8.0, 8.0 - 2 * one, 0.0], [8.0, 8.0 - 3 * one, 0.0], [8.0, 1.0, 0.0]])
    found = scoring.Pass("TieredCache", 0.5)
    reference = scoring.Reference(3, str(tmp_path))
    reference.keep(0, kept.bfloat16())
    other = kept.clone()
    other[:2, 1] = 9.0
    reference.compare(0, other.bfloat16(), found)
    assert [flip.position for flip in found.flips] == [0, 1]
    assert [flip.margin for flip in found.flips] == [2 * one, 3 * one]
    assert [flip.rounding for flip in found.flips] == [one, one]
    assert [flip.roundings for flip in found.flips] == [2, 3]
    assert list(tmp_path.iterdir()) == [], "the logits' file has no name"
    other[2, 0] = torch.nan
    reference.compare(2, other[2:].bfloat16(), found)
    assert found.max_delta_logit == float("inf")


def test_logits_that_do_not_fit_on_the_disk_are_refused_before_anything_is_written(tmp_path):
    reference = scoring.Reference(1 << 50, str(tmp_path))
    with pytest.raises(DataError, match=r"take 4\.0 PiB, but .* smaller context or another"):
        reference.keep(0, torch.zeros(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_budgets_leave_the_asked_share_off_the_device():
    shape = scoring.BlockShape(block_tokens=32, block_bytes=1000, num_layers=4)
    assert shape.num_blocks(320) == 40
    assert shape.budgets(320, 0.0)["disk_bytes"] == 0
    assert shape.budgets(320, 0.0)["device_bytes"] >= 40 * 1000
    half = shape.budgets(320, 0.5)["device_bytes"]
    assert half * (1 - scoring.STAGING_SHARE) == pytest.approx(20 * 1000, abs=1)
    # The filling blocks stay, and two pass through.
    assert shape.budgets(320, 1.0)["device_bytes"] == (4 + 2) * 1000


def test_buckets_double_and_end_at_the_context():
    assert parity.buckets(1000) == [(0, 128), (128, 256), (256, 512), (512, 1000)]
    assert parity.buckets(100) == [(0, 100)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--contexts", "64", "--decode-tokens", "64"), "--decode-tokens 64: expected 1 to 63"),
        (("--off-device", "1.5"), "--off-device 1.5: expected shares from 0 to 1"),
        (("--stride", "9999"), "--stride 9999: expected 1 to 2048"),
        (("--chunk", "1"), "--chunk 1: expected 2 or more"),
        (("--data", "nowhere"), "--data nowhere: no such file or folder"),
        (("--contexts", "100000000"), "no text of 100,000,000 tokens"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_arguments_say_what_is_expected(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        perplexity.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
