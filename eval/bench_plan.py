"""How far predictions are off: `cache.plan()` beside what then happens, over a grid.

    python eval/bench_plan.py
    python eval/bench_plan.py --quick

Random models of several shapes decode behind contexts of random keys and values, with different
shares of the blocks off the device (read past the page cache unless told otherwise), and prefill a
prompt. Each row predicts and runs in turn, some rounds; the error is that of the medians, relative
to what was measured. A shared machine changes its speed within seconds: the spread of the measured
rounds is printed beside each error, and no prediction can be better than that.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import bench_generate
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from hf_tiered_cache import TieredCache
from hf_tiered_cache.evaluation.scoring import block_shape
from hf_tiered_cache.evaluation.timing import fill
from hf_tiered_cache.planner.prediction import Plan, Prediction

import benchmarking

BAR_MEDIAN, BAR_WORST = 0.15, 0.30
NEW_TOKENS, CHUNK = 4, 1024


@dataclass(frozen=True)
class Shape:
    """A random model."""

    name: str
    config: LlamaConfig


def llama(name: str, width: int, layers: int, heads: int, kv_heads: int) -> Shape:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32768,
        max_position_embeddings=1 << 20,
    )
    return Shape(name, config)


SHAPES = (
    llama("small, 4 layers, no groups", 512, 4, 8, 8),
    llama("8 layers, groups of 4", 1024, 8, 16, 4),
    Shape("Qwen2.5-0.5B", bench_generate.CONFIG),
)
CONTEXTS = (4096, 16384)
SHARES = (0.0, 0.5, 0.9)


@dataclass(frozen=True)
class Cell:
    """One row: seconds predicted and measured, by rounds."""

    what: str
    predicted: list[float]
    measured: list[float]
    binds: str

    @property
    def error(self) -> float:
        """Of the medians, relative to what was measured."""
        measured = statistics.median(self.measured)
        return abs(statistics.median(self.predicted) - measured) / measured

    def row(self, table: benchmarking.Table) -> None:
        low, high = min(self.measured), max(self.measured)
        table.value(
            self.what,
            f"{self.error:.0%}",
            note=f"predicted {statistics.median(self.predicted):.3f} s, measured"
            f" {statistics.median(self.measured):.3f} [{low:.3f}, {high:.3f}]; {self.binds} binds",
        )


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    table = benchmarking.Table("error of cache.plan() against what was measured")
    cells = []
    for shape in SHAPES[: arguments.shapes]:
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32).eval()
        for context in arguments.contexts:
            for share in arguments.shares:
                cells.append(decode_cell(model, shape.name, context, share, arguments))
                cells[-1].row(table)
        cells.append(prefill_cell(model, shape.name, min(arguments.contexts), arguments))
        cells[-1].row(table)
        del model
    errors = [cell.error for cell in cells]
    for what, error, bar in (
        ("median error", statistics.median(errors), BAR_MEDIAN),
        ("worst error", max(errors), BAR_WORST),
    ):
        table.value(what, f"{error:.0%}", bar=f"{bar:.0%}", is_reached=error <= bar)
    table.finish(arguments.json)


def decode_cell(
    model: PreTrainedModel, name: str, context: int, share: float, arguments: argparse.Namespace
) -> Cell:
    """A token behind a context."""
    with new_cache(model, context + NEW_TOKENS, share, arguments) as cache:
        fill((cache,), model, context)
        token = torch.ones(1, 1, dtype=torch.long)

        def run() -> float:
            model(token, past_key_values=cache)  # the ring is full in the middle of a run
            start = perf_counter()
            for _ in range(NEW_TOKENS):
                model(token, past_key_values=cache)
            seconds = (perf_counter() - start) / NEW_TOKENS
            cache.crop(-NEW_TOKENS - 1)
            return seconds

        what = f"{name}: decode behind {context:,}, {share:.0%} off"
        return in_turn(
            what, lambda: cache.plan(model, chunk=CHUNK), Plan.decode, run, arguments.rounds
        )


def prefill_cell(
    model: PreTrainedModel, name: str, context: int, arguments: argparse.Namespace
) -> Cell:
    """A whole prompt, half of it on disk at the end."""
    model.set_attn_implementation("tiered")
    ids = torch.ones(1, context, dtype=torch.long)
    with new_cache(model, context, 0.5, arguments) as cache:

        def run() -> float:
            start = perf_counter()
            for chunk in ids.split(CHUNK, 1):
                model(chunk, past_key_values=cache, logits_to_keep=1)
            seconds = perf_counter() - start
            cache.reset()
            return seconds

        what = f"{name}: prefill of {context:,}, 50% off"
        cell = in_turn(
            what,
            lambda: cache.plan(model, context, chunk=CHUNK),
            lambda plan: plan.prefill,
            run,
            rounds=1,
        )
    model.set_attn_implementation("sdpa")
    return cell


def new_cache(
    model: PreTrainedModel, context: int, share: float, arguments: argparse.Namespace
) -> TieredCache:
    """One with room for all but `share` of its blocks on the device."""
    budgets = block_shape(model, None, arguments.disk_dir).budgets(context, share)
    disk = {"disk_dir": arguments.disk_dir, "disk_io": arguments.disk_io}
    return TieredCache(model.config, **budgets, **disk)


def in_turn(
    what: str,
    plan: Callable[[], Plan],
    phase: Callable[[Plan], Prediction],
    run: Callable[[], float],
    rounds: int,
) -> Cell:
    """Predict and run, round by round, after a run that does not count."""
    run()
    predicted, measured, binds = [], [], ""
    for _ in range(rounds):
        prediction = phase(plan())
        predicted.append(prediction.seconds)
        binds = prediction.binds
        measured.append(run())
    return Cell(what, predicted, measured, binds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk-dir")
    parser.add_argument("--disk-io", default="direct")
    parser.add_argument("--quick", action="store_true", help="one shape and context, 1 round")
    parser.add_argument("--json", help="also write the results here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.contexts, arguments.rounds = 1, CONTEXTS[:1], 1
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
