"""A tier whose transfers come late, out of order, and now and then not at all; in virtual time.

Nothing moves by itself: asking whether a transfer is ready lets the link go on a little, waiting
lets it go on until that transfer ended. Which one goes first is drawn from a seed, so that a run
can be repeated.
"""

import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hf_tiered_cache.errors import io_error
from hf_tiered_cache.tiers import Budget, HostTier
from hf_tiered_cache.tiers.base import check_blocks
from hf_tiered_cache.transfers import DONE, Transfer

POISON = 0xFF


@dataclass(eq=False)
class Move:
    """What a transfer will do, and to which slots of which tier."""

    tier: "LateTier"
    slots: set[int]
    is_write: bool
    perform: Callable[[], None]
    transfer: "LateTransfer | None"  # None: the poisoning of a freed slot, which cannot fail


class Link:
    """Moves that were started and did not end. Those of the same slot of a tier keep their order,
    as the contract of a tier wants it; all others may overtake one another."""

    def __init__(self, seed: int = 0, speed: float = 0.3, failure_share: float = 0.0) -> None:
        """speed: the chance that one transfer ends when somebody looks. failure_share: of all."""
        self.random = random.Random(seed)
        self.speed = speed
        self.failure_share = failure_share
        self.pending: list[Move] = []
        self.num_overtakings = self.num_failures = 0

    def tick(self) -> None:
        """Somebody looked."""
        if self.pending and self.random.random() < self.speed:
            self.end_one()

    def end_one(self) -> None:
        """End one move, whichever."""
        free = [
            move
            for i, move in enumerate(self.pending)
            if not any(
                other.tier is move.tier and not other.slots.isdisjoint(move.slots)
                for other in self.pending[:i]
            )
        ]
        move = self.random.choice(free)
        self.num_overtakings += move is not self.pending[0]
        self.pending.remove(move)
        if move.transfer is None:
            move.perform()
        elif self.random.random() < self.failure_share:
            self.num_failures += 1
            move.transfer.end_part(io_error(errno.EIO, "the link broke"))
        else:
            move.perform()
            move.transfer.end_part()


class LateTransfer(Transfer):
    """Goes on when it is looked at."""

    __slots__ = ("_link",)

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def is_ready(self) -> bool:
        if not self._is_ready:
            self._link.tick()
        return self._is_ready

    def wait(self) -> None:
        while not self._is_ready:
            self._link.end_one()
        super().wait()


class LateTier(HostTier):
    """Memory behind a `Link`. Bytes are taken and given when the transfer ends, not before; until
    then what it fills reads as NaN, and so does a freed slot.

    is_strict: a load of what is still being stored is an error of the caller, which the contract of
    a tier would allow.
    """

    def __init__(
        self, block_bytes: int, budget: Budget, link: Link, is_strict: bool = True
    ) -> None:
        super().__init__(block_bytes, budget)
        self.link = link
        self.is_strict = is_strict
        self.num_reads = self.num_writes = 0

    def free(self, slot: int) -> None:
        super().free(slot)
        slab = self.slab
        self._start({slot}, True, lambda: slab[slot].fill_(POISON), None)

    def read(self, slots: Sequence[int], out: Sequence[torch.Tensor]) -> Transfer:
        self._check(slots, out)
        for move in self.link.pending if self.is_strict else []:
            if move.tier is self and move.is_write and move.transfer is not None:
                assert move.slots.isdisjoint(slots), "loaded before it was stored"
        for block in out:
            block.fill_(POISON)
        self.num_reads += len(slots)

        def perform() -> None:
            for slot, block in zip(slots, out, strict=True):
                block.copy_(self.slab[slot])

        return self._start(set(slots), False, perform, LateTransfer(self.link))

    def write(self, slots: Sequence[int], data: Sequence[torch.Tensor]) -> Transfer:
        self._check(slots, data)
        self.num_writes += len(slots)
        promised = [block.clone() for block in data]

        def perform() -> None:
            for slot, block, before in zip(slots, data, promised, strict=True):
                assert torch.equal(block, before), "changed while it was being stored"
                self.slab[slot].copy_(block)

        return self._start(set(slots), True, perform, LateTransfer(self.link))

    def drain(self) -> None:
        while any(move.tier is self for move in self.link.pending):
            self.link.end_one()
        super().drain()

    def close(self) -> None:
        ours = [move for move in self.link.pending if move.tier is self]
        self.link.pending = [move for move in self.link.pending if move.tier is not self]
        for move in ours:
            if move.transfer is not None:
                move.transfer.end_part(io_error(errno.ECANCELED, "the tier was closed"))
        super().close()

    def _check(self, slots, blocks) -> None:
        self._check_open()
        check_blocks(slots, blocks, self.block_bytes)
        self._pool.check(slots)

    def _start(self, slots, is_write, perform, transfer) -> Transfer:
        if not slots:
            return DONE
        self.link.pending.append(Move(self, slots, is_write, perform, transfer))
        return transfer
