"""`save_pretrained`, `from_pretrained`: a prefilled document goes on elsewhere, or is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from test_generate_parity import check_integrity, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_tiered_cache import (
    ClosedCacheError,
    ConfigError,
    TieredCache,
    TierIOError,
    UnsupportedInputError,
)
from hf_tiered_cache.integration import saved

ROOT = Path(__file__).parent.parent
TINY_LM = ROOT / "eval" / "tiny_lm"
MORE = torch.tensor([[5, 7]])


@torch.no_grad()
def prefilled(model, cache):
    model(prompt(), past_key_values=cache)
    return cache


def continued(model, cache) -> list[int]:
    ids = torch.cat([prompt(), MORE], 1)
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    return tokens[0].tolist()


@pytest.fixture
def folder(make_cache, tmp_path) -> Path:
    """A saved Llama cache."""
    model = tiny_model("Llama")
    prefilled(model, make_cache(model.config, device_blocks=8)).save_pretrained(
        tmp_path / "saved", model, prompt()
    )
    return tmp_path / "saved"


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma 3"])
def test_a_saved_document_goes_on_as_the_one_that_was_saved(make_cache, tmp_path, family):
    model = tiny_model(family)
    expected = continued(model, prefilled(model, DynamicCache(config=model.config)))
    cache = prefilled(model, make_cache(model.config, device_blocks=24))
    cache.save_pretrained(tmp_path / "saved", model, prompt())
    assert continued(model, cache) == expected
    knobs = {"device_bytes": 24 * 4096, "disk_dir": tmp_path, "block_tokens": 4}
    with TieredCache.from_pretrained(tmp_path / "saved", model, **knobs) as loaded:
        assert torch.equal(loaded.saved_ids, prompt())
        assert [type(one) for one in loaded.layers] == [type(one) for one in cache.layers]
        assert loaded.get_seq_length() == prompt().shape[1]
        with copy.deepcopy(loaded) as fork:
            assert continued(model, fork) == expected
        assert continued(model, loaded) == expected
        assert loaded.stats().counters.cold_reads > 0
        check_integrity(loaded)


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_tiered_cache import TieredCache
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with TieredCache.from_pretrained(sys.argv[2], model, tokenizer, disk_bytes=0) as cache:
    ids = tokenizer(sys.stdin.read(), return_tensors="pt", add_special_tokens=False).input_ids
    said = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(said[0, ids.shape[1]:].tolist(), cache.saved_ids.shape[1])
"""


def test_another_process_goes_on_with_the_tokenizer_checked(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY_LM)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    document = "def answer():\n    return 42\n" * 10
    ids = tokenizer(document, return_tensors="pt", add_special_tokens=False).input_ids
    whole = tokenizer(
        document + "\nprint(", return_tensors="pt", add_special_tokens=False
    ).input_ids
    with TieredCache(model.config, disk_bytes=0) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save_pretrained(tmp_path, model, ids, tokenizer)
    how = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(whole, **how)[0, whole.shape[1] :].tolist()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(TINY_LM), str(tmp_path)],
        input=document + "\nprint(",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == f"{expected} {ids.shape[1]}", done.stderr
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UnsupportedInputError, match=r"tokenizer\.size was 257, is 258|tokenizer"):
        TieredCache.from_pretrained(tmp_path, model, tokenizer)


