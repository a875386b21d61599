"""In-place attention: host blocks attended where they lie, while a device attends the rest.

Only the query goes down and the partial state comes up, through a mailbox of pinned memory. The
device raises a flag behind the query, a compiled thread that waits for it attends and raises
another, and the device waits for that one: neither the interpreter nor the host's own order of work
stands between them. Where the device is the CPU no lane is needed: the kernels read the host's
memory as they read the device's.
"""

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_tiered_cache.errors import TierIOError, io_error
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.ops import AttentionCall, BlockView, RunningState
from hf_tiered_cache.kernels.worker import KNOWN_FACTS, AttentionWorker, attention_rate
from hf_tiered_cache.observe.metrics import LaneCounters
from hf_tiered_cache.transfers import Transfer

# Rows of queries that share one key-value head, up to which the CPU reads each byte about as fast
# as its memory gives it; with more it computes, and the device does that better.
MAX_ROWS = 16
WAIT_SECONDS = 0.1  # at most this long is not interruptible
CLOSE_SECONDS = 60.0
FLAG_BYTES = 4


class DeviceFlags(Protocol):
    """Words of memory that the device raises and waits for, in its own order."""

    def mailbox(self, num_bytes: int) -> Tensor:
        """uint8 `[num_bytes]`, zeros, that the device and the CPU both read and write."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Let the device copy between a mailbox and its own memory, behind all it was given."""

    def raise_flag(self, address: int, value: int) -> None:
        """Let the device write `value` behind all that it was given."""

    def wait_for_flag(self, address: int, value: int) -> None:
        """Let the device wait until the flag is at least `value` (modulo 2^32)."""

    def wait_seconds(self) -> float:
        """How long the device stood still for flags, as far as that is known by now."""


class AttendedTransfer(Transfer):
    """Ends when the blocks that a job of the worker attends are no longer read."""

    __slots__ = ("_job", "_keep_alive", "_worker")

    def __init__(self, worker: AttentionWorker, job: Any, *keep_alive: object) -> None:
        super().__init__()
        self._worker = worker
        self._job = job
        self._keep_alive = keep_alive  # the job knows addresses only

    @property
    def seconds(self) -> float:
        """How long the CPU attended."""
        return self._job.seconds

    def is_ready(self) -> bool:
        """Whether it has ended."""
        if not self._is_ready and self._job.is_done:
            self._keep_alive = ()
            self.end_part(self._failure())
        return self._is_ready

    def wait(self) -> None:
        """Return when it is done. Raises TierIOError when it failed."""
        while not self.is_ready():
            self.look()
        super().wait()

    def look(self) -> None:
        """Wait a moment for it."""
        self.check_process()
        self._worker.wait(self._job, WAIT_SECONDS)

    def _failure(self) -> TierIOError | None:
        if self._job.was_cancelled:
            return io_error(None, "the cache was closed before the CPU attended its blocks")
        if self._job.error:
            return io_error(None, f"attention on the CPU failed: {self._job.error}")
        return None


