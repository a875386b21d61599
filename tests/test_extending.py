"""docs/extending.md: its code works as it stands there, from outside of the package."""

import re
from pathlib import Path

import pytest
import torch
from test_generate_parity import check_integrity, prompt, run, tiny_model
from transformers import DynamicCache

from hf_tiered_cache import TieredCache
from hf_tiered_cache.blocks.demotion import DemotionPolicy
from hf_tiered_cache.devices import Device
from hf_tiered_cache.tiers import Budget, Tier

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MODULES = {block.split()[1]: block for block in BLOCKS if block.startswith("# my_")}
USES = [block for block in BLOCKS if not block.startswith("# my_")]
MOST_LINES = 40


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Path:
    """A folder of somebody's own with the modules of the page."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_each_is_short():
    assert set(MODULES) == {"my_tier.py", "my_codec.py", "my_policy.py", "my_selection.py"}
    for name, text in MODULES.items():
        assert len(text.splitlines()) < MOST_LINES, name


@pytest.mark.parametrize("use", USES, ids=["tier", "codec", "policy", "selection"])
def test_generate_through_it_says_what_a_dynamic_cache_says_or_that_it_does_not(
    modules, use, monkeypatch
):
    monkeypatch.setenv("HF_TIERED_CACHE_DIR", str(modules))
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    said = []

    class Noted(TieredCache):
        """With blocks so small that a short prompt needs the tiers below."""

        def __init__(self, config, device_bytes, **knobs):
            assert device_bytes == "256KiB"
            super().__init__(config, device_bytes=21 * 4096, block_tokens=4, **knobs)

    class Speaking:
        config = model.config

        @staticmethod
        def generate(past_key_values, **inputs):
            tokens, _ = run(model, past_key_values, inputs["input_ids"])
            said.append(tokens)

    names = {
        "TieredCache": Noted,
        "model": Speaking,
        "inputs": {"input_ids": prompt()},
        "print": lambda cache: said.append(str(cache)),
    }
    exec(use, names)
    cache = names["cache"]
    stats = cache.stats()
    assert torch.equal(said[0], expected) == stats.is_exact == ("attend=" not in use)
    assert stats.is_exact or "approximate: attention leaves blocks out (attend='ends')" in said[1]
    assert stats.counters.stores > 0
    assert stats.counters.loads > 0
    check_integrity(cache)
    cache.close()


def test_the_tier_is_in_the_chain_and_what_it_holds_is_let_go(modules, make_cache):
    model = tiny_model("Llama")
    sizes = {"extra_tiers": {"my_tier:ZlibTier": "1MiB"}, "disk_bytes": 0}
    cache = make_cache(model.config, 21, **sizes)
    run(model, cache)
    (manager,) = cache._owned.pool.managers
    zlib_tier = manager.tiers[-1]
    assert [tier.name for tier in cache.stats().tiers] == ["device", "zlib"]
    assert zlib_tier.used_slots == len(zlib_tier._packed) > 0
    cache.reset()
    assert zlib_tier.used_slots == len(zlib_tier._packed) == 0
    with pytest.raises(ValueError, match="block_bytes is 100"):
        Tier.by_name("zlib")(100, Budget("zlib", 4096))


def test_the_policy_keeps_the_first_block_of_every_layer(modules, make_cache):
    model = tiny_model("Llama")
    for demotion in ("by_age", "my_policy:KeepFirst"):
        cache = make_cache(model.config, 21, demotion=demotion)
        run(model, cache)
        (manager,) = cache._owned.pool.managers
        are_resident = {table.rows[0][0].is_resident for table in manager.blocks.tables}
        assert are_resident == {demotion != "by_age"}
    assert DemotionPolicy.by_name("keep_first").__module__ == "my_policy"


def test_every_member_of_a_device_is_told():
    table = PAGE.split("## A device")[1]
    for name, member in vars(Device).items():
        if not name.startswith("_") and name not in ("kind", "registry", "kind_of", "kernel"):
            assert f"`{name}" in table or name == "close", member
