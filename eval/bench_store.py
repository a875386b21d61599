"""What reuse costs and saves: restoring a hit of 128K tokens, decoding from the store against the
private disk tier, and the time that publishing takes of a prefill.

    python eval/bench_store.py              # everything
    python eval/bench_store.py restore      # or some of: restore decode publish

restore: files of an 8B model's shape (32 layers, 8 heads of 128, bfloat16, 512 blocks of 256
tokens), sparse, so the bytes are zeros; nothing but headers is read, as in any restore. decode:
the same prompt behind both tiers, everything off the device but what must be there, alternating.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tiered_cache import BlockStore, TieredCache
from hf_tiered_cache.integration.model_key import model_space
from hf_tiered_cache.store import files, keys

HIT_TOKENS, BLOCK_TOKENS = 131_072, 256


def sparse_hit(store: BlockStore, space: bytes, ids: list[int], config: Any) -> None:
    """Put the blocks of `ids` into the store without writing their bytes."""
    dim = config.head_dim
    shape = (config.num_key_value_heads, BLOCK_TOKENS, dim, dim)
    num_bytes = 2 * config.num_key_value_heads * BLOCK_TOKENS * dim * 2
    zeros = xxhash.xxh3_128_digest(bytes(num_bytes))
    chain = keys.block_keys(space, ids, BLOCK_TOKENS)
    parent = keys.root_key(space)
    for number, key in enumerate(chain):
        extents, offset = [], files.ALIGNMENT_BYTES
        for layer in range(config.num_hidden_layers):
            dtype = files.DTYPES["bfloat16"]
            extents.append(files.Extent(layer, dtype, shape, offset, num_bytes, zeros))
            offset += num_bytes
        header = files.Header(key, parent, space, BLOCK_TOKENS, number, files.table_of(extents))
        path = store.root / files.relative_path(space, key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        head = header.pack()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(head)
            file.seek(header.file_bytes - files.FOOTER_BYTES)
            file.write(header.footer(head))
        parent = key
    store.gc()


def restore_time(rounds: int) -> dict[str, Any]:
    """Seconds that a hit of 128K tokens takes up front."""
    config = LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 100},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(folder, capacity_bytes="1TiB")
        ids = torch.randint(0, 100, (1, HIT_TOKENS + 1), dtype=torch.int64)
        space = model_space(model)
        sparse_hit(store, space, ids[0].tolist(), config)
        times, of_model, of_cpu = [], [], []
        for _ in range(rounds):
            with TieredCache(config, store=store, disk_bytes=0, device_bytes="2GiB") as cache:
                began, at = time.perf_counter(), time.thread_time()
                found = cache.restore(ids, model)
                times.append(time.perf_counter() - began)
                of_cpu.append(time.thread_time() - at)
            assert found == HIT_TOKENS, found
            began = time.perf_counter()
            model_space(model)
            of_model.append(time.perf_counter() - began)
        store.close()
    return {
        "tokens": found,
        "restore_ms": round(1000 * statistics.median(times), 1),
        "best_ms": round(1000 * min(times), 1),
        "cpu_ms": round(1000 * statistics.median(of_cpu), 1),
        "of_it_weights_sampled_ms": round(1000 * statistics.median(of_model), 1),
    }


def small_model(layers: int = 4) -> LlamaForCausalLM:
    """Whose blocks are 1 MiB and whose other work is little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": layers},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 256},
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode_rates(rounds: int, num_tokens: int = 8192, new_tokens: int = 8) -> dict[str, Any]:
    """Seconds per token, everything from the store against everything from the private disk."""
    model = small_model()
    ids = torch.randint(0, 256, (1, num_tokens + 1))
    knobs = {"device_bytes": "40MiB", "staging_bytes": "16MiB", "disk_io": "buffered"}
    with tempfile.TemporaryDirectory() as folder, BlockStore(folder) as store:
        private = TieredCache(model.config, store=store, **knobs)
        for first in range(0, num_tokens, 1024):
            model(ids[:, first : first + 1024], past_key_values=private, logits_to_keep=1)
        private.publish()
        store.flush()
        restored = TieredCache(model.config, store=store, **knobs)
        assert restored.restore(ids, model) == num_tokens
        caches = {"disk": private, "store": restored}
        times: dict[str, list[float]] = {name: [] for name in caches}
        logits = {}
        for name, cache in caches.items():
            logits[name] = model(ids[:, -1:], past_key_values=cache).logits
        assert torch.equal(logits["disk"], logits["store"])
        for _ in range(rounds):
            for name, cache in caches.items():
                began = time.perf_counter()
                for _ in range(new_tokens):
                    model(ids[:, -1:], past_key_values=cache)
                times[name].append((time.perf_counter() - began) / new_tokens)
        cold = restored.stats().cold_blocks / (num_tokens // 128 * 4)
    seconds = {name: statistics.median(one) for name, one in times.items()}
    ratios = [disk / store for disk, store in zip(times["disk"], times["store"], strict=True)]
    return {
        **{f"{name}_ms_per_token": round(1000 * one, 2) for name, one in seconds.items()},
        "rate_of_store_over_disk": round(statistics.median(ratios), 3),
        "cold_share": round(cold, 2),
    }


@torch.no_grad()
def publish_cost(rounds: int, num_tokens: int = 4096) -> dict[str, Any]:
    """What publishing adds to a prefill: by the calls themselves, and by the thread beside it."""
    model = small_model()
    ids = torch.randint(0, 256, (1, num_tokens))
    plain, busy, calls = [], [], []
    for _ in range(rounds):
        for publishes in (False, True):
            with tempfile.TemporaryDirectory() as folder, BlockStore(folder) as store:
                cache = TieredCache(model.config, store=store, device_bytes="1GiB", disk_bytes=0)
                began = time.perf_counter()
                spent = 0.0
                for first in range(0, num_tokens, 512):
                    model(ids[:, first : first + 512], past_key_values=cache, logits_to_keep=1)
                    if publishes:
                        at = time.perf_counter()
                        cache.publish()
                        spent += time.perf_counter() - at
                took = time.perf_counter() - began
                store.flush()
            (busy if publishes else plain).append(took)
            if publishes:
                calls.append(spent)
    return {
        "prefill_s": round(statistics.median(plain), 3),
        "with_publishing_s": round(statistics.median(busy), 3),
        "calls_share": round(statistics.median(calls) / statistics.median(plain), 4),
        "added_share": round(statistics.median(busy) / statistics.median(plain) - 1, 4),
    }


PARTS = {"restore": restore_time, "decode": decode_rates, "publish": publish_cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {part: PARTS[part](args.rounds) for part in args.parts}
    for part, row in results.items():
        print(part + ": " + ", ".join(f"{name} {value}" for name, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(copy.deepcopy(results), indent=1))


if __name__ == "__main__":
    main()
