"""Self-speculation beside plain decode of a cold cache: tokens a pass, tokens per second.

    python eval/bench_speculation.py
    python eval/bench_speculation.py --model HuggingFaceTB/SmolLM2-135M-Instruct --context 7168

A prompt is computed once and put into caches with little of it on the device; then so many tokens
are decoded, greedily, by each side in turn:

    resident   everything on the device, plain `generate`: what no disk could improve
    cold       the same budget as below, plain `generate`
    drafts     `speculate` with so many guesses for each pass
    speculate  `speculate` as it comes: the number of guesses follows from what was measured

on a real disk past the page cache, and on one throttled to a fixed rate (`slow_disk.py`), on which
the method says the same on any machine. Texts: prose (Python's language reference) and code (its
standard library). The tokens of all sides must be identical.
"""

import argparse
import copy
from time import perf_counter
from typing import Any

import torch
from slow_disk import SlowDisk
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_tiered_cache import TieredCache, speculate
from hf_tiered_cache.evaluation.scoring import BlockShape, block_shape
from hf_tiered_cache.evaluation.standard_library import (
    held_out_files,
    language_reference,
    read_files,
)

import benchmarking

TOKENS_PER_PASS = {"prose": 5.0, "code": 6.5}  # bars, at 8 guesses
FASTER_BAR = 3.0


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    SlowDisk.bytes_per_second = arguments.slow_rate
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    shape = block_shape(model, arguments.block_tokens, None)
    table = benchmarking.Table(
        f"self-speculation: {arguments.context:,} tokens, {arguments.resident:.0%} on the device"
    )
    for text in arguments.texts:
        bench(table, text, model, tokenizer, shape, arguments)
    table.finish(arguments.json)


def bench(
    table: benchmarking.Table,
    text: str,
    model: Any,
    tokenizer: Any,
    shape: BlockShape,
    arguments: argparse.Namespace,
) -> None:
    """The rows of one text."""
    read = language_reference() if text == "prose" else read_files(held_out_files())
    ids = tokenizer(read[: 8 * arguments.context], return_tensors="pt").input_ids
    ids = ids[:, : arguments.context]
    everything = TieredCache(model.config, block_tokens=shape.block_tokens, disk_bytes=0)
    with torch.no_grad():
        for chunk in ids[:, :-1].split(512, dim=1):
            model(chunk, past_key_values=everything, logits_to_keep=1)
    most = arguments.context + arguments.new_tokens + arguments.draft_tokens + 1
    knobs = shape.budgets(most, 1 - arguments.resident, num_forks=2)
    knobs["demotion"] = arguments.demotion
    disks = {
        "disk": {**knobs, "disk_io": "direct"},
        "slow disk": {
            **knobs,
            "extra_tiers": {"slow_disk:SlowDisk": knobs["disk_bytes"]},
            "disk_bytes": 0,
        },
    }
    resident, expected, _ = decode(model, ids, everything, arguments)
    rate = arguments.new_tokens / resident
    table.value(f"{text}: resident, plain", f"{rate:.1f}/s", note="tokens per second")
    for disk, budget in disks.items():
        with TieredCache(model.config, **budget) as cold:
            for layer, held in enumerate(everything.layers):
                cold.update(held.keys, held.values, layer)
            cold.crop(arguments.context - 1 - cold.get_seq_length())
            sides = {
                "cold": {},
                "drafts": {"custom_generate": speculate, "draft_tokens": arguments.draft_tokens},
                "speculate": {"custom_generate": speculate},
            }
            counts: dict[str, Any] = {}

            def timed(side: str, how: dict[str, Any], cold=cold, counts=counts):
                def run() -> float:
                    seconds, tokens, counts[side] = decode(model, ids, cold, arguments, **how)
                    assert torch.equal(tokens, expected), f"{side}: OTHER TOKENS"
                    return seconds

                return run

            runs = [timed(side, how) for side, how in sides.items()]
            measured = benchmarking.paired(*runs, rounds=arguments.rounds, warmup=0)
            samples = dict(zip(sides, measured, strict=True))
        what = f"{text}, {disk}"
        if disk == "disk":
            per_pass = counts["drafts"].tokens_per_pass
            bar = TOKENS_PER_PASS[text]
            table.value(
                f"{text}: tokens a pass with {arguments.draft_tokens} drafts",
                f"{per_pass:.1f}",
                bar=f"{bar:g}",
                is_reached=per_pass >= bar,
                note=f"{counts['drafts'].accepted} of {counts['drafts'].drafted} accepted",
            )
        for side in ("drafts", "speculate"):
            rate = arguments.new_tokens / samples[side].median
            table.ratio(
                f"{what}: {side} over cold",
                baseline=samples["cold"],
                ours=samples[side],
                bar=FASTER_BAR,
                note=f"{rate:.1f} tokens/s, {counts[side].tokens_per_pass:.1f} a pass",
            )


def decode(
    model: Any,
    ids: torch.Tensor,
    cache: TieredCache,
    arguments: argparse.Namespace,
    **how: Any,
) -> tuple[float, torch.Tensor, Any]:
    """(seconds, new tokens, counters) of one `generate` into a fork of the cache."""
    with copy.deepcopy(cache) as fork:
        began = perf_counter()
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=fork,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            do_sample=False,
            **how,
        )
        return perf_counter() - began, tokens[:, ids.shape[1] :], fork.speculation


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="eval/tiny_lm")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--resident", type=float, default=0.15, help="share on the device")
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--texts", nargs="+", default=["prose", "code"], choices=TOKENS_PER_PASS)
    parser.add_argument("--slow-rate", type=float, default=500e6, help="bytes per second")
    parser.add_argument("--demotion", default="sinks_and_recent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
