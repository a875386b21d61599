"""The copy lane of a CUDA device: two streams of its own, besides the one the model runs on.

Loads and stores each have a stream of their own, so both directions of the link work at once.
Events order them against the caller's current stream, which is asked for at every call: a user may
run under a stream of his own. Only memory of the cache's own tiers is touched here, for as long as
the cache lives, so torch's allocator need not know (no `record_stream`).
"""

import itertools
from collections.abc import Sequence
from time import monotonic
from types import ModuleType
from typing import ClassVar

import torch

from hf_tiered_cache.devices.cuda_clock import CudaClock
from hf_tiered_cache.observe.metrics import LaneCounters
from hf_tiered_cache.transfers import Transfer

PROBE_ROUNDS = 4
TRY_SECONDS = 0.1


class CudaMark:
    """A moment of the stream that was current; see `Mark`."""

    def __init__(self, event: torch.cuda.Event, loads: torch.cuda.Stream) -> None:
        self._event = event
        self._loads = loads
        self._holds_them = False

    def hold_loads(self) -> None:
        """Let the loads that the lane is given from now on come after this moment: once is enough,
        for loads keep their order."""
        if not self._holds_them:
            self._loads.wait_event(self._event)
            self._holds_them = True


class CudaTransfer(Transfer):
    """A copy that ends with an event. `number`: of the copies of a stream, which keep their order;
    that of a later one is larger."""

    __slots__ = ("_end", "_lane", "_number", "_stream")

    def __init__(
        self, lane: "CudaLane", end: torch.cuda.Event, stream: torch.cuda.Stream, number: int
    ) -> None:
        super().__init__()
        self._lane = lane
        self._end = end
        self._stream = stream
        self._number = number

    def is_ready(self) -> bool:
        """Whether the copy is done."""
        if not self._is_ready and self._end.query():
            self.end_part()
        return self._is_ready

    def wait(self) -> None:
        """Return when the copy is done."""
        if not self._is_ready:
            self._end.synchronize()
            self.end_part()
        super().wait()

    def ends_after(self, other: Transfer) -> bool:
        """Whether `other` is a copy of the same stream, and not a later one."""
        return (
            isinstance(other, CudaTransfer)
            and other._stream is self._stream
            and other._number <= self._number
        )

    def hold_device(self) -> None:
        """Let what the current stream is given from now on come after the copy."""
        if not self.is_ready():
            self._lane.hold(self._end)


class CudaLane:
    """Copies between a CUDA device and host memory; see `CopyLane`.

    core: the compiled CUDA module, whose copies take fewer calls than torch's; None without it.
    """

    def __init__(self, device: torch.device, core: ModuleType | None) -> None:
        self._device = device
        self._loads = torch.cuda.Stream(device)
        self._stores = torch.cuda.Stream(device)
        self._core = core
        self._counters = LaneCounters()
        self._numbers = itertools.count()  # of the copies
        self._busy, self._waits = CudaClock(), CudaClock()

    def carries(self, block: torch.Tensor) -> bool:
        """Whether `block` is memory of the device."""
        return block.is_cuda

    def mark(self) -> CudaMark:
        """The moment at which all that the current stream was given so far is done."""
        return CudaMark(self._current().record_event(), self._loads)

    def load(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        is_pinned: bool = True,
    ) -> Transfer:
        """Copy host memory to the device."""
        transfer = self._copy(self._loads, sources, targets, is_pinned, is_load=True)
        self._counters.moved_bytes += sum(block.numel() for block in targets)
        return transfer

    def load_rows(
        self,
        source: torch.Tensor,
        rows: Sequence[int],
        target: torch.Tensor,
        target_rows: Sequence[int],
    ) -> Transfer:
        """Copy rows of pinned memory to rows of the device's, in one call."""
        if self._core is None:
            return self.load([source[row] for row in rows], [target[row] for row in target_rows])
        size = target.stride(0)
        first, first_target = source.data_ptr(), target.data_ptr()
        self._counters.moved_bytes += size * len(rows)
        return self._copy_addresses(
            self._loads,
            [first + row * size for row in rows],
            [first_target + row * size for row in target_rows],
            [size] * len(rows),
            is_pinned=True,
            is_load=True,
        )

    def store(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        is_pinned: bool = True,
    ) -> Transfer:
        """Copy memory of the device to host memory, after what the current stream was given."""
        self._stores.wait_event(self._current().record_event())
        return self._copy(self._stores, sources, targets, is_pinned, is_load=False)

    def hold(self, event: torch.cuda.Event) -> None:
        """Let the current stream wait for an event, and count how long it stood still."""
        current = self._current()
        begin = self._waits.begin(current)
        current.wait_event(event)
        self._waits.end(begin, current)

    def settle(self) -> None:
        """Wait until no copy is under way."""
        self._loads.synchronize()
        self._stores.synchronize()

    def settle_device(self) -> None:
        """Wait for every stream: a user's own may attend what torch's allocator, which knows only
        the stream that the memory was made on, would give to others at once."""
        torch.cuda.synchronize(self._device)

    def measure(self) -> LaneCounters:
        """The totals so far, as far as the device is through with them."""
        self._counters.busy_seconds = self._busy.seconds()
        self._counters.wait_seconds = self._waits.seconds()
        return self._counters

    def probe(self, pinned: Sequence[torch.Tensor], target: torch.Tensor) -> float:
        """Bytes per second that the link takes to the device, from a few short copies."""
        rates = []
        for _ in range(PROBE_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(self._loads)
            with torch.cuda.stream(self._loads):
                for block in pinned:
                    target.copy_(block, non_blocking=True)
            end.record(self._loads)
            end.synchronize()
            rates.append(sum(block.numel() for block in pinned) / begin.elapsed_time(end) * 1000)
        self._counters.probed_rate = max(rates)
        return self._counters.probed_rate

    def occupy(self, pinned: Sequence[torch.Tensor], target: torch.Tensor, num_bytes: int) -> None:
        """Begin to carry so many bytes, for others to be measured beside it."""
        blocks = itertools.cycle(pinned)
        with torch.cuda.stream(self._loads):
            for _ in range(0, num_bytes, target.numel()):
                target.copy_(next(blocks), non_blocking=True)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        is_pinned: bool,
        is_load: bool,
    ) -> Transfer:
        if self._core is not None:
            return self._copy_addresses(
                stream,
                [block.data_ptr() for block in sources],
                [block.data_ptr() for block in targets],
                [block.numel() for block in targets],
                is_pinned,
                is_load,
            )
        begin = self._busy.begin(stream) if is_load else None
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        return self._transfer(stream, begin)

    def _copy_addresses(
        self,
        stream: torch.cuda.Stream,
        sources: Sequence[int],
        targets: Sequence[int],
        sizes: Sequence[int],
        is_pinned: bool,
        is_load: bool,
    ) -> Transfer:
        assert self._core is not None
        begin = self._busy.begin(stream) if is_load else None
        directions = self._core.CopyDirection
        self._core.copy(
            self._device.index,
            stream.cuda_stream,
            targets,
            sources,
            sizes,
            directions.HOST_TO_DEVICE if is_load else directions.DEVICE_TO_HOST,
            is_pinned,
        )
        return self._transfer(stream, begin)

    def _transfer(self, stream: torch.cuda.Stream, begin: torch.cuda.Event | None) -> Transfer:
        end = stream.record_event() if begin is None else self._busy.end(begin, stream)
        return CudaTransfer(self, end, stream, next(self._numbers))

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