class InPlaceAttention:
    """Attends blocks in host memory for a query on a device, one layer after the other.

    One mailbox serves all layers: the device takes the state of one before it is given the query of
    the next.
    """

    def __init__(self, flags: DeviceFlags) -> None:
        """Raises KernelUnavailableError without a compiled core."""
        self._flags = flags
        self._worker = AttentionWorker()
        words = flags.mailbox(2 * FLAG_BYTES)
        self._words = words  # kept alive: the query is there, the state is there
        self._addresses = (words.data_ptr(), words.data_ptr() + FLAG_BYTES)
        self._number = 0  # of the last job, which its flags are raised to
        self._query, self._state = flags.mailbox(0), flags.mailbox(0)
        self._posted: RunningState | None = None  # what was begun and not joined
        self._under_way: deque[AttendedTransfer] = deque()
        self._counters = LaneCounters()

    @staticmethod
    def can_attend(query: Tensor, kv_heads: int, call: AttentionCall) -> bool:
        """Whether a call is for the CPU: few queries, and nothing that its thread does not know."""
        rows = query.shape[2] * query.shape[1] // kv_heads
        return rows <= MAX_ROWS and not call.beyond(KNOWN_FACTS)

    def begin(self, query: Tensor, views: Sequence[BlockView], call: AttentionCall) -> Transfer:
        """Start on the views, in their order. The transfer ends when the blocks are no longer
        read. Raises UnsupportedInputError for a call that the CPU's thread cannot do."""
        if self._posted is not None:  # a step that failed has not joined its state
            self._begin_anew()
        self._reap()
        layout = views[0].layout
        posted = self._post(query)
        state = self._new_state(query, layout.value_dim)
        number = (self._number + 1) % 2**32
        self._number, self._posted = number, state
        job = self._worker.submit(posted, views, state, self._addresses, number, call)
        self._flags.raise_flag(self._addresses[0], number)
        transfer = AttendedTransfer(self._worker, job, views, posted, state)
        self._under_way.append(transfer)
        num_blocks = sum(view.table.numel() for view in views)
        self._counters.moved_bytes += num_blocks * layout.data_bytes
        return transfer

    def join(self, state: RunningState) -> None:
        """Fold what was begun last into a state on the device, which waits for it."""
        assert self._posted is not None, "nothing was begun"
        self._flags.wait_for_flag(self._addresses[1], self._number)
        posted = _floats_of_state(self._state, state.acc.shape)
        arrived = torch.empty(posted.shape, device=state.acc.device)
        self._flags.copy(posted, arrived)
        ops.join_states(state, _as_state(arrived, state.acc.shape))
        self._posted = None

    def probe(self, blocks: Tensor) -> float:
        """Bytes per second that the CPU attends, on uint8 `[slots, num_bytes]` nobody needs."""
        self._counters.probed_rate = attention_rate(self._worker, blocks)
        return self._counters.probed_rate

    def measure(self) -> LaneCounters:
        """The totals so far."""
        self._reap()
        self._counters.wait_seconds = self._flags.wait_seconds()
        return self._counters

    def close(self) -> None:
        """Stop the thread, once it did what the device was told to wait for. Idempotent.

        A device that does not come to it in a minute is not waited for: its flags are raised.
        """
        deadline = monotonic() + CLOSE_SECONDS
        for transfer in self._under_way:
            while not transfer.is_ready() and monotonic() < deadline:
                transfer.look()
        self._worker.close()
        self._posted = None  # nothing is begun anew after this

    def _post(self, query: Tensor) -> Tensor:
        """The query's copy in the mailbox, made in the device's order."""
        num_bytes = query.numel() * query.element_size()
        if self._query.numel() < num_bytes:
            self._settle()
            self._query = self._flags.mailbox(num_bytes)
        posted = self._query[:num_bytes].view(query.dtype).view(query.shape)
        self._flags.copy(query, posted)
        return posted

    def _new_state(self, query: Tensor, value_dim: int) -> RunningState:
        """Room for a state in the mailbox; the worker begins it."""
        shape = torch.Size((*query.shape[:3], value_dim))
        num_bytes = 4 * _num_floats(shape)
        if self._state.numel() < num_bytes:
            self._settle()
            self._state = self._flags.mailbox(num_bytes)
        return _as_state(_floats_of_state(self._state, shape), shape)

    def _begin_anew(self) -> None:
        """End what a step that failed has begun. Jobs that were noted have their flags, and the
        device may be waiting for what they attend. One more may be there, which an interrupt came
        before: closing the worker ends it, so that it writes to no mailbox of the next."""
        self._settle()
        self._worker.close()
        self._worker = AttentionWorker()
        self._posted = None

    def _settle(self) -> None:
        for transfer in self._under_way:
            transfer.outlast()

    def _reap(self) -> None:
        while self._under_way and self._under_way[0].is_ready():
            self._counters.add_busy(self._under_way.popleft().seconds)


def _num_floats(shape: torch.Size) -> int:
    """Of a state whose `acc` has this shape."""
    return shape[:3].numel() * (shape[3] + 2)


def _floats_of_state(memory: Tensor, shape: torch.Size) -> Tensor:
    """The first bytes of a mailbox as the floats of a state."""
    return memory[: 4 * _num_floats(shape)].view(torch.float32)


def _as_state(floats: Tensor, shape: torch.Size) -> RunningState:
    """A state whose three tensors lie one behind the other, so that one copy carries it."""
    num_rows = shape[:3].numel()
    acc, maximum, total = floats.split([num_rows * shape[3], num_rows, num_rows])
    return RunningState(acc.view(shape), maximum.view(shape[:3]), total.view(shape[:3]))
