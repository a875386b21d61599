"""A trace's spans, and how they are written in Chrome's trace format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """Something one thread did. Seconds of `perf_counter`; spans of a thread nest."""

    name: str
    start: float
    end: float
    thread: int
    layer: int | None = None
    blocks: range | None = None  # columns of the layer's table


@dataclass(frozen=True, slots=True)
class TransferSpan:
    """Blocks on their way from or to a tier. Seconds of `perf_counter`:

        issued <= began <= ended

    It was asked for at `issued`; bytes moved in [began, ended). `is_inline`: by the thread that
    asked, which could do nothing else meanwhile. Where not `is_timed` the tier did not say when:
    `began` is `issued`, and `ended` when somebody saw that it had. What is still under way ends
    with the trace.
    """

    kind: str  # LOAD or STORE
    tier: str
    issued: float
    began: float
    ended: float
    layers: tuple[int, ...]
    num_blocks: int
    num_bytes: int
    is_inline: bool
    is_timed: bool


def chrome_events(
    start: float,
    spans: Sequence[Span],
    tracks: Mapping[tuple[str, str], Sequence[Sequence[TransferSpan]]],
    num_dropped: int,
) -> dict[str, Any]:
    """What happened from `start` on as Chrome's format has it, in microseconds. tracks: transfers
    by (kind, tier), those of a track one after the other."""
    rows = _Rows(start)
    threads = list(dict.fromkeys(span.thread for span in spans))
    for number, thread in enumerate(threads):
        row = rows.row("compute" if number == 0 else f"compute, thread {number + 1}")
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            if span.thread == thread:
                rows.add(row, span.name, span.start, span.end, _facts(span))
    for (kind, tier), of_tier in tracks.items():
        for number, lane in enumerate(of_tier):
            row = rows.row(f"{kind} {tier} {number + 1}")
            for one in lane:
                layers = ", ".join(map(str, one.layers))
                facts = {"blocks": one.num_blocks, "bytes": one.num_bytes, "layers": layers}
                rows.add(row, f"{kind} layer {layers}", one.issued, one.ended, facts)
                rows.add(row, "bytes move", one.began, one.ended, {})
    return {
        "traceEvents": rows.events,
        "displayTimeUnit": "ms",
        "otherData": {"dropped_events": num_dropped},
    }


class _Rows:
    """Events in Chrome's format, by rows that have names and keep their order."""

    def __init__(self, start: float) -> None:
        self.events: list[dict[str, Any]] = []
        self._start = start
        self._num_rows = 0

    def row(self, name: str) -> int:
        """A new row at the bottom."""
        self._num_rows += 1
        named: dict[str, Any] = {"name": name}
        ordered: dict[str, Any] = {"sort_index": self._num_rows}
        for what, facts in (("thread_name", named), ("thread_sort_index", ordered)):
            event = {"ph": "M", "pid": 1, "tid": self._num_rows, "name": what, "args": facts}
            self.events.append(event)
        return self._num_rows

    def add(self, row: int, name: str, start: float, end: float, facts: dict[str, Any]) -> None:
        """One span."""
        self.events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": row,
                "name": name,
                "ts": (start - self._start) * 1e6,
                "dur": (end - start) * 1e6,
                "args": facts,
            }
        )


def _facts(span: Span) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if span.layer is not None:
        facts["layer"] = span.layer
    if span.blocks is not None:
        facts["blocks"] = f"[{span.blocks.start}, {span.blocks.stop})"
    return facts
