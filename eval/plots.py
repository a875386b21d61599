"""Pictures of the rows of `parity.rows`: loss by position, slowdown by share and context."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_tiered_cache.evaluation.scoring import NOISE, REFERENCE, TIERED

matplotlib.use("Agg")
DPI = 90


def nll_by_position(table: list[dict[str, Any]], path: Path) -> None:
    """Loss per position bucket at the longest context: the caches' lines must coincide.

    One panel per dtype; below it what each share adds to DynamicCache's loss.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in table))
    longest = max(row["context"] for row in table)
    figure = Figure(figsize=(5.2 * len(dtypes), 5.2), layout="constrained")
    panels = figure.subplots(2, len(dtypes), squeeze=False, sharex=True, height_ratios=(2, 1))
    for (upper, lower), dtype in zip(panels.T, dtypes, strict=True):
        for row in table:
            if (row["dtype"], row["context"]) == (dtype, longest):
                _draw_positions(upper, lower, row)
        upper.set(title=f"{dtype}, context {longest:,}", ylabel="NLL per token (nats)")
        lower.set(xlabel="position", xscale="log", ylabel="minus DynamicCache's")
        lower.axhline(0.0, color="grey", linewidth=0.8)
        upper.legend(fontsize=8)
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def _draw_positions(upper: Axes, lower: Axes, row: dict[str, Any]) -> None:
    scored = [bucket for bucket in row["by_position"] if bucket["tokens"]]
    middle = [(max(1, bucket["from"]) * bucket["to"]) ** 0.5 for bucket in scored]
    losses = [bucket["nll"] for bucket in scored]
    if row["cache"] == REFERENCE:
        upper.plot(middle, losses, color="black", linewidth=4, alpha=0.25, label="DynamicCache")
        return
    label = (
        f"DynamicCache, {row['attention']}"
        if row["cache"] == NOISE
        else f"TieredCache, {row['share_off_device']:.0%} off the device"
    )
    (line,) = upper.plot(middle, losses, marker="o", markersize=4, linewidth=1, label=label)
    deltas = [bucket["delta_nll"] for bucket in scored]
    lower.plot(middle, deltas, marker="o", markersize=4, linewidth=1, color=line.get_color())


def slowdown(table: list[dict[str, Any]], path: Path) -> None:
    """Decode time over that of the resident TieredCache, by share off the device.

    One panel per dtype, one line per context; dotted: DynamicCache at that context.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in table))
    figure = Figure(figsize=(5.2 * len(dtypes), 3.8), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        tiered = [row for row in table if (row["dtype"], row["cache"]) == (dtype, TIERED)]
        for context in sorted({row["context"] for row in tiered}):
            _draw_slowdown(axes, context, [row for row in tiered if row["context"] == context])
        axes.plot([], [], color="grey", linestyle=":", label="DynamicCache")
        axes.set(title=dtype, xlabel="share of the cache off the device")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set(ylabel="decode time over resident TieredCache", yscale="log")
    figure.savefig(path, dpi=DPI)


def _draw_slowdown(axes: Axes, context: int, tiered: list[dict[str, Any]]) -> None:
    shares = [row["share_off_device"] for row in tiered]
    slowdowns = [row["slowdown_over_resident"]["decode"] for row in tiered]
    (line,) = axes.plot(shares, slowdowns, marker="o", label=f"context {context:,}")
    resident = next(row for row in tiered if row["share_asked"] == 0)
    dynamic = 1 / resident["slowdown_over_dynamic"]["decode"]
    axes.axhline(dynamic, color=line.get_color(), linestyle=":", linewidth=1)


def slowdown_by_share(lines: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """(share off the device, slowdown over DynamicCache) points, a line per label."""
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(1.0, color="grey", linestyle=":", label="DynamicCache")
    axes.set(
        xlabel="share of the cache off the device",
        ylabel="slowdown, identical tokens",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def recall_heat_map(cells: list[dict[str, Any]], path: Path) -> None:
    """Share of right answers by depth and length; dynamic, tiered, cold blocks dropped."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"dynamic": "DynamicCache", "tiered": "TieredCache", "dropped": "cold blocks dropped"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        shares = {(cell["depth"], cell["length"]): cell[name] for cell in cells}
        picture = [[shares[depth, length] for length in lengths] for depth in depths]
        image = axes.imshow(picture, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=panels, label="right answers")
    figure.suptitle(cells[0]["task"], fontsize=10)
    figure.savefig(path, dpi=DPI)
