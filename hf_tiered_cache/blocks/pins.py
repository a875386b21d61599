"""What must stay where it is while it is read without the lock: `Pins`.

A reading holds the lock of its manager only while it looks at the books. In between, kernels run
and disks are waited for, and other threads may move whatever is not pinned. One who needs what is
pinned waits for the readers, who never wait for him while they hold something.
"""

import threading
import weakref
from collections.abc import Callable, Sequence

from hf_tiered_cache.blocks.block_manager import BlockTable, Changing, KVBlock

# Who waits looks again so often: a reader that was interrupted wakes nobody.
WAKE_SECONDS = 0.1


class Pin:
    """What one reading needs: its table as it is, the blocks of the layer on the rungs where they
    are, and its staged blocks in their slots. It lasts as long as somebody refers to it and its
    thread lives, so that no interrupt leaves one behind."""

    __slots__ = ("__weakref__", "staged", "table", "thread")

    def __init__(self, table: BlockTable) -> None:
        self.table = table
        self.staged: Sequence[KVBlock] = ()
        self.thread = threading.current_thread()

    @property
    def is_anothers(self) -> bool:
        """Whether a thread other than this one, which lives, has it."""
        return self.thread is not threading.current_thread() and self.thread.is_alive()


class Pins:
    """The pins of all who are reading. Every method is for whoever holds `lock`."""

    def __init__(self, lock: "threading.RLock") -> None:
        self._pins: weakref.WeakSet[Pin] = weakref.WeakSet()
        self._changed = threading.Condition(lock)
        self._num_waiting = 0
        self._num_draining = 0

    def wait_for_turn(self) -> None:
        """Let whoever waits until nothing is pinned go first; for whoever is about to `add`."""
        while self._num_draining and not any(not pin.is_anothers for pin in self._pins):
            self._sleep()

    def add(self, table: BlockTable) -> Pin:
        """Pin a table."""
        pin = Pin(table)
        self._pins.add(pin)
        return pin

    def remove(self, pin: Pin) -> None:
        """Give up a pin."""
        self._pins.discard(pin)
        self.wake()

    def wake(self) -> None:
        """Let those who wait look again: less is pinned than before."""
        if self._num_waiting:
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def layers(self) -> set[int]:
        """The layers that are read."""
        return {pin.table.layer for pin in self._pins}

    def holds(self, table: BlockTable) -> bool:
        """Whether anybody reads the table."""
        return any(pin.table is table and pin.thread.is_alive() for pin in self._pins)

    def staged(self) -> set[KVBlock]:
        """The staged blocks that are attended just now."""
        return {block for pin in self._pins for block in pin.staged}

    def wait(self, matters: Callable[[Pin], object] = bool) -> bool:
        """Let go of the lock until less is pinned, or for a moment; False, without a wait, where no
        other thread has a pin that matters."""
        if not any(pin.is_anothers and matters(pin) for pin in self._pins):
            return False
        self._sleep()
        return True

    def _sleep(self) -> None:
        self._num_waiting += 1
        try:
            self._changed.wait(WAKE_SECONDS)
        finally:
            self._num_waiting -= 1

    def wait_within(self, changing: Changing) -> bool:
        """`wait`, in the midst of a change that is at a point where the books are in order.

        Raises TornBooksError when another thread was interrupted meanwhile: nothing of what was
        left to be changed was.
        """
        with changing.paused():
            return self.wait()

    def drain_within(self, changing: Changing) -> bool:
        """Wait, likewise, until no other thread reads; none begins to meanwhile. False where none
        did."""
        has_waited = False
        self._num_draining += 1
        try:
            while self.wait_within(changing):
                has_waited = True
        finally:
            self._num_draining -= 1
            self.wake()
        return has_waited
