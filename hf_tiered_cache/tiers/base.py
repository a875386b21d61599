"""The contract of a tier: `Tier`, the `Transfer` of its reads and writes, its `Budget`.

    allocate  a slot, or None when the budget has no room
    write     store blocks into slots; returns a Transfer
    read      load blocks from slots; returns a Transfer
    load      the same into slots of a tier in memory
    advance   take the next steps of transfers that go in several
    free      give a slot back
    drain     wait until no transfer is under way
    keep_only give back every slot but these
    close     give everything back

Subclassing with a name, `class XTier(Tier, name="x")`, registers a tier, and the contract tests run
over every registered one. Which tiers a cache has is decided in `manager_pool`.
"""

import _thread
import contextlib
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import ClassVar, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch

from hf_tiered_cache.errors import ClosedCacheError, ConfigError, TierIOError, UnsupportedInputError
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.registry import Registered
from hf_tiered_cache.tiers.pinning import Pinning

# Who waits looks again so often: an interrupt may have come between the end and the waking.
WAKE_SECONDS = 0.1
# An interrupt of a finalizer comes again so much later: Python must be out of it by then.
AGAIN_SECONDS = 0.02


class Budget:
    """A hard cap in bytes for one tier, shared by every slab and file of that tier. Thread-safe.

    Each of its holders says how much it holds in all, so that an interrupted one can say it again;
    what a dropped one held is free.
    """

    def __init__(
        self, name: str, limit_bytes: int, *, knob: str = "", is_auto: bool = False
    ) -> None:
        """knob: what its user sets it by; `name` and "_bytes" where none is given. is_auto: chosen
        from what was free."""
        self.name = name
        self.knob = knob or f"{name}_bytes"
        self.is_auto = is_auto
        if limit_bytes < 0:
            raise ConfigError(f"{self.knob} is {limit_bytes}; expected 0 or more")
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._held: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        # Reentrant: garbage collection in here may finalize a tier, which holds nothing then.
        self._lock = threading.RLock()

    def hold(self, holder: object, num_bytes: int) -> bool:
        """Let `holder` hold `num_bytes` in all; False, and nothing changed, when it asks for more
        than it has and the limit would be exceeded."""
        with self._lock:
            had = self._held.get(holder, 0)
            used = self.used_bytes - had + num_bytes
            if num_bytes > had and used > self.limit_bytes:
                return False
            self._held[holder] = num_bytes
            self.peak_bytes = max(self.peak_bytes, used)
            return True

    @property
    def used_bytes(self) -> int:
        """Bytes that all holders hold."""
        with self._lock:
            return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that could still be held."""
        return self.limit_bytes - self.used_bytes

    def __repr__(self) -> str:
        return f"Budget({self.name!r}, used {self.used_bytes} of {self.limit_bytes} bytes)"


class Transfer:
    """A read or write that was started. It consists of one or more parts.

        pending --last part ended, none failed--> done     wait() returns at once
        pending --last part ended, some failed--> failed   wait() raises TierIOError, every time

    `is_ready()` is False only while pending. Ready means that no thread touches the memory of the
    transfer any more, whether it is done or failed. Waiting on a ready transfer takes no lock.

    A device that is not the CPU works behind it: `hold_device()` makes the device wait, and the CPU
    goes on where it can.
    """

    __slots__ = (
        *("__weakref__", "_ended", "_error", "_is_ready", "_num_parts", "_pid", "_wake"),
        *("began_at", "ended_at"),
    )

    def __init__(self, num_parts: int = 1) -> None:
        self._num_parts = num_parts
        # What came of each part that ended. All else follows from it: an interrupt between two
        # lines of whoever ends a part leaves nothing that is not made good by the next look.
        self._ended: dict[object, _Ended] = {}
        self._is_ready = num_parts == 0
        self._error: TierIOError | None = None
        self.began_at: float | None = None
        """When its first bytes moved, seconds of `perf_counter`, once it is ready; None where
        nobody knows."""
        self.ended_at: float | None = None
        """When its last bytes moved, likewise."""
        self._pid = os.getpid()
        self._wake: SimpleQueue[None] = SimpleQueue()

    def is_ready(self) -> bool:
        """Whether it is done or failed, without waiting."""
        return self._is_ready or self._look()

    @property
    def has_failed(self) -> bool:
        """Whether it has failed, as far as is known by now."""
        return self._error is not None

    def wait(self) -> None:
        """Return when done. Raises TierIOError when it failed, each time it is called."""
        while not (self._is_ready or self._look()):
            self.check_process()
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=WAKE_SECONDS)
                self._wake.put(None)  # for the next one who waits
        if self._error is not None:
            # A fresh exception: one raised twice would grow its traceback and be shared by threads.
            message = self._error.strerror or str(self._error)
            raise io_error(self._error.errno, message) from self._error.__cause__

    def outlast(self) -> None:
        """Return when it has ended, done or failed."""
        with contextlib.suppress(TierIOError):
            self.wait()

    def hold_device(self) -> None:
        """Make the work that the device is given from now on wait for this transfer. Raises as
        `wait` does, if the transfer is known to have failed by then. Here, and wherever the device
        is the CPU, the same as `wait`."""
        self.wait()

    def check_process(self) -> None:
        """Raise ClosedCacheError in a forked child, where nobody would end this transfer."""
        if os.getpid() != self._pid:
            raise ClosedCacheError(
                f"this transfer belongs to process {self._pid}, and its threads stayed there;"
                " make a new cache after fork()"
            )

    def end_part(
        self,
        error: TierIOError | None = None,
        *,
        part: object = None,
        began: float | None = None,
        ended: float | None = None,
    ) -> None:
        """One part ended, failed if `error` is given. For tiers.

        part: which one, where there are several; one that has ended stays as it ended. Of several
        errors that of the first part to end wins. began, ended: when its bytes moved, if it is
        known (in seconds of `perf_counter`).
        """
        self._ended.setdefault(part, _Ended(error, began, ended or perf_counter()))
        if self._look():
            self._wake.put(None)

    def _look(self) -> bool:
        """Whether all parts have ended; if so, what came of them is noted."""
        if len(self._ended) < self._num_parts:
            return False
        parts = list(self._ended.values())
        self._error = next((part.error for part in parts if part.error), None)
        self.began_at = min((part.began for part in parts if part.began is not None), default=None)
        self.ended_at = max((part.ended for part in parts), default=None)
        self._is_ready = True
        return True

    def __repr__(self) -> str:
        state = "pending" if not self._is_ready else "failed" if self._error else "done"
        return f"Transfer({state})"


class _Ended(NamedTuple):
    """What came of a part of a transfer."""

    error: TierIOError | None
    began: float | None
    ended: float


DONE = Transfer(num_parts=0)
"""A finished transfer, shared by everything that has nothing to wait for."""


@dataclass(frozen=True)
class Surroundings:
    """What a tier of a cache may want to know of where it is made."""

    directory: Path
    """For its files; there, and writable, if there is a disk tier."""

    disk_io: str
    """How files are read and written: one of `config.DISK_IO_MODES`."""

    page_cache_bytes: int
    """What its files may take of the page cache."""

    pinning: Pinning | None
    """What locks memory for the device's copies; None where the device is the CPU."""

    cpus_near: frozenset[int]
    """The processors whose memory the device reaches fastest; any, where there are none."""


