"""A trace as a picture: what ran at the same time.

One row for the model's forwards, for attention, its calls of the kernel, merges and waits; one for
each load and store that was under way at the same time. Attention and transfers are coloured by
layer, so that a layer's loads can be seen under the attention of the layers before it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_tiered_cache.observe.tracing import (
    ATTEND,
    ATTENTION,
    LOAD,
    LOAD_WAIT,
    MERGE,
    STORE_WAIT,
    Trace,
)

PREFILL, DECODE = "prefill", "decode"
ROWS = {  # name of the row: the spans on it
    "forward": (PREFILL, DECODE),
    "attention": (ATTENTION,),
    "attend": (ATTEND,),
    "merge": (MERGE,),
    "wait": (LOAD_WAIT, STORE_WAIT),
}
PLAIN = {PREFILL: "#c7c7c7", DECODE: "#9a9a9a", LOAD_WAIT: "#d62728", STORE_WAIT: "#ff9896"}
NUM_COLORS = 10
QUEUED_ALPHA = 0.25  # asked for, and no byte has moved yet
DPI = 100

Interval = tuple[float, float]


class MissingMatplotlibError(ImportError):
    """There is no matplotlib to draw with."""


@contextmanager
def traced_forwards(model: torch.nn.Module, recorded: Trace) -> Iterator[None]:
    """Record every forward of the model inside the `with`, as "prefill" where it has several
    tokens, else "decode"."""
    entered: list[Any] = []

    def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        tokens = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[1]
        entered.append(recorded.span(PREFILL if tokens > 1 else DECODE))
        entered[-1].__enter__()

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def draw_timeline(axes: Any, recorded: Trace, window: Interval | None = None) -> None:
    """Draw a trace into matplotlib `axes`; x in milliseconds from its beginning.

    window: seconds of `perf_counter`, as the spans have them; None for all.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    palette = colormaps["tab10"]
    first, last = window or (recorded.start, recorded.end or recorded.start)
    names: list[str] = []

    def draw_row(name: str, spans: Iterable[tuple[float, float, Any, float]]) -> None:
        """(start, end, colour, alpha) of each; one call, for there may be thousands."""
        ranges, colors = [], []
        for start, end, color, alpha in spans:
            if start < last and end > first:
                left = (max(start, first) - recorded.start) * 1e3
                ranges.append((left, (min(end, last) - recorded.start) * 1e3 - left))
                colors.append(to_rgba(color, alpha))
        axes.broken_barh(ranges, (len(names) - 0.4, 0.8), facecolors=colors, linewidth=0)
        names.append(name)

    for name, shown in ROWS.items():
        spans = [span for span in recorded.spans if span.name in shown]
        if spans:
            draw_row(
                name,
                (
                    (one.start, one.end, PLAIN.get(one.name) or palette(_color(one.layer)), 1.0)
                    for one in spans
                ),
            )
    for (kind, tier), tracks in recorded.tracks(first, last).items():
        for track in tracks:
            draw_row(
                f"{kind} {tier}" if track is tracks[0] else "",
                (
                    part
                    for one in track
                    for part in (
                        (one.issued, one.began, palette(_color(one.layers[0])), QUEUED_ALPHA),
                        (one.began, one.ended, palette(_color(one.layers[0])), 1.0),
                    )
                ),
            )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim((first - recorded.start) * 1e3, (last - recorded.start) * 1e3)
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _color(layer: int | None) -> int:
    return (layer or 0) % NUM_COLORS


def save_timeline(
    recorded: Trace, path: str | os.PathLike[str], window: Interval | None = None
) -> None:
    """Write a picture of a whole trace and, below it, of a `window`; see `draw_timeline`.

    Raises MissingMatplotlibError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingMatplotlibError(
            "drawing needs matplotlib: pip install 'hf_tiered_cache[eval]'"
        ) from None
    windows = [None, window] if window else [None]
    heights = [2 + 0.16 * sum(map(len, recorded.tracks(*(one or ())).values())) for one in windows]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    panels = figure.subplots(len(windows), squeeze=False, height_ratios=heights)[:, 0]
    for axes, one in zip(panels, windows, strict=True):
        draw_timeline(axes, recorded, one)
    loading, hidden = recorded.seconds(LOAD), recorded.hidden_load_seconds()
    title = f"the whole run: loads {loading * 1e3:.0f} ms"
    if loading and hidden is not None:
        title += f"; {hidden / loading:.0%} of it hidden"
    panels[0].set_title(title, fontsize=9)
    if window:
        panels[1].set_title("enlarged; colours are layers, pale is queued", fontsize=9)
    figure.savefig(path, dpi=DPI)
