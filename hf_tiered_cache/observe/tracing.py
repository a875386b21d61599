"""When things happened: attention, loads, stores and waits on one clock, to see what hides what.

    with hf_tiered_cache.trace("run.json"):
        model.generate(**inputs, past_key_values=cache)

Free while nobody records: `recorder` is None, and that is all that hot paths look at. Transfers say
themselves when their bytes moved (`began_at`, `ended_at`), so a load's span is its input and output
and not the moment somebody looked. The file is Chrome's trace format: ui.perfetto.dev opens it.
"""

import contextlib
import heapq
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, Protocol

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.observe.trace_export import Span, TransferSpan, chrome_events
from hf_tiered_cache.sizes import format_bytes

ATTENTION, ATTEND, MERGE = "attention", "attend", "merge"
DRAFT, VERIFY = "draft", "verify"
LOAD_WAIT, STORE_WAIT = "load_wait", "store_wait"
WAITS = (LOAD_WAIT, STORE_WAIT)
LOAD, STORE = "load", "store"

MAX_EVENTS = 1_000_000  # some 200 MiB; what comes later is counted and left out


class Timed(Protocol):
    """A transfer, as the recorder sees it; seconds of `perf_counter`, None where unknown."""

    began_at: float | None
    ended_at: float | None

    def is_ready(self) -> bool:
        """Whether it ended."""


class Trace:
    """What happened between `trace()` and the end of its `with`; all caches, all threads.

    `spans`: of threads, in the order of their end. `transfers`: loads and stores. Times are seconds
    of `time.perf_counter`, from `start` to `end` (None while it records).
    """

    def __init__(self) -> None:
        self.start = perf_counter()
        self.end: float | None = None  # None while it records
        self.num_dropped = 0  # events beyond MAX_EVENTS
        self.spans: list[Span] = []
        self._transfers: list[TransferSpan] = []
        self._pending: list[tuple[Timed, float, Any]] = []
        self._lock = threading.Lock()

    def span(
        self,
        name: str,
        layer: int | None = None,
        blocks: range | None = None,
        inner: AbstractContextManager | None = None,
    ) -> AbstractContextManager:
        """Record what is done inside the `with` under a name of your own. inner: entered too."""
        return self._span(name, layer, blocks, inner or nullcontext())

    @contextmanager
    def _span(
        self, name: str, layer: int | None, blocks: range | None, inner: AbstractContextManager
    ) -> Iterator[None]:
        start = perf_counter()
        try:
            with inner:
                yield
        finally:
            if self._has_room():
                thread = threading.get_ident()
                self.spans.append(Span(name, start, perf_counter(), thread, layer, blocks))

    def watch(
        self,
        kind: str,
        tier: str,
        layers: Iterable[int],
        num_blocks: int,
        num_bytes: int,
        issued: float,
        transfer: Timed,
    ) -> None:
        """Record a transfer that was just started; `issued` was taken before it was."""
        if self._has_room():
            # One that nobody timed, and that is over already, was a copy on the spot.
            is_inline = transfer.is_ready() and transfer.ended_at is None
            layers = tuple(dict.fromkeys(layers))
            facts = (kind, tier, layers, num_blocks, num_bytes, is_inline)
            with self._lock:
                self._pending.append((transfer, issued, facts))
            self._collect()

    @property
    def transfers(self) -> list[TransferSpan]:
        """Loads and stores that ended, in the order of their issue."""
        self._collect()
        return sorted(self._transfers, key=lambda span: span.issued)

    @property
    def loads(self) -> list[TransferSpan]:
        """Those that brought blocks up."""
        return [span for span in self.transfers if span.kind == LOAD]

    @property
    def stores(self) -> list[TransferSpan]:
        """Those that took blocks down."""
        return [span for span in self.transfers if span.kind == STORE]

    def finish(self) -> None:
        """Nothing more is recorded; what is still under way ends here."""
        if self.end is None:
            self._collect(is_last=True)
            self.end = perf_counter()

    def _has_room(self) -> bool:
        if self.end is not None:
            return False
        if len(self.spans) + len(self._transfers) + len(self._pending) < MAX_EVENTS:
            return True
        self.num_dropped += 1
        return False

    def _collect(self, is_last: bool = False) -> None:
        """Take the times of transfers that ended."""
        with self._lock:
            left = []
            for transfer, issued, facts in self._pending:
                has_ended = transfer.is_ready()
                if not (has_ended or is_last):
                    left.append((transfer, issued, facts))
                    continue
                began, ended = transfer.began_at, transfer.ended_at
                kind, tier, layers, num_blocks, num_bytes, is_inline = facts
                is_timed = began is not None or is_inline or not has_ended
                # A copy on the spot says nothing: it began when issued and has ended now.
                began = issued if began is None else max(began, issued)
                ended = perf_counter() if ended is None else max(ended, began)
                self._transfers.append(
                    TransferSpan(
                        kind=kind,
                        tier=tier,
                        issued=issued,
                        began=began,
                        ended=ended,
                        layers=layers,
                        num_blocks=num_blocks,
                        num_bytes=num_bytes,
                        is_inline=is_inline,
                        is_timed=is_timed,
                    )
                )
            self._pending = left

    def seconds(self, name: str) -> float:
        """Time during which some span of that name ran (LOAD and STORE: bytes moved)."""
        return _length(self._intervals(name))

    def hidden_load_seconds(self) -> float | None:
        """Time in which bytes were loaded while no thread waited for them or moved them itself:
        what compute hid. None where a load did not say when its bytes moved."""
        if not all(one.is_timed for one in self.loads):
            return None
        inline = [(one.began, one.ended) for one in self.loads if one.is_inline]
        standing = _union([*self._intervals(LOAD_WAIT), *inline])
        return _length(_without(self._intervals(LOAD), standing))

    def _intervals(self, name: str) -> list[tuple[float, float]]:
        if name in (LOAD, STORE):
            return _union((span.began, span.ended) for span in self.transfers if span.kind == name)
        return _union((span.start, span.end) for span in self.spans if span.name == name)

    def __str__(self) -> str:
        lines = [f"Trace({(self.end or perf_counter()) - self.start:.2f} s)"]
        for name in dict.fromkeys(span.name for span in self.spans):
            number = sum(span.name == name for span in self.spans)
            lines.append(f"  {name:<12} {number:>7,} in {self.seconds(name):8.3f} s")
        for kind in (LOAD, STORE):
            moved = [span for span in self.transfers if span.kind == kind]
            if not moved:
                continue
            num_bytes, seconds = sum(span.num_bytes for span in moved), self.seconds(kind)
            rate = f", {num_bytes / seconds / 1e9:.2f} GB/s" if seconds else ""
            lines.append(
                f"  {kind:<12} {sum(span.num_blocks for span in moved):>7,} blocks "
                f"({format_bytes(num_bytes)}) in {seconds:.3f} s{rate}"
            )
        loading, hidden = self.seconds(LOAD), self.hidden_load_seconds()
        if hidden is None:
            lines.append(
                "  some loads did not say when their bytes moved: what compute hid is open"
            )
        elif loading:
            lines.append(
                f"  loads hidden behind compute: {hidden:.3f} of {loading:.3f} s, "
                f"{hidden / loading:.0%}"
            )
        if self.num_dropped:
            lines.append(f"  {self.num_dropped:,} more events were left out")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write Chrome's JSON trace format; open it at ui.perfetto.dev or chrome://tracing."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.chrome(), file)
            file.write("\n")

    def chrome(self) -> dict[str, Any]:
        """The trace as Chrome's format has it; times in microseconds from the beginning."""
        return chrome_events(self.start, self.spans, self.tracks(), self.num_dropped)

    def tracks(
        self, start: float = 0.0, end: float = float("inf")
    ) -> dict[tuple[str, str], list[list[TransferSpan]]]:
        """Transfers by (kind, tier), laid in as few tracks as keep those of a track apart; those
        that were under way in [start, end)."""
        found: dict[tuple[str, str], list[list[TransferSpan]]] = {}
        free: dict[tuple[str, str], list[tuple[float, int]]] = {}
        for span in self.transfers:
            if span.issued >= end or span.ended <= start:
                continue
            key = (span.kind, span.tier)
            tracks, ends = found.setdefault(key, []), free.setdefault(key, [])
            if ends and ends[0][0] <= span.issued:
                _, number = heapq.heappop(ends)
            else:
                number = len(tracks)
                tracks.append([])
            tracks[number].append(span)
            heapq.heappush(ends, (span.ended, number))
        return dict(sorted(found.items()))