class Tier(Registered, ABC, kind="tier"):
    """Slots of `block_bytes` each, within a budget. See the module for the verbs.

    One thread at a time may call a tier; its own threads may work behind it. After `close()` every
    verb but `close` raises ClosedCacheError.
    """

    has_addresses: ClassVar[bool] = False
    """Whether its blocks lie in `slab`, where kernels attend them and lower tiers store them from.
    Of the tiers of a cache only the last may be without."""

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        """Raises ConfigError when `block_bytes` is no multiple of 4096."""
        check_block_bytes(block_bytes)
        self.block_bytes = block_bytes
        self.budget = budget

    @classmethod
    def from_budget(cls, block_bytes: int, budget: Budget, around: Surroundings) -> Self | None:  # noqa: ARG003
        """A tier for a cache; None where there is no use for one. Raises ConfigError when it cannot
        be made."""
        return cls(block_bytes, budget)

    @abstractmethod
    def allocate(self) -> int | None:
        """A slot, lowest first; None, and nothing changed, when the budget has no room.

        The content of the slot is undefined until it is written.
        """

    @abstractmethod
    def free(self, slot: int) -> None:
        """Give `slot` back; legal while its own transfers are under way, they end undisturbed.

        Raises BlockStateError when the slot is not allocated (unknown, or freed before).
        """

    @abstractmethod
    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """Load the block of each slot into `out`; one transfer for the batch.

        out: per slot one contiguous uint8 `[block_bytes]`, undefined until the transfer is ready
        (and after it failed). A read sees the last write begun before it, finished or not.
        Raises BlockStateError for a slot that is not allocated or was never written, and
        UnsupportedInputError for a tensor that does not fit, both before anything is read.
        """

    def load(self, slots: Sequence[int], memory: "Tier", targets: Sequence[int]) -> Transfer:
        """`read` into the slots `targets` of a tier that has addresses."""
        return self.read(slots, [memory.block(slot) for slot in targets])

    def advance(self) -> None:
        """Begin the next steps, as far as it is time for them, of transfers that go in several;
        without this they begin when the transfer is next asked or waited for."""

    @abstractmethod
    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        """Store `data` into the slots; one transfer for the batch.

        data: per slot one contiguous uint8 `[block_bytes]`, not to be changed until the transfer is
        ready. Raises BlockStateError for a slot that is not allocated, comes twice, or has a
        transfer under way, and UnsupportedInputError for a tensor that does not fit, both before
        anything is written.
        """

    @abstractmethod
    def drain(self) -> None:
        """Return when none of this tier's transfers is under way any more, done or failed.

        One that an interrupted `read` or `write` left behind ends as well. TierIOError is never
        raised.
        """

    @abstractmethod
    def keep_only(self, slots: Iterable[int]) -> None:
        """Give back every slot that was handed out and is not in `slots`; after `drain`.

        This mends a tier whose caller was interrupted: slots that `allocate` handed out and nobody
        noted are free again. A slot in `slots` that was freed (`free` was interrupted after it had
        done its work) is handed out again, to the one who names it: in memory its bytes are as they
        were, on disk reading it is a TierIOError until it is written. May be repeated, after an
        interrupt as well. Raises BlockStateError, before anything changes, for a slot that was
        never the tier's.
        """

    @abstractmethod
    def check_allocated(self, slots: Sequence[int]) -> None:
        """Raise BlockStateError unless every slot is allocated."""

    @property
    def slab(self) -> torch.Tensor:
        """uint8 `[max_slots, block_bytes]`, a block a row, of a tier that `has_addresses`."""
        raise NotImplementedError(f"the blocks of the {self.name} tier have no addresses")

    def block(self, slot: int) -> torch.Tensor:
        """A view of the block in `slot`, uint8 `[block_bytes]`, likewise."""
        return self.slab[slot]

    def is_pinned(self, slot: int) -> bool:
        """Whether a device can copy the block in `slot` as it lies, while the CPU goes on."""
        return False

    def keep(self, slots: Sequence[int], reader: Transfer) -> None:
        """Let nobody overwrite the slots before `reader`, which reads them, has ended."""
        reader.outlast()

    @property
    def where(self) -> str:
        """Its kind of memory, or its folder, for people."""
        return ""

    @property
    @abstractmethod
    def used_slots(self) -> int:
        """Slots handed out and not freed."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots handed out and not freed."""
        return self.used_slots * self.block_bytes

    @property
    @abstractmethod
    def committed_bytes(self) -> int:
        """Bytes this tier holds of its budget: freed slots stay committed and are reused first."""

    @abstractmethod
    def num_free(self) -> int:
        """Slots that could still be allocated, committed or within the budget."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory, files, threads and budget. Idempotent."""


