"""Which block leaves: written traces, laws of every policy, and hit ratios on a trace."""

import random

import bench_store_policies as bench
import pytest

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.store.index import Index
from hf_tiered_cache.store.policies import LRU, S3FIFO, EvictionPolicy

OWN = f"{__name__}:Newest"
POLICIES = sorted(EvictionPolicy.registry)
ROOT = b"root"


class Newest(EvictionPolicy, name="newest"):
    """A policy as somebody else might write it."""

    def __init__(self, capacity_bytes):
        super().__init__(capacity_bytes)
        self.keys = []

    def on_put(self, key, num_bytes, parent):
        self.keys.append(key)

    def on_hit(self, key):
        pass

    def victim(self):
        return self.keys[-1]

    def on_evict(self, key):
        self.keys.remove(key)


def index_of(policy, capacity, chains):
    """An index with chains such as "abc" put one after the other, and the order of evictions."""
    index, gone = Index(EvictionPolicy.by_name(policy)(capacity)), []

    def evict(key):
        gone.append(key.decode())
        index.remove(key)

    for chain in chains:
        keys = [letter.encode() for letter in chain]
        parents = dict(zip(keys, [ROOT, *keys], strict=False))
        missing = [key for key in keys if key not in index]
        keep = [parent for key in missing if (parent := parents[key]) in index]
        if index.make_room(len(missing), evict, keep):
            for key in reversed(keys):
                index.put(key, 1, parents[key])
    return index, "".join(gone)


@pytest.mark.parametrize(
    ("policy", "capacity", "chains", "gone"),
    [
        ("lru", 4, ["ab", "cd", "ab", "ef"], "dc"),
        ("fifo", 4, ["ab", "cd", "ab", "ef"], "ba"),
        ("lru", 4, ["abcd", "ef", "g"], "dcb"),
        ("fifo", 4, ["abcd", "ef", "g"], "dcb"),
        ("s3fifo", 4, ["abcd", "ef", "g"], "dcb"),
        # The prefix is shared, so its branches go first.
        ("lru", 5, ["abc", "abd", "abe", "fg"], "cd"),
        # s3fifo: a is read again and stays, what comes once goes.
        ("s3fifo", 4, ["a", "a", "b", "c", "d", "e", "f", "a"], "bc"),
        (OWN, 3, ["abc", "d", "e"], "cd"),
    ],
)
def test_a_written_trace_has_the_written_victims(policy, capacity, chains, gone):
    _, evicted = index_of(policy, capacity, chains)
    assert evicted == gone


def check_laws(index):
    assert index.num_bytes == sum(entry.num_bytes for entry in index.entries.values())
    for key, entry in index.entries.items():
        assert entry.parent in index or entry.parent == ROOT, f"{key} is stranded"


@pytest.mark.parametrize("policy", [*POLICIES, OWN])
def test_laws_on_a_random_walk(policy):
    rng = random.Random(0)
    capacity = 40
    index = Index(EvictionPolicy.by_name(policy)(capacity))
    parents = {}
    for step in range(1500):
        chain = [f"{rng.randrange(4)}".encode()]
        for _ in range(rng.randrange(6)):
            chain.append(chain[-1] + f"/{rng.randrange(3)}".encode())
        parents.update(zip(chain, [ROOT, *chain], strict=False))
        if rng.random() < 0.3:
            for key in reversed(chain):
                index.hit(key)
        elif rng.random() < 0.05:
            for key in sorted(index.entries, key=len, reverse=True):
                if key.startswith(chain[0]):
                    index.remove(key)
        else:
            for key in chain:
                size = rng.randrange(1, 4)
                keep = [parents[key]] if parents[key] in index else []
                if key in index or index.make_room(size, index.remove, keep):
                    index.put(key, size, parents[key])
                assert index.num_bytes <= capacity
        check_laws(index)
        assert step or len(index)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_must_stay_stays_and_a_store_of_it_alone_takes_nothing(policy):
    index, _ = index_of(policy, 6, ["abc", "def"])
    assert index.make_room(3, index.remove, keep=[b"c"])
    assert sorted(index.entries) == [b"a", b"b", b"c"]
    assert not index.make_room(4, index.remove, keep=[b"c"])
    assert not index.make_room(7, index.remove)
    assert sorted(index.entries) == [b"a", b"b", b"c"]


def test_the_ghost_is_bounded():
    policy = S3FIFO(100)
    index = Index(policy)
    for number in range(10_000):
        assert index.make_room(1, index.remove)
        index.put(str(number).encode(), 1, ROOT)
    assert len(policy._ghost) <= 300


def test_lru_is_the_order_of_the_last_reading():
    policy = LRU(10)
    for key in (b"a", b"b", b"c"):
        policy.on_put(key, 1, ROOT)
    policy.on_hit(b"a")
    assert policy.victim() == policy.victim() == b"b"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fifo", (0.361, 0.491, 0.585)),
        ("lru", (0.363, 0.494, 0.585)),
        ("s3fifo", (0.378, 0.552, 0.587)),
    ],
)
def test_hit_ratios_on_the_small_trace(policy, expected):
    """A change of a policy, or of the rule that keeps trees whole, is seen here."""
    requests = bench.read_trace(bench.SMALL_TRACE)
    distinct = len({key for keys in requests for key in keys})
    for share, ratio in zip(bench.SHARES, expected, strict=True):
        got = bench.prefix_hits(requests, policy, round(share * distinct))
        assert got == pytest.approx(ratio, abs=0.01)
        assert got <= bench.belady_hits(requests, round(share * distinct)) + 0.01


def test_an_unknown_policy_lists_the_known():
    with pytest.raises(ConfigError, match="known: fifo, lru"):
        EvictionPolicy.by_name("clock")
