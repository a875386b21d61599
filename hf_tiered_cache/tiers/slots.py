"""Which slots are taken: lowest first, within a budget. Knows no bytes but their number."""

import contextlib
import heapq
import threading
from collections.abc import Callable, Iterable, Set

from hf_tiered_cache.errors import BlockStateError, TierIOError
from hf_tiered_cache.tiers.base import Budget


def committed_slots(num_used: int, step_slots: int, max_slots: int, grows_ahead: bool) -> int:
    """How many slots a pool that is alone on its budget has committed when it first has `num_used`
    (at most `max_slots`) handed out. grows_ahead: it was told to after each of them."""
    if num_used == 0:
        return 0
    spare = step_slots // 2 if grows_ahead else 0
    whole_steps = max_slots // step_slots * step_slots
    if num_used > whole_steps:
        return max_slots
    return min(whole_steps, -(-(num_used + spare) // step_slots) * step_slots)


class SlotPool:
    """Hands out slots `[0, committed)` lowest first, and commits more of them as the budget allows.

    A slot is committed once, on its first use: its bytes are held of the budget, then
    `commit(start, stop)` may get the room for them. Freed slots stay committed, unless the pool is
    told to `shrink`. Thread-safe.

    What is handed out is in `_used`, what is committed in `_num_committed`, and each of the two
    changes in one step: wherever a caller is interrupted, nothing else has to agree with them.
    """

    def __init__(
        self,
        block_bytes: int,
        budget: Budget,
        tier_name: str,
        *,
        step_slots: int = 1,
        max_slots: int | None = None,
        commit: Callable[[int, int], None] | None = None,
    ) -> None:
        """step_slots: how many slots to commit at a time, fewer where the budget ends.

        commit: gets the room of the slots `[start, stop)`, or raises TierIOError and changes
        nothing.
        """
        self._block_bytes = block_bytes
        self._budget = budget
        self._tier_name = tier_name
        self._step_slots = step_slots
        self._max_slots = budget.limit_bytes // block_bytes if max_slots is None else max_slots
        self._commit = commit
        self._num_committed = 0
        self._used: set[int] = set()
        # A heap of every slot that is committed and not used; others in it are passed over.
        self._free: list[int] = []
        # Reentrant: garbage collection in here may finalize the tier and close this pool.
        self._lock = threading.RLock()

    @property
    def used(self) -> Set[int]:
        """The slots handed out."""
        return self._used

    @property
    def num_used(self) -> int:
        """Slots handed out."""
        return len(self._used)

    @property
    def committed_bytes(self) -> int:
        """Bytes held of the budget."""
        return self._num_committed * self._block_bytes

    def num_free(self) -> int:
        """Slots that could still be handed out."""
        with self._lock:
            room = min(
                self._max_slots - self._num_committed, self._budget.free_bytes // self._block_bytes
            )
            return self._num_ready() + room

    def allocate(self) -> int | None:
        """The lowest free slot; None when the budget is spent. What `commit` raises is raised."""
        with self._lock:
            if not self._num_ready() and not self._grow():
                return None
            while not self._is_free(self._free[0]):
                heapq.heappop(self._free)
            slot = self._free[0]
            self._used.add(slot)
            heapq.heappop(self._free)
            return slot

    def grow_ahead(self) -> None:
        """Commit a whole step more, where the budget has it, once less than half of one is left.
        What cannot be had is not needed yet: whoever needs it is told."""
        with self._lock, contextlib.suppress(TierIOError):
            if self._num_ready() < self._step_slots // 2:
                self._commit_slots(self._step_slots)

    def free(self, slot: int) -> None:
        """Take `slot` back. Raises BlockStateError when it was not handed out."""
        with self._lock:
            self.check([slot])
            heapq.heappush(self._free, slot)
            self._used.remove(slot)

    def keep_only(self, slots: Iterable[int]) -> list[int]:
        """Let exactly `slots` be handed out; those that were and are no more are returned.

        Raises BlockStateError, and changes nothing, for a slot that was never committed.
        """
        with self._lock:
            kept = set(slots)
            for slot in kept:
                if slot not in range(self._num_committed):
                    self.check([slot])
            surplus = sorted(self._used - kept)
            self._free = list(range(self._num_committed))
            self._used = kept
            self._budget.hold(self, self.committed_bytes)
            return surplus

    def shrink(self, num_slots: int) -> None:
        """Commit only the first `num_slots`, and hold no more of the budget. Raises
        BlockStateError, and changes nothing, where one behind them is handed out."""
        with self._lock:
            if any(slot >= num_slots for slot in self._used):
                raise BlockStateError(
                    f"tier {self._tier_name!r} cannot shrink to {num_slots} slots: one behind them"
                    " is handed out; a bug of this package, please report it"
                )
            self._num_committed = min(num_slots, self._num_committed)
            self._free = list(range(self._num_committed))
            self._budget.hold(self, self.committed_bytes)

    def check(self, slots: Iterable[int]) -> None:
        """Raise BlockStateError unless every slot is handed out."""
        slots = list(slots)
        if self._used.issuperset(slots):
            return
        for slot in slots:
            if slot not in self._used:
                known = "was freed" if self._is_free(slot) else "was never allocated"
                raise BlockStateError(
                    f"tier {self._tier_name!r}: slot {slot} {known}; a bug of this package, please"
                    " report it"
                )

    def close(self) -> None:
        """Hold nothing of the budget any more, and hand out nothing. Idempotent."""
        with self._lock:
            self._num_committed = self._max_slots = 0
            self._used.clear()
            self._budget.hold(self, 0)

    def _grow(self) -> bool:
        """Commit a step of slots, or one where a step does not fit; whether any was committed."""
        step = min(self._step_slots, self._max_slots - self._num_committed)
        try:
            if self._commit_slots(step):
                return True
        except TierIOError:
            if step == 1:
                raise  # less room than a step may still be room for one
        return step > 1 and self._commit_slots(1)

    def _commit_slots(self, num_slots: int) -> bool:
        """Commit so many slots; False, and nothing changed, where they do not fit."""
        start, stop = self._num_committed, self._num_committed + num_slots
        if num_slots == 0 or stop > self._max_slots:
            return False
        try:
            if not self._budget.hold(self, stop * self._block_bytes):
                return False
            if self._commit is not None:
                self._commit(start, stop)
            self._free = sorted([*self._free, *range(start, stop)])
            self._num_committed = stop
        except BaseException:
            self._budget.hold(self, self.committed_bytes)
            raise
        return True

    def _num_ready(self) -> int:
        """Committed slots that are not handed out."""
        return self._num_committed - len(self._used)

    def _is_free(self, slot: int) -> bool:
        return slot in range(self._num_committed) and slot not in self._used