class CudaFlags:
    """Flags in pinned memory that a CUDA device raises and waits for; see `DeviceFlags`."""

    # Words that a device did not raise in time: it may do so later, so they stay.
    _unsettled: ClassVar[list[torch.Tensor]] = []

    def __init__(self, device: torch.device, core: ModuleType) -> None:
        self._device = device
        self._core = core
        self._waits = CudaClock()

    def refusal(self) -> str:
        """Why the device does not raise flags or wait for them, as under Windows' driver model or
        on shared GPUs; empty where it does. A stream of its own tries it, at most `TRY_SECONDS`."""
        stream, word = torch.cuda.Stream(self._device), self.mailbox(4).view(torch.int32)
        self._unsettled.append(word)
        place = (self._device.index, stream.cuda_stream, word.data_ptr(), 1)
        deadline = monotonic() + TRY_SECONDS
        try:
            self._core.write_flag(*place)
            while int(word) != 1:
                if monotonic() > deadline:
                    return f"a flag was not raised within {TRY_SECONDS:g} s"
            self._core.wait_flag(*place)
            while not stream.query():
                if monotonic() > deadline:
                    return f"a flag that was raised was not seen within {TRY_SECONDS:g} s"
        except RuntimeError as error:
            return str(error)
        self._unsettled[:] = [other for other in self._unsettled if other is not word]
        return ""

    def mailbox(self, num_bytes: int) -> torch.Tensor:
        """uint8 `[num_bytes]`, zeros, that the device and the CPU both read and write."""
        with torch.inference_mode(False):  # it is written to outside of inference mode as well
            return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=num_bytes > 0)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy between a mailbox and the device, behind all that the current stream was given, and
        not behind the loads that the copy engine is at, as a copy of torch's would."""
        stream = torch.cuda.current_stream(self._device)
        source = source.contiguous()
        self._core.post(
            self._device.index,
            stream.cuda_stream,
            target.data_ptr(),
            source.data_ptr(),
            source.numel() * source.element_size(),
        )

    def raise_flag(self, address: int, value: int) -> None:
        """Let the device write `value` behind all that the current stream was given."""
        stream = torch.cuda.current_stream(self._device)
        self._core.write_flag(self._device.index, stream.cuda_stream, address, value)

    def wait_for_flag(self, address: int, value: int) -> None:
        """Let the current stream wait until the flag is at least `value` (modulo 2^32)."""
        stream = torch.cuda.current_stream(self._device)
        begin = self._waits.begin(stream)
        self._core.wait_flag(self._device.index, stream.cuda_stream, address, value)
        self._waits.end(begin, stream)

    def wait_seconds(self) -> float:
        """How long the device stood still for flags, as far as it is through with them."""
        return self._waits.seconds()
