"""Whose half precision is nearer to the truth: the cache's or `DynamicCache`'s?

    python eval/against_float64.py
    python eval/against_float64.py --model HuggingFaceTB/SmolLM2-135M --context 2048

The same text goes, chunk by chunk, its last tokens one by one, through the model in float64 and, in
half precision with the same weights, through `DynamicCache` with sdpa, `DynamicCache` with eager
attention and a `TieredCache`. A position's error is the root mean square of its logits' distance
from those of float64. Ours must not be the farther one: the geometric mean over the positions of
its error over theirs is at most 1, within three standard errors.
"""

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import tqdm
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import logging

from hf_tiered_cache import TieredCache
from hf_tiered_cache.evaluation.documents import STDLIB, long_documents, read_texts
from hf_tiered_cache.evaluation.models import load_model, load_tokenizer
from hf_tiered_cache.evaluation.names import model_name
from hf_tiered_cache.evaluation.scoring import fitting_shape

import benchmarking

TINY_LM = Path(__file__).parent / "tiny_lm"
ROWS_AT_ONCE = 64  # of the logits, in float64
STANDARD_ERRORS = 3
SDPA, EAGER, OURS = "DynamicCache, sdpa", "DynamicCache, eager", "TieredCache"


@dataclass
class Side:
    """A cache, the attention that goes with it, and how far its logits are from float64's."""

    attention: str
    cache: Cache
    errors: list[Tensor] = field(default_factory=list)  # [positions], RMS over the vocabulary
    largest: float = 0.0
    flips: int = 0

    def compare(self, logits: Tensor, truth: Tensor) -> None:
        """Note the distance of logits `[positions, vocabulary]` from `truth`."""
        for ours, true in zip(logits.split(ROWS_AT_ONCE), truth.split(ROWS_AT_ONCE), strict=True):
            difference = ours.double() - true
            self.errors.append(difference.square().mean(-1).sqrt())
            self.largest = max(self.largest, difference.abs().max().item())
            self.flips += int((ours.argmax(-1) != true.argmax(-1)).sum())


@torch.no_grad()
def measure(
    model: PreTrainedModel, ids: Tensor, chunk: int, decode_tokens: int, sides: dict[str, Side]
) -> None:
    """Put tokens `[1, tokens]` through the model in float64 and through every side."""
    exact, truth = copy.deepcopy(model).double(), DynamicCache(config=model.config)
    prefilled = ids.shape[1] - decode_tokens
    parts = [*ids[:, :prefilled].split(chunk, 1), *ids[:, prefilled:].split(1, 1)]
    for part in tqdm(parts, unit="forward", leave=False):
        expected = exact(part, past_key_values=truth).logits[0]
        for side in sides.values():
            model.set_attn_implementation(side.attention)
            side.compare(model(part, past_key_values=side.cache).logits[0], expected)


def compare(table: benchmarking.Table, sides: dict[str, Side]) -> bool:
    """Print all figures; return whether ours is nowhere the farther one."""
    errors = {name: torch.cat(side.errors) for name, side in sides.items()}
    for name, side in sides.items():
        root = errors[name].square().mean().sqrt().item()
        table.value(
            f"{name}: RMS error",
            f"{root:.4g}",
            note=f"largest {side.largest:.3g}, other likeliest token {side.flips} of "
            f"{len(errors[name])}",
        )
    nearer = []
    for name in (SDPA, EAGER):
        ratios = (errors[OURS] / errors[name]).log()
        mean, spread = ratios.mean().item(), ratios.std().item() / math.sqrt(len(ratios))
        nearer.append(mean <= STANDARD_ERRORS * spread)
        table.value(
            f"{OURS} over {name}: geometric mean of the positions' errors",
            f"{math.exp(mean):.3f}",
            bar=f"1 + {STANDARD_ERRORS} x {spread:.4f}",
            is_reached=nearer[-1],
            note=f"nearer at {(ratios < 0).double().mean():.0%} of the positions",
        )
    return all(nearer)


def main(command: Sequence[str] | None = None) -> int:
    """Run; return 0 if ours is not the farther one, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(TINY_LM), help="hub id or folder")
    parser.add_argument("--data", default=STDLIB, help="as in perplexity.py")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--decode-tokens", type=int, default=64, help="the last, one by one")
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens per forward")
    parser.add_argument("--off-device", type=float, default=0.5, help="share of our cache on disk")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args(command)
    logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    texts = read_texts(arguments.data)
    (document,) = long_documents(texts, tokenizer, arguments.context, 1, join=False)
    model = load_model(arguments.model, arguments.dtype)
    shape = fitting_shape(model, arguments.context, arguments.off_device)
    budgets = shape.budgets(arguments.context, arguments.off_device)
    facts = benchmarking.environment()
    title = (
        f"{model_name(arguments.model)}, {arguments.dtype}, {arguments.context:,} tokens of "
        f"{document.name}, the last {arguments.decode_tokens} one by one: distance from float64"
    )
    table = benchmarking.Table(f"{title}; {facts['processor']}, kernel {facts['kernel']}")
    with TieredCache(config=model.config, **budgets) as cache:
        sides = {
            SDPA: Side("sdpa", DynamicCache(config=model.config)),
            EAGER: Side("eager", DynamicCache(config=model.config)),
            OURS: Side("sdpa", cache),
        }
        ids = document.ids[None, : arguments.context]
        measure(model, ids, arguments.chunk, arguments.decode_tokens, sides)
    is_nearer = compare(table, sides)
    table.finish()
    return 0 if is_nearer else 1


if __name__ == "__main__":
    sys.exit(main())