def test_another_model_is_refused_with_the_difference_named(folder):
    model = copy.deepcopy(tiny_model("Llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(UnsupportedInputError, match="not computed with this: weights was"):
        TieredCache.from_pretrained(folder, model)
    model = copy.deepcopy(tiny_model("Llama"))
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
    with pytest.raises(UnsupportedInputError, match=r"config\.rope_parameters\.rope_theta was"):
        TieredCache.from_pretrained(folder, model)
    with pytest.raises(UnsupportedInputError, match=r"class was 'transformers\.models\.llama"):
        TieredCache.from_pretrained(folder, tiny_model("Qwen2"))


def test_damage_is_found_and_names_the_file(folder):
    model, file = tiny_model("Llama"), folder / "layer_00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    with pytest.raises(TierIOError, match=r"layer_00001\.safetensors are damaged"):
        TieredCache.from_pretrained(folder, model)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TierIOError, match=r"layer_00001\.safetensors cannot be read"):
        TieredCache.from_pretrained(folder, model)
    file.unlink()
    with pytest.raises(TierIOError, match=r"layer_00001\.safetensors cannot be read"):
        TieredCache.from_pretrained(folder, model)


def test_a_folder_that_was_not_finished_is_none(folder, monkeypatch, make_cache):
    model = tiny_model("Llama")
    cache = prefilled(model, make_cache(model.config))
    monkeypatch.setattr(saved, "_checksum", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.save_pretrained(folder, model, prompt())
    with pytest.raises(TierIOError, match=r"has no tiered_cache\.json"):
        TieredCache.from_pretrained(folder, model)
    (folder / saved.INDEX).write_text(json.dumps({"format": "another"}))
    with pytest.raises(UnsupportedInputError, match="is of format 'another'"):
        TieredCache.from_pretrained(folder, model)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(make_cache, tmp_path):
    model = tiny_model("Llama")
    cache = prefilled(model, make_cache(model.config))
    with pytest.raises(UnsupportedInputError, match=r"input_ids \[1, 2\]: expected the ids"):
        cache.save_pretrained(tmp_path / "saved", model, MORE)
    with pytest.raises(ConfigError, match="expected repo_id='owner/name'"):
        cache.save_pretrained(tmp_path / "saved", model, prompt(), push_to_hub=True)
    cache.close()
    with pytest.raises(ClosedCacheError):
        cache.save_pretrained(tmp_path / "saved", model, prompt())
    assert not (tmp_path / "saved").exists()
    model = tiny_model("Qwen3-Next")
    cache = prefilled(model, make_cache(model.config))
    with pytest.raises(UnsupportedInputError, match="pickle keeps the others"):
        cache.save_pretrained(tmp_path / "saved", model, prompt())
    assert not (tmp_path / "saved").exists()


def test_it_goes_to_the_hub_by_the_hubs_own_helper(folder, make_cache, monkeypatch):
    sent = {}
    monkeypatch.setattr(saved, "upload_folder", lambda **how: sent.update(how))
    model = tiny_model("Llama")
    cache = prefilled(model, make_cache(model.config))
    cache.save_pretrained(
        folder, model, prompt(), push_to_hub=True, repo_id="someone/book", revision="v1"
    )
    assert sent == {"folder_path": folder, "repo_id": "someone/book", "revision": "v1"}
    monkeypatch.setattr(saved, "snapshot_download", lambda name: {"someone/book": folder}[name])
    with TieredCache.from_pretrained("someone/book", model, disk_bytes=0) as loaded:
        assert loaded.get_seq_length() == prompt().shape[1]


@pytest.mark.parametrize(
    "changed",
    [
        lambda _: [1],
        lambda it: {**it, "layers": it["layers"][:1]},
        lambda it: {key: value for key, value in it.items() if key != "identity"},
        lambda it: {**it, "input_ids": [[1, 2, 3]]},
        lambda it: {**it, "input_ids": 7},
        lambda it: {**it, "layers": [{**one, "checksums": {}} for one in it["layers"]]},
        lambda it: {**it, "layers": [None] * len(it["layers"])},
    ],
    ids=["list", "layers", "identity", "other ids", "no ids", "no checksums", "no entries"],
)
def test_a_damaged_index_is_refused(folder, changed):
    index = folder / saved.INDEX
    index.write_text(json.dumps(changed(json.loads(index.read_text()))))
    with pytest.raises(TierIOError, match=r"tiered_cache\.json is damaged"):
        TieredCache.from_pretrained(folder, tiny_model("Llama"), disk_bytes=0)


def test_the_index_names_no_files_and_stale_ones_go(folder, make_cache):
    assert "safetensors" not in (folder / saved.INDEX).read_text()
    stale = folder / "layer_00099.safetensors"
    stale.write_bytes(b"of a deeper model")
    model = tiny_model("Llama")
    prefilled(model, make_cache(model.config)).save_pretrained(folder, model, prompt())
    assert not stale.exists() and (folder / "layer_00001.safetensors").exists()


def test_the_last_call_of_a_tokenizer_is_not_part_of_it():
    tokenizer, other = (AutoTokenizer.from_pretrained(TINY_LM) for _ in range(2))
    tokenizer("text", truncation=True, max_length=64)
    assert saved._tokenizer_identity(tokenizer) == saved._tokenizer_identity(other)
    other.add_tokens(["<new>"])
    assert saved._tokenizer_identity(tokenizer) != saved._tokenizer_identity(other)
