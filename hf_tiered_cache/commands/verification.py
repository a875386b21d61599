"""What `verify` runs once its arguments are right, and how it is told."""

from dataclasses import replace
from typing import Any

import torch

from hf_tiered_cache.commands.manners import table
from hf_tiered_cache.evaluation.bars import Bar
from hf_tiered_cache.evaluation.environment import environment
from hf_tiered_cache.evaluation.names import model_name
from hf_tiered_cache.evaluation.passes import num_passes, score_window
from hf_tiered_cache.evaluation.scoring import (
    NOISE,
    REFERENCE,
    TIERED,
    Pass,
    Plan,
    Window,
    fitting_shape,
    num_tokens,
)
from hf_tiered_cache.integration.progress import progress_bar


def run(
    model: Any,
    windows: list[Window],
    plan: Plan,
    shares: list[float],
    attention: str | None,
    block_tokens: int | None,
    packing: str,
    disk_dir: str | None,
) -> list[Pass]:
    """All passes of all windows, under one bar over their tokens."""
    shape = fitting_shape(model, windows[0].context, max(shares), block_tokens, disk_dir)
    shape = replace(shape, packing=packing)
    total = num_passes(model, shares) * sum(num_tokens(window, plan) for window in windows)
    with progress_bar(total, "verify") as bar:
        return [
            one
            for window in windows
            for one in score_window(
                model, window, plan, shape, shares, attention, disk_dir, bar.update
            )
        ]


def heading(
    model: str,
    windows: list[Window],
    plan: Plan,
    passes: list[Pass],
    dtype: str,
    device: torch.device,
) -> str:
    """What was measured, in three lines."""
    facts = environment(device)
    names = ", ".join(window.document for window in windows)
    attention = {one.cache: one.attention for one in passes}
    noise = f"DynamicCache ({attention[NOISE]})" if NOISE in attention else "none can be measured"
    return (
        f"{model_name(model)}, {dtype} on {device}, kernel {facts['kernel']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}\n"
        f"{names}: {windows[0].context:,} tokens, the last {plan.decode_tokens} one by one, then "
        f"{plan.new_tokens} new ones\n"
        f"ours: TieredCache ({attention[TIERED]}) against DynamicCache ({attention[REFERENCE]}); "
        f"noise: {noise} against that\n"
    )


def report(kept: list[Bar]) -> str:
    """A line per figure: ours, the noise, the bar, met or missed; shares that give the same in one
    line."""
    shares: dict[tuple[str, ...], list[str]] = {}
    for bar in kept:
        line = (bar.name, bar.measured, bar.noise, bar.bar, bar.verdict)
        shares.setdefault(line, []).append(bar.share)
    headings = ("figure", "off device", "ours", "noise", "bar", "")
    return table(
        [headings, *((line[0], ", ".join(of_it), *line[1:]) for line, of_it in shares.items())]
    )
