"""Keys are the same everywhere, and different wherever anything differs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.store import keys

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "store_keys.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_golden_vectors(vector):
    """Keys of an older version are found by this one; tests/data/make_store_golden.py made them."""
    space = keys.namespace(vector["identity"])
    assert space.hex() == vector["space"]
    salt = bytes.fromhex(vector["salt"])
    got = keys.block_keys(space, vector["ids"], vector["block_tokens"], salt)
    assert [key.hex() for key in got] == vector["keys"]


def test_another_process_with_another_hash_seed_agrees():
    program = (
        "from hf_tiered_cache.store import keys;"
        "print(keys.block_keys(keys.namespace({'b': 1, 'a': [None, 1.5, b'x']}), range(64), 16)"
        "[-1].hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1234")
    }
    assert len(seen) == 1


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def typed(value):
    """What tells values apart that Python calls equal (1, 1.0, True; 0.0, -0.0)."""
    if isinstance(value, dict):
        return ("d", tuple(sorted((k, typed(v)) for k, v in value.items())))
    if isinstance(value, list):
        return ("l", tuple(map(typed, value)))
    return (type(value).__name__, repr(value))


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_equal_encodings_mean_equal_values(one, other):
    assert (keys.canonical(one) == keys.canonical(other)) == (typed(one) == typed(other))


def test_probes_at_the_framing():
    """Pairs that a concatenation without lengths, or without types, takes for one."""
    probes = [
        {"org": "org_1", "model": "2345"},
        {"org": "org_12345", "model": ""},
        {"org": ["a", "b"]},
        {"org": ["ab"]},
        {"org": "1"},
        {"org": 1},
        {"org": 1.0},
        {"org": True},
        {"org": None},
        {"org": b"1"},
        {"org": [[]]},
        {"org": []},
        {"org": {}},
        {},
    ]
    assert len({keys.namespace(probe) for probe in probes}) == len(probes)


def test_a_key_stands_for_everything_before_it():
    space = keys.namespace({})
    ids = list(range(256))
    chain = keys.block_keys(space, ids, 16)
    for position in (0, 15, 16, 100, 255):
        changed = [*ids]
        changed[position] += 1
        other = keys.block_keys(space, changed, 16)
        same = [a == b for a, b in zip(chain, other, strict=True)]
        assert same == [block < position // 16 for block in range(16)]


def test_the_delta_that_breaks_a_polynomial_hash():
    space = keys.namespace({})
    ids = [100] * 64
    other = [*ids]
    other[10] += 31
    other[11] -= 1
    assert keys.block_keys(space, ids, 64) != keys.block_keys(space, other, 64)


def test_block_size_salt_and_namespace_are_part_of_a_key():
    space, ids = keys.namespace({}), list(range(64))
    variants = [
        keys.block_keys(space, ids, 16)[0],
        keys.block_keys(space, ids, 32)[0],
        keys.block_keys(space, ids, 16, b"salt")[0],
        keys.block_keys(keys.namespace({"a": 1}), ids, 16)[0],
    ]
    assert len(set(variants)) == len(variants)
    assert len(set(itertools.chain(*(keys.block_keys(space, ids, n) for n in (4, 8, 16))))) == 28


def test_only_full_blocks_have_keys():
    space = keys.namespace({})
    assert [len(keys.block_keys(space, range(n), 16)) for n in (0, 1, 15, 16, 17, 32)] == [
        *(0, 0, 0, 1, 1, 2)
    ]


@pytest.mark.parametrize("ids", [[-1] * 4, [2**32] * 4, [0.5] * 4, ["a"] * 4])
def test_wrong_ids_are_refused(ids):
    with pytest.raises(UnsupportedInputError, match="token ids"):
        keys.block_keys(keys.namespace({}), ids, 4)


def test_what_has_no_encoding_is_refused():
    with pytest.raises(UnsupportedInputError, match="identity"):
        keys.namespace({"a": object()})
    with pytest.raises(UnsupportedInputError, match="strings as names"):
        keys.namespace({"a": {1: 2}})
