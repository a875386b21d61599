"""What every benchmark here shares: sides timed in turn, ratios of medians, a table with bars.

Absolute speeds of a shared machine move within minutes, so a claim is a ratio of two sides that
were timed alternately in one process. The medians of both are printed beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tiered_cache.evaluation.environment import environment
from hf_tiered_cache.evaluation.timing import Samples, paired

__all__ = ["Row", "Samples", "Table", "environment", "paired"]


@dataclass
class Row:
    """One measured figure beside its bar."""

    what: str
    measured: str
    bar: str
    is_reached: bool | None
    note: str
    data: dict[str, Any]


class Table:
    """Rows printed as they come; `finish` writes them as JSON and says what was missed."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[Row] = []
        print(f"\n{title}\n{'-' * len(title)}", flush=True)

    def ratio(
        self,
        what: str,
        *,
        baseline: Samples,
        ours: Samples,
        bar: float | None = None,
        note: str = "",
    ) -> float:
        """Add the row baseline / ours (how many times faster; a share where the baseline is a
        bound); return it."""
        ratio = baseline.median / ours.median
        pairs = [b / o for b, o in zip(baseline.seconds, ours.seconds, strict=True)]
        data = {
            "ratio": ratio,
            "ratio_min": min(pairs),
            "ratio_max": max(pairs),
            "baseline_seconds": baseline.seconds,
            "ours_seconds": ours.seconds,
        }
        spread = f"[{min(pairs):.2f}, {max(pairs):.2f}]"
        self._add(
            Row(
                what,
                f"{ratio:.2f}x",
                f"{bar:g}x" if bar is not None else "",
                ratio >= bar if bar is not None else None,
                f"{spread} {note}",
                data,
            )
        )
        return ratio

    def value(
        self,
        what: str,
        measured: str,
        *,
        bar: str = "",
        is_reached: bool | None = None,
        note: str = "",
    ) -> None:
        """Add a row that is no ratio of times."""
        self._add(Row(what, measured, bar, is_reached, note, {}))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        verdict = {True: "reached", False: "MISSED", None: ""}[row.is_reached]
        bar = f"bar {row.bar}" if row.bar else ""
        print(
            f"{row.what:<66} {row.measured:>9}  {bar:<10} {verdict:<8} {row.note}".rstrip(),
            flush=True,
        )

    def finish(self, json_file: str | None = None) -> None:
        """Count the bars, and write everything to `json_file` if one is given."""
        judged = [row for row in self.rows if row.is_reached is not None]
        print(f"{sum(bool(row.is_reached) for row in judged)} of {len(judged)} bars reached")
        if json_file:
            results = {"title": self.title, **environment(), "rows": [vars(r) for r in self.rows]}
            Path(json_file).write_text(json.dumps(results, indent=1) + "\n")
