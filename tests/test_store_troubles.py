"""What goes wrong around a store stays there: `generate` goes on, and nothing is left behind."""

import copy
import gc
import os

import pytest
import torch
from test_restore import forward, make_model, new_cache, prompt, published

from hf_tiered_cache import BlockStore
from hf_tiered_cache.store.files import OpenBlock

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def store(tmp_path):
    with BlockStore(tmp_path / "kv", capacity_bytes="100MiB") as store:
        yield store


def test_forks_of_a_root_let_go_of_the_files_they_restored(model, store):
    published(model, store, prompt(256))
    root = new_cache(model, store)
    gc.collect()
    before = OpenBlock.num_open
    for _ in range(4):
        fork = copy.deepcopy(root)
        assert fork.restore(prompt(256), model) == 240
        assert OpenBlock.num_open == before + 15
        fork.reset()
        assert OpenBlock.num_open == before
        fork.close()


def test_a_file_stays_open_as_long_as_one_slot_of_its_span_is_held(model, store):
    published(model, store, prompt(256))
    cache, expected = new_cache(model, store), new_cache(model, store)
    before = OpenBlock.num_open
    assert cache.restore(prompt(256), model) == 240
    cache.crop(-200)
    forward(model, expected, prompt(256)[:, :40])
    rest = prompt(256)[:, 40:]
    assert torch.allclose(forward(model, cache, rest), forward(model, expected, rest), atol=1e-5)
    cache.reset()
    assert OpenBlock.num_open == before