recorder: Trace | None = None
"""Who records now; everybody who has something to tell asks whether there is one."""


@contextmanager
def trace(path: str | os.PathLike[str] | None = None) -> Iterator[Trace]:
    """Record every cache of this process inside the `with`; yields the `Trace`.

        with hf_tiered_cache.trace("run.json") as recorded:
            model.generate(**inputs, past_key_values=cache)
        print(recorded)  # counts, seconds, bytes; how much of the loading compute hid

    path: where its JSON goes at the end, also after an exception. Raises ConfigError when a trace
    is being recorded already, or when `path` cannot be written. A million events are kept, some
    hundred tokens of a large model; later ones are counted as `num_dropped`.
    """
    global recorder
    if recorder is not None:
        raise ConfigError("trace(): a trace is being recorded already; end its `with` first")
    if path is not None:
        try:
            with open(path, "w"):
                pass
        except OSError as error:
            raise ConfigError(
                f"trace(path={os.fspath(path)!r}) cannot be written: {error.strerror}; give the "
                "path of a file in a folder that exists"
            ) from None
    recorder = made = Trace()
    try:
        yield made
    finally:
        recorder = None
        made.finish()
        if path is not None:
            made.save(path)


Interval = tuple[float, float]


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, in order and apart."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _without(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """What of the first is in none of the others; both as `_union` gives them."""
    left: list[Interval] = []
    others = [*others, (float("inf"), float("inf"))]
    position = 0
    for start, end in intervals:
        while others[position][1] <= start:
            position += 1
        for hole_start, hole_end in others[position:]:
            if hole_start >= end:
                break
            if hole_start > start:
                left.append((start, hole_start))
            start = max(start, hole_end)
        if start < end:
            left.append((start, end))
    return left


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


with contextlib.suppress(AttributeError):  # a forked child records nothing of its parent's trace
    os.register_at_fork(after_in_child=lambda: globals().update(recorder=None))
