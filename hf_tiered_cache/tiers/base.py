"""The contract of a tier: `Tier`, its `Budget`, its `Surroundings`.

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
over every registered one. Which tiers a cache has is decided in `blocks.assembly`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch

from hf_tiered_cache.devices.pinning import Pinning
from hf_tiered_cache.errors import ConfigError, UnsupportedInputError
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.registry import Registered
from hf_tiered_cache.tiers.codecs.base import Codec
from hf_tiered_cache.transfers import Transfer


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

    codec: Codec | None = None
    """What blocks may be encoded with in the tier; None: they are kept as they are."""


class Tier(Registered, ABC, kind="tier"):
    """Slots of `block_bytes` each, within a budget. See the module for the verbs.

    One thread at a time may call a tier; its own threads may work behind it. After `close()` every
    verb but `close` raises ClosedCacheError.
    """

    has_addresses: ClassVar[bool] = False
    """Whether its blocks lie in `slab`, where kernels attend them and lower tiers store them from.
    Of the tiers of a cache only the last may be without."""

    is_read_only: ClassVar[bool] = False
    """Whether its blocks come from elsewhere: nothing is demoted to it. Such a tier is the last."""

    codec: Codec | None = None
    """What the tier encodes blocks with; `read` and `write` take them as they are all the same."""

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        """Raises ConfigError when `block_bytes` is no multiple of 4096."""
        check_block_bytes(block_bytes)
        self.block_bytes = block_bytes
        self.budget = budget

    @classmethod
    def from_budget(  # noqa: ARG003
        cls, block_bytes: int, budget: Budget, around: Surroundings
    ) -> "Tier | None":
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

    def is_encoded(self, slot: int) -> bool:
        """Whether the block in `slot`, whose write has ended, can be read as it was encoded."""
        return False

    def read_encoded(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        """`read` without decoding, of slots that `is_encoded` is true of; out: uint8
        `[record_bytes]` each."""
        raise NotImplementedError(f"the {self.name} tier encodes nothing")

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

    def hold_slots(self, slots: Sequence[int], until: Transfer) -> None:
        """Let nobody overwrite the slots before `until`, which reads them, has ended."""
        until.outlast()

    @property
    def where(self) -> str:
        """Its kind of memory, or its folder, for people."""
        return ""

    @property
    @abstractmethod
    def used_slots(self) -> int:
        """Slots handed out and not freed."""

    @property
    def record_bytes(self) -> int:
        """Bytes that a slot takes of the budget."""
        return self.block_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots handed out and not freed."""
        return self.used_slots * self.record_bytes

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
