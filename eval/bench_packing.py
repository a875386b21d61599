"""Packed blocks: how many bits a value takes, and what they cost or gain in decode.

    python eval/bench_packing.py
    python eval/bench_packing.py --models eval/tiny_lm path/to/SmolLM2-135M --directory /mnt/nvme

Bits are counted on the keys and values that real models make of held-out sources of Python's
standard library, in bfloat16, in blocks of their default size. Times are of one attention step over
layers of Llama-3.1-8B's shape (32 query heads, 8 key-value heads of 128) and random normal values,
packed and raw in turn: blocks in RAM by the kernel alone, blocks on disk (past the page cache)
through the whole cache.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_tiered_cache import TieredCache, tiered_attention_forward
from hf_tiered_cache.evaluation.standard_library import held_out_files, read_files
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.tiers import Budget, DeviceTier
from hf_tiered_cache.tiers.codecs import Bf16TwelveBit

import benchmarking
from bench_offload import DTYPE, HEADS, KV_HEADS, LAYER, random_states, step_seconds

HERE = Path(__file__).parent
HEAD_DIM = 128
LAYOUT = BlockLayout(KV_HEADS, HEAD_DIM, HEAD_DIM, default_block_tokens(HEAD_DIM, DTYPE), DTYPE)
BITS_BAR, PACK_BAR, RAM_BAR, DISK_BAR = 12.15, 2.0, 1.0, 1.25
STAGING_BLOCKS = 16


def main() -> None:
    arguments = parse_arguments()
    table = benchmarking.Table(f"packed blocks, kernel {ops.backend()}")
    for name in arguments.models:
        bench_bits(table, name, arguments.tokens)
    bench_rates(table, arguments.rounds)
    for num_threads in dict.fromkeys([1, torch.get_num_threads()]):
        bench_ram(table, arguments, num_threads)
    bench_disk(table, arguments)
    table.finish(arguments.json)


def bench_bits(table: benchmarking.Table, name: str, num_tokens: int) -> None:
    """The bits per value of a model's own keys and values, and what did not go into a code."""
    num_values = num_bits = num_blocks = num_whole = most = 0
    for layout, block in blocks_of(name, num_tokens):
        codec = Bf16TwelveBit(layout)
        encoded = torch.zeros(codec.encoded_bytes, dtype=torch.uint8)
        num_blocks += 1
        num_values += layout.data_bytes // 2
        if not codec.encode(block, encoded):
            num_whole += 1
            num_bits += layout.data_bytes * 8
            continue
        num_bits += codec.data_bytes * 8
        most = max(most, *codec.num_exceptions(encoded))
        out = torch.zeros_like(block)
        codec.decode(encoded, out)
        assert torch.equal(out, block), "not what was packed"
    bits = num_bits / num_values
    on_disk = codec.encoded_bytes * 8 / (layout.data_bytes / 2)
    table.value(
        f"{Path(name).name}: bits per value",
        f"{bits:.2f}",
        bar=f"{BITS_BAR}",
        is_reached=bits <= BITS_BAR,
        note=f"{num_blocks} blocks, {num_whole} not packed, at most {most} exceptions in a plane;"
        f" {on_disk:.2f} with the padding of records",
    )


@torch.no_grad()
def blocks_of(name: str, num_tokens: int) -> Iterator[tuple[BlockLayout, torch.Tensor]]:
    """Every full block of the full-attention layers of a model that has read `num_tokens`."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE).eval()
    ids = tokenizer(read_files(held_out_files()[:40]), return_tensors="pt").input_ids
    cache = DynamicCache(config=model.config)
    for part in ids[:, :num_tokens].split(512, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    for layer in cache.layers:
        if layer.is_sliding:
            continue
        keys, values = layer.keys[0], layer.values[0]
        dims = keys.shape[2], values.shape[2]
        tokens = default_block_tokens(max(dims), DTYPE)
        layout = BlockLayout(keys.shape[0], *dims, tokens, DTYPE)
        for first in range(0, keys.shape[1] - tokens + 1, tokens):
            block = torch.zeros(1, layout.num_bytes, dtype=torch.uint8)
            layout.keys(block)[0] = keys[:, first : first + tokens]
            layout.values(block)[0] = values[:, first : first + tokens]
            yield layout, block[0]


def bench_rates(table: benchmarking.Table, rounds: int) -> None:
    """What one core packs and unpacks, of blocks that no processor's cache holds."""
    codec = Bf16TwelveBit(LAYOUT)
    blocks = normal_blocks(96)
    packed = torch.zeros(96, codec.encoded_bytes, dtype=torch.uint8)
    out = torch.zeros_like(blocks)

    def seconds(move, sources, targets) -> float:
        start = perf_counter()
        for source, target in zip(sources, targets, strict=True):
            move(source, target)
        return perf_counter() - start

    pack, unpack = benchmarking.paired(
        lambda: seconds(codec.encode, blocks, packed),
        lambda: seconds(codec.decode, packed, out),
        rounds=rounds,
        warmup=1,
    )
    assert torch.equal(out, blocks), "not what was packed"
    rate = blocks.numel() / pack.median / 1e9
    table.value(
        "packing, one core, GB/s of bfloat16",
        f"{rate:.1f}",
        bar=f"{PACK_BAR:g}",
        is_reached=rate >= PACK_BAR,
        note=f"unpacking {blocks.numel() / unpack.median / 1e9:.1f} GB/s",
    )