def do_all(*steps: Callable[[], None]) -> None:
    """Do every step, each of which may be repeated. If one raises, as an interrupt does, all are
    done once more before it is passed on: whoever finalizes is not called again."""
    try:
        for step in steps:
            step()
    except BaseException:
        for step in steps:
            step()
        raise


def in_finalizer(close: Callable[..., None], *arguments: object) -> None:
    """Close something from a finalizer, where Python swallows whatever is raised: Ctrl-C in there
    comes again a moment later, in the main thread."""
    try:
        close(*arguments)
    except KeyboardInterrupt:
        with contextlib.suppress(RuntimeError):  # no thread at interpreter exit: it ends anyway
            threading.Timer(AGAIN_SECONDS, _thread.interrupt_main).start()


def io_error(code: int | None, message: str) -> TierIOError:
    """A TierIOError with its `errno` set; printed as `[Errno 5] message`.

    Both are set by hand, because RuntimeError comes before OSError among the bases of TierIOError
    and does not know them.
    """
    error = TierIOError(message)
    error.errno = code
    error.strerror = message
    return error


def check_block_bytes(block_bytes: int) -> None:
    """Raise ConfigError unless `block_bytes` is a positive multiple of 4096."""
    if block_bytes <= 0 or block_bytes % ALIGNMENT_BYTES:
        raise ConfigError(
            f"block_bytes is {block_bytes}; expected a positive multiple of {ALIGNMENT_BYTES}"
        )


def check_blocks(slots: Sequence[int], blocks: Sequence[torch.Tensor], block_bytes: int) -> None:
    """Raise UnsupportedInputError, with every reason, unless all are uint8 `[block_bytes]`."""
    if len(slots) != len(blocks):
        raise UnsupportedInputError(f"got {len(slots)} slots but {len(blocks)} tensors")
    reasons = [
        f"slot {slot}: expected a contiguous uint8 tensor [{block_bytes}], got"
        f" {str(block.dtype).removeprefix('torch.')} {list(block.shape)}"
        f"{'' if block.is_contiguous() else ', not contiguous'}"
        for slot, block in zip(slots, blocks, strict=True)
        if block.dtype is not torch.uint8
        or block.dim() != 1
        or block.numel() != block_bytes
        or not block.is_contiguous()
    ]
    if reasons:
        raise UnsupportedInputError("; ".join(reasons))
