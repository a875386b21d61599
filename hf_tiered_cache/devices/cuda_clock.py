"""Time as a CUDA device passes it: pairs of events, read when the device is through with them."""

from collections import deque

import torch

MAX_OPEN = 1000  # pairs, about a microsecond each to look at


class CudaClock:
    """Adds up the time between pairs of moments of a stream."""

    def __init__(self) -> None:
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def begin(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """The first moment of a pair: now, in the stream's order."""
        return self._record(stream)

    def end(self, begin: torch.cuda.Event, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """The second moment of a pair."""
        end = self._record(stream)
        self._open.append((begin, end))
        if len(self._open) > MAX_OPEN:
            self.seconds()
        return end

    def seconds(self) -> float:
        """The sum over all pairs that the device is through with."""
        while self._open and self._open[0][1].query():
            begin, end = self._open.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event
