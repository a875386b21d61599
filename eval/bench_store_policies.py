"""Prefix hit ratios of the store's eviction policies on traces of requests, beside Belady's.

    python eval/bench_store_policies.py                         # the small trace that comes along
    python eval/bench_store_policies.py conversation.jsonl.gz   # Mooncake's, Apache-2.0

A trace has one JSON object a line; `hash_ids` names the blocks of its prompt, and equal ids mean
equal prefixes (kvcache-ai/Mooncake, FAST25-release/traces). A block counts as hit only if all
blocks before it hit. Capacities are shares of the trace's distinct blocks. The index and policies
are those of the store itself.
"""

import argparse
import gzip
import heapq
import json
from collections.abc import Sequence
from pathlib import Path

from hf_tiered_cache.store.index import Index
from hf_tiered_cache.store.policies import EvictionPolicy

SMALL_TRACE = Path(__file__).parent / "traces" / "small.jsonl.gz"
SHARES = (0.03, 0.1, 0.3)
ROOT = b"root"

Request = list[bytes]


def read_trace(path: Path) -> list[Request]:
    """The blocks of each request, as keys."""
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    return [[str(one).encode() for one in json.loads(line)["hash_ids"]] for line in lines]


def prefix_hits(requests: Sequence[Request], policy: str, num_blocks: int) -> float:
    """The share of accessed blocks that a store of `num_blocks` under that policy has, with all
    blocks before them."""
    index = Index(EvictionPolicy.by_name(policy)(num_blocks))
    hits = total = 0
    for keys in requests:
        found = 0
        while found < len(keys) and keys[found] in index:
            found += 1
        hits, total = hits + found, total + len(keys)
        for key in reversed(keys[:found]):
            index.hit(key)
        parents = dict(zip(keys, [ROOT, *keys[:-1]], strict=True))
        missing = [key for key in keys[found:] if key not in index]
        keep = [parent for key in missing if (parent := parents[key]) in index]
        if index.make_room(len(missing), index.remove, keep=keep):
            for key in reversed(keys[found:]):  # as a store does with what it gets at once
                index.put(key, 1, parents[key])
    return hits / max(1, total)


def belady_hits(requests: Sequence[Request], num_blocks: int) -> float:
    """The same for one who knows the future: of the blocks without children there, the one that is
    used again last leaves. No bound, but nothing that can be built is known to be better."""
    uses: dict[bytes, list[int]] = {}
    for time, keys in enumerate(requests):
        for key in keys:
            uses.setdefault(key, []).append(time)
    next_use = dict.fromkeys(uses, 0)
    never = len(requests)

    def after(key: bytes, time: int) -> int:
        times = uses[key]
        while next_use[key] < len(times) and times[next_use[key]] <= time:
            next_use[key] += 1
        return times[next_use[key]] if next_use[key] < len(times) else never

    present: dict[bytes, int] = {}  # its next use
    children: dict[bytes, int] = {}
    parents: dict[bytes, bytes] = {}
    heap: list[tuple[int, bytes]] = []
    hits = total = 0
    for time, keys in enumerate(requests):
        found = 0
        while found < len(keys) and keys[found] in present:
            found += 1
        hits, total = hits + found, total + len(keys)
        parent = ROOT
        for key in keys:
            soon = after(key, time)
            if key not in present:
                if soon == never:
                    break  # nor are those behind it wanted again
                while len(present) >= num_blocks:
                    leaf = _pop_leaf(heap, present, children, keep=parent)
                    if leaf is None or leaf[0] <= soon:
                        if leaf is not None:
                            heapq.heappush(heap, (-leaf[0], leaf[1]))
                        break
                    del present[leaf[1]]
                    children[parents[leaf[1]]] -= 1
                    if not children[parents[leaf[1]]] and parents[leaf[1]] in present:
                        heapq.heappush(heap, (-present[parents[leaf[1]]], parents[leaf[1]]))
                if len(present) >= num_blocks:
                    break
                parents[key] = parent
                children[parent] = children.get(parent, 0) + 1
            present[key] = soon
            heapq.heappush(heap, (-soon, key))
            parent = key
    return hits / max(1, total)


def _pop_leaf(
    heap: list[tuple[int, bytes]],
    present: dict[bytes, int],
    children: dict[bytes, int],
    keep: bytes,
) -> tuple[int, bytes] | None:
    """(next use, key) of the leaf that is used last."""
    kept = []
    found = None
    while heap:
        negative, key = heapq.heappop(heap)
        if present.get(key) != -negative or children.get(key):
            continue  # it changed since; it is there again with what holds now
        if key == keep:
            kept.append((negative, key))
            continue
        found = (-negative, key)
        break
    for one in kept:
        heapq.heappush(heap, one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, default=[SMALL_TRACE])
    parser.add_argument("--policies", nargs="+", default=["fifo", "lru", "s3fifo"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for path in args.traces:
        requests = read_trace(path)
        distinct = len({key for keys in requests for key in keys})
        accesses = sum(map(len, requests))
        print(f"{path.name}: {len(requests)} requests, {accesses} blocks, {distinct} distinct")
        print("policy    " + "".join(f"{share:>8.0%}" for share in SHARES))
        rows = {}
        for policy in args.policies:
            rows[policy] = [
                prefix_hits(requests, policy, round(share * distinct)) for share in SHARES
            ]
        rows["belady"] = [belady_hits(requests, round(share * distinct)) for share in SHARES]
        for name, row in rows.items():
            print(f"{name:<10}" + "".join(f"{ratio:>8.3f}" for ratio in row))
        results[path.name] = rows
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
