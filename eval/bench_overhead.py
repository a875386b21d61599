"""What being general costs: Python per layer and token, reordering of beams, forks of a prompt.

    python eval/bench_overhead.py

Each against `DynamicCache` doing the same. The first row has so little to compute that what is
left is the way through Python: one `update` and one attention call per layer, as a model makes
them. The others move no keys or values at all where `DynamicCache` copies every one.
"""

import argparse
import copy
from time import perf_counter

import torch
from transformers import Cache, DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_tiered_cache import TieredCache, tiered_attention_forward

import benchmarking

LAYERS, KV_HEADS, HEADS, HEAD_DIM = 8, 2, 4, 64
CONTEXT, BEAMS = 16384, 4
BAR_OVERHEAD = 1 / 1.5  # of DynamicCache's own time
BAR_REORDER = 20.0


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    table = benchmarking.Table("bookkeeping: time over DynamicCache's")
    bench_step(table, arguments.rounds)
    bench_reorder(table, arguments.rounds)
    bench_fork(table, arguments.rounds)
    table.finish(arguments.json)


def bench_step(table: benchmarking.Table, rounds: int) -> None:
    """Python overhead per layer and decode step; on one thread, or waking others is measured."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = 40
    module = torch.nn.Module()
    module.config = LlamaConfig()
    module.is_causal, module.num_key_value_groups = True, HEADS // KV_HEADS
    module.eval()
    query = torch.randn(1, HEADS, 1, HEAD_DIM)
    keys, values = torch.randn(2, 1, KV_HEADS, 1, HEAD_DIM).unbind(0)

    def seconds(cache: Cache, attend) -> float:
        start = perf_counter()
        for _ in range(steps):
            for layer in range(LAYERS):
                all_keys, all_values = cache.update(keys, values, layer)
                attend(module, query, all_keys, all_values, None, scaling=0.125, dropout=0.0)
        elapsed = perf_counter() - start
        cache.crop(-steps)
        return elapsed

    tiered_cache, dynamic_cache = new_caches()
    fill((tiered_cache, dynamic_cache), batch=1, context=64)
    tiered, dynamic = benchmarking.paired(
        lambda: seconds(tiered_cache, tiered_attention_forward),
        lambda: seconds(dynamic_cache, sdpa_attention_forward),
        rounds=10 * rounds,
        warmup=5,
    )
    calls = steps * LAYERS
    table.ratio(
        "update + attention, one layer, one token, 64 tokens of context",
        baseline=dynamic,
        ours=tiered,
        bar=BAR_OVERHEAD,
        note=f"{tiered.median / calls * 1e6:.0f} against {dynamic.median / calls * 1e6:.0f} us",
    )
    tiered_cache.close()
    torch.set_num_threads(num_threads)


def bench_reorder(table: benchmarking.Table, rounds: int) -> None:
    """`reorder_cache` of beams that share a prompt; then with the copies of filling blocks that
    the next token causes."""
    tiered_cache, dynamic_cache = new_caches()
    fill((tiered_cache, dynamic_cache), batch=1, context=CONTEXT)
    for cache in (tiered_cache, dynamic_cache):
        cache.batch_repeat_interleave(BEAMS)
    beams = torch.tensor([0, 0, 2, 1], dtype=torch.int32)
    keys, values = torch.randn(2, BEAMS, KV_HEADS, 1, HEAD_DIM).unbind(0)

    def seconds(cache: Cache, with_update: bool) -> float:
        start = perf_counter()
        cache.reorder_cache(beams)
        reordered = perf_counter()
        for layer in range(LAYERS):
            cache.update(keys, values, layer)
        return (perf_counter() if with_update else reordered) - start

    for what, with_update in (("reorder_cache", False), ("reorder_cache and update", True)):
        tiered, dynamic = benchmarking.paired(
            lambda with_update=with_update: seconds(tiered_cache, with_update),
            lambda with_update=with_update: seconds(dynamic_cache, with_update),
            rounds=rounds,
        )
        table.ratio(
            f"{what}, {CONTEXT:,} tokens, {BEAMS} beams, {LAYERS} layers",
            baseline=dynamic,
            ours=tiered,
            bar=BAR_REORDER,
            note=f"{tiered.median * 1e3:.2f} against {dynamic.median * 1e3:.2f} ms",
        )
    used = tiered_cache.stats().tiers[0].used_bytes
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic_cache.layers)
    table.value(
        "bytes of the beams, over those of DynamicCache",
        f"{used / dense:.2f}",
        bar="0.30",
        is_reached=used / dense <= 0.30,
        note=f"{used / 2**20:.0f} against {dense / 2**20:.0f} MiB; shared prompts are stored once",
    )
    tiered_cache.close()


def bench_fork(table: benchmarking.Table, rounds: int) -> None:
    """`copy.deepcopy` of a prefilled prompt."""
    tiered_cache, dynamic_cache = new_caches()
    fill((tiered_cache, dynamic_cache), batch=1, context=CONTEXT)

    def seconds(cache: Cache) -> float:
        start = perf_counter()
        copy.deepcopy(cache)
        return perf_counter() - start

    tiered, dynamic = benchmarking.paired(
        lambda: seconds(tiered_cache), lambda: seconds(dynamic_cache), rounds=rounds
    )
    table.ratio(
        f"deepcopy of {CONTEXT:,} tokens, {LAYERS} layers",
        baseline=dynamic,
        ours=tiered,
        note=f"{tiered.median * 1e3:.2f} against {dynamic.median * 1e3:.2f} ms",
    )
    tiered_cache.close()


def new_caches() -> tuple[TieredCache, DynamicCache]:
    return TieredCache(device_bytes="2GiB", disk_bytes=0), DynamicCache()


def fill(caches: tuple[Cache, ...], batch: int, context: int) -> None:
    """Write the same random keys and values into every layer of each cache."""
    for layer in range(LAYERS):
        keys, values = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM).unbind(0)
        for cache in caches:
            cache.update(keys, values, layer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