def bench_ram(table: benchmarking.Table, arguments: argparse.Namespace, num_threads: int) -> None:
    """Decode by the kernel alone: blocks in RAM, packed against raw."""
    codec = Bf16TwelveBit(LAYOUT)
    num_blocks = arguments.ram_bytes // LAYOUT.num_bytes
    raw = DeviceTier(LAYOUT.num_bytes, Budget("device", num_blocks * LAYOUT.num_bytes))
    packed = DeviceTier(codec.encoded_bytes, Budget("device", num_blocks * codec.encoded_bytes))
    raw.slab.copy_(normal_blocks(num_blocks))
    for block, encoded in zip(raw.slab, packed.slab, strict=True):
        assert codec.encode(block, encoded)
    slots = torch.arange(num_blocks, dtype=torch.int32)[None]
    # A view's rows are as long as raw blocks; packed ones lie closer, so that rows overlap.
    lying_close = packed.slab.as_strided(
        (num_blocks - 1, LAYOUT.num_bytes), (codec.encoded_bytes, 1)
    )
    views = [
        ops.BlockView(raw.slab, slots[:, :-1], LAYOUT),
        ops.BlockView(lying_close, ~slots[:, :-1], LAYOUT, codec=codec),
    ]
    num_tokens = (num_blocks - 1) * LAYOUT.block_tokens
    for num_queries in arguments.queries:
        query = torch.randn(1, HEADS, num_queries, HEAD_DIM, dtype=DTYPE)
        call = ops.AttentionCall(num_tokens, num_tokens - num_queries, HEAD_DIM**-0.5)
        outs = [ops.paged_attention(query, view, call).out for view in views]
        assert torch.equal(*outs), "packed blocks gave other bits"

        def seconds(view: ops.BlockView, query=query, call=call) -> float:
            before = torch.get_num_threads()
            torch.set_num_threads(num_threads)
            start = perf_counter()
            ops.paged_attention(query, view, call)
            elapsed = perf_counter() - start
            torch.set_num_threads(before)
            return elapsed

        of_raw, of_packed = benchmarking.paired(
            *[lambda view=view: seconds(view) for view in views], rounds=arguments.rounds
        )
        table.ratio(
            f"RAM, {num_threads} threads, {num_queries} queries: packed over raw",
            baseline=of_raw,
            ours=of_packed,
            bar=RAM_BAR,
            note=f"raw {num_blocks * LAYOUT.num_bytes / of_raw.median / 1e9:.1f} GB/s",
        )
    raw.close()
    packed.close()


def bench_disk(table: benchmarking.Table, arguments: argparse.Namespace) -> None:
    """Decode through the whole cache, all but the filling blocks on disk."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        caches = [make_cache(arguments, folder, packing) for packing in ("none", "bf16_12bit")]
        check_bits(*caches)
        of_raw, of_packed = benchmarking.paired(
            *[lambda cache=cache: step_seconds(cache, arguments.layers) for cache in caches],
            rounds=arguments.rounds,
        )
        cold = caches[0].stats().cold_blocks * LAYOUT.num_bytes
        table.ratio(
            "disk, 1 query: packed over raw",
            baseline=of_raw,
            ours=of_packed,
            bar=DISK_BAR,
            note=f"raw {cold / of_raw.median / 1e9:.2f} GB/s of {cold / 2**20:.0f} MiB",
        )
        for cache in caches:
            cache.close()


def make_cache(arguments: argparse.Namespace, folder: str, packing: str) -> TieredCache:
    """A cache that holds the same random keys and values, all but the filling blocks on disk."""
    torch.manual_seed(0)
    num_blocks = arguments.layers * (arguments.context // LAYOUT.block_tokens + 2)
    cache = TieredCache(
        device_bytes=(arguments.layers + STAGING_BLOCKS) * LAYOUT.num_bytes,
        disk_bytes=num_blocks * LAYOUT.num_bytes,
        disk_dir=folder,
        disk_io="direct",
        staging_bytes=STAGING_BLOCKS * LAYOUT.num_bytes,
        packing=packing,
    )
    for first in range(0, arguments.context, 1024):
        for layer in range(arguments.layers):
            cache.update(*random_states(min(1024, arguments.context - first)), layer)
    return cache


@torch.no_grad()
def check_bits(*caches: TieredCache) -> None:
    """Both must answer with the same bits."""
    query, states = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=DTYPE), random_states(1)
    outs = []
    for cache in caches:
        handles = cache.update(*states, 0)
        outs.append(tiered_attention_forward(LAYER, query, *handles, None)[0])
        del handles
        for layer in range(1, len(cache.layers)):
            cache.update(*states, layer)
        cache.crop(-1)
    assert torch.equal(*outs), "packed blocks gave other bits"


def normal_blocks(num_blocks: int) -> torch.Tensor:
    """uint8 `[num_blocks, block bytes]` of normal values."""
    blocks = torch.empty(num_blocks, LAYOUT.num_bytes, dtype=torch.uint8)
    for block in blocks:
        block[: LAYOUT.data_bytes].view(DTYPE).copy_(torch.randn(LAYOUT.data_bytes // 2))
    return blocks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[str(HERE / "tiny_lm")])
    parser.add_argument("--tokens", type=int, default=4096, help="that the models read")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=32768, help="tokens in each layer")
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 4, 9])
    parser.add_argument("--ram-bytes", type=int, default=256 << 20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", default=".", help="folder on the disk to measure")
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
