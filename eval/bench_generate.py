"""Whole `generate`, everything resident: tokens per second over `DynamicCache`.

    python eval/bench_generate.py
    python eval/bench_generate.py --dtype float32 --contexts 512 4096

A random model of Qwen2.5-0.5B's shape decodes behind contexts of several lengths. The contexts
are random keys and values written into both caches (a prefill would take minutes and is the same
model code on both sides). Every round lets both caches generate the same tokens in turn and crops
them back; the ratio of the medians is printed. Random weights, so only time is of interest here:
that the tokens are the same is what the tests are for.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config
from transformers.utils import logging

from hf_tiered_cache import TieredCache
from hf_tiered_cache.evaluation.timing import decode, fill

import benchmarking

# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
CONFIG = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=True,
)
LONG_CONTEXT = 16384
BAR_AT_LONG_CONTEXT = 3.0
BAR_ANYWHERE = 1.0


def main() -> None:
    arguments = parse_arguments()
    table = benchmarking.Table("generate, everything resident: tokens/s over DynamicCache")
    for name in arguments.dtype:
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=getattr(torch, name)).eval()
        for context in arguments.contexts:
            bench(table, model, name, context, arguments)
        del model
    table.finish(arguments.json)


def bench(
    table: benchmarking.Table,
    model: torch.nn.Module,
    dtype: str,
    context: int,
    arguments: argparse.Namespace,
) -> None:
    """One row: both caches continue the same context, in turn."""
    caches = (TieredCache(device_bytes="4GiB", disk_bytes=0), DynamicCache())
    fill(caches, model, context)
    prompt = torch.randint(0, CONFIG.vocab_size, (1, context + 1))
    tiered, dynamic = benchmarking.paired(
        lambda: decode(model, caches[0], prompt, arguments.new_tokens)[1],
        lambda: decode(model, caches[1], prompt, arguments.new_tokens)[1],
        rounds=arguments.rounds,
        warmup=1,
    )
    bar = BAR_AT_LONG_CONTEXT if context >= LONG_CONTEXT and dtype == "bfloat16" else BAR_ANYWHERE
    table.ratio(
        f"{dtype}, context {context:,}",
        baseline=dynamic,
        ours=tiered,
        bar=bar,
        note=f"{arguments.new_tokens / tiered.median:.1f} against "
        f"{arguments.new_tokens / dynamic.median:.1f} tokens/s",
    )
    caches[0].close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192, LONG_CONTEXT])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one dtype, two contexts, 2 rounds")
    parser.add_argument("--json", help="also write the results here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.dtype, arguments.contexts, arguments.rounds = ["bfloat16"], [512, 4096], 2
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
