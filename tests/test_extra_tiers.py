"""Tiers of one's own in the chain of a cache."""

import pytest
import torch
from test_generate_parity import SMALLEST, check_integrity, run, tiny_model
from toy_tiers import Drawer, Shelf
from transformers import DynamicCache

from hf_tiered_cache.errors import ConfigError, OutOfBlocksError

BLOCK = 4096
LEAST = SMALLEST[1]


@pytest.mark.parametrize(
    ("chain", "knobs"),
    [
        ("device shelf disk", {"extra_tiers": {Shelf.name: 5 * BLOCK}}),
        ("device host shelf disk", {"extra_tiers": {Shelf.name: "20KiB"}, "host_bytes": 3 * BLOCK}),
        ("device drawer", {"extra_tiers": {Drawer.name: 1000 * BLOCK}, "disk_bytes": 0}),
        (
            "device host shelf drawer",
            {
                "extra_tiers": {"toy_tiers:Shelf": 4 * BLOCK, "toy_tiers:Drawer": "4MiB"},
                "host_bytes": 3 * BLOCK,
                "disk_bytes": 0,
            },
        ),
        ("device disk", {"extra_tiers": {Shelf.name: BLOCK - 1}}),
    ],
)
def test_it_takes_its_place_between_host_and_disk_and_changes_no_bit(make_cache, chain, knobs):
    model = tiny_model("Llama")
    expected, _ = run(model, DynamicCache())
    _, bits = run(model, make_cache(model.config, 64))
    cache = make_cache(model.config, LEAST, **knobs)
    tokens, logits = run(model, cache)
    assert torch.equal(tokens, expected)
    assert torch.equal(logits, bits)
    check_integrity(cache)
    rows = cache.stats().tiers
    assert [row.name for row in rows] == chain.split()
    assert all(row.blocks for row in rows)
    assert [row.where for row in rows if row.name == "shelf"] in ([], ["on the wall"])


def test_nothing_may_lie_below_a_tier_without_addresses(make_cache):
    with pytest.raises(ConfigError, match=r"extra_tiers\['drawer'\]: .* set disk_bytes to 0"):
        make_cache(None, 64, extra_tiers={Drawer.name: BLOCK})
    with pytest.raises(ConfigError, match=r"set extra_tiers\['shelf'\] to 0"):
        make_cache(None, 64, extra_tiers={Drawer.name: BLOCK, Shelf.name: BLOCK}, disk_bytes=0)


def test_when_all_is_full_the_error_names_its_knob(make_cache):
    model = tiny_model("Llama")
    cache = make_cache(model.config, LEAST, extra_tiers={Shelf.name: 2 * BLOCK}, disk_bytes=0)
    with pytest.raises(
        OutOfBlocksError, match=r"raise extra_tiers\['shelf'\] or device_bytes or allow disk_bytes"
    ):
        run(model, cache)
