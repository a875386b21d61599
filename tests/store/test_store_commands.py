"""`hf-tiered-cache store ...`: what it prints, its JSON, its exit codes."""

import json

import pytest
from store.shadow import SPACE, chain, put
from typer.testing import CliRunner

from hf_tiered_cache.commands.app import app
from hf_tiered_cache.store.block_store import BlockStore
from hf_tiered_cache.store.files import relative_path

RUNNER = CliRunner()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "kv"
    with BlockStore(folder) as store:
        put(store, chain(1))
    return folder


def run(*arguments, code=0):
    result = RUNNER.invoke(app, ["store", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def as_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code))


def test_ls_and_inspect(root):
    blocks = as_json("ls", root)
    assert [block["number"] for block in blocks] == list(range(8))
    assert [block["key"] for block in blocks] == [key.hex() for key in chain(1)]
    assert len(run("ls", root).splitlines()) == 9
    one = as_json("inspect", root, chain(1)[3].hex()[:12])
    assert one["number"] == 3 and len(one["extents"]) == 2
    assert chain(1)[3].hex() in run("inspect", root, chain(1)[3].hex())


def test_verify_says_and_repairs_damage(root):
    assert as_json("verify", root) == {"damaged": []}
    path = root / relative_path(SPACE, chain(1)[5])
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    (damaged,) = as_json("verify", root, code=1)["damaged"]
    assert chain(1)[5].hex() in damaged["path"]
    assert "1 damaged and put away" in run("verify", root, "--repair", code=1)
    assert not path.exists()
    assert as_json("gc", root)["quarantined"] == 1


def test_pin_gc_stats_and_purge(root):
    key = chain(1)[2].hex()
    assert as_json("pin", root, key) == {"key": key, "is_pinned": True}
    assert as_json("gc", root, "--capacity-bytes", "70000")["evicted"] == 4
    assert as_json("stats", root)["pinned"] == 1
    assert as_json("stats", root)["blocks"] == 4
    assert as_json("pin", root, key, "--remove")["is_pinned"] is False
    run("pin", root, key, "--remove", code=2)
    run("purge", root, code=2)
    assert as_json("purge", root, "--yes") == {"removed": 4}
    assert "0 blocks" in run("stats", root)


def test_mistakes_are_said(root, tmp_path):
    run("ls", tmp_path / "nowhere", code=2)
    run("inspect", root, "ffff", code=2)
    run("inspect", root, "", code=2)
