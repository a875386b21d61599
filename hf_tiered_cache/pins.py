"""What must stay where it is while it is read without the lock: `Pins`.

A reading holds the lock of its manager only while it looks at the books. In between, kernels run
and disks are waited for, and other threads may move whatever is not pinned. One who needs what is
pinned waits for the readers, who never wait for him while they hold something.
"""

import threading
import weakref
from collections.abc import Callable, Sequence

from hf_tiered_cache.block_manager import Changing, KVBlock

# Who waits looks again so often: a reader that was interrupted wakes nobody.
WAKE_SECONDS = 0.1


class Pin:
    """What one reading needs: the blocks of its layer on the rungs where they are, and its staged
    blocks in their slots. It lasts as long as somebody refers to it, so that no interrupt leaves
    one behind."""

    __slots__ = ("__weakref__", "layer", "staged", "thread")

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.staged: Sequence[KVBlock] = ()
        self.thread = threading.get_ident()


class Pins:
    """The pins of all who are reading. Every method is for whoever holds `lock`."""

    def __init__(self, lock: "threading.RLock") -> None:
        self._pins: weakref.WeakSet[Pin] = weakref.WeakSet()
        self._changed = threading.Condition(lock)
        self._num_waiting = 0

    def add(self, layer: int) -> Pin:
        """Pin a layer."""
        pin = Pin(layer)
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
        return {pin.layer for pin in self._pins}

    def staged(self, but: Pin | None = None) -> set[KVBlock]:
        """The staged blocks that are attended just now, by readers other than `but`."""
        return {block for pin in self._pins if pin is not but for block in pin.staged}

    def wait(self, matters: Callable[[Pin], object] = bool) -> bool:
        """Let go of the lock until less is pinned, or for a moment; False, without a wait, where no
        other thread has a pin that matters."""
        me = threading.get_ident()
        if not any(pin.thread != me and matters(pin) for pin in self._pins):
            return False
        self._num_waiting += 1
        try:
            self._changed.wait(WAKE_SECONDS)
        finally:
            self._num_waiting -= 1
        return True

    def wait_within(self, changing: Changing) -> bool:
        """`wait`, in the midst of a change that is at a point where the books are in order.

        Raises TornBooksError when another thread was interrupted meanwhile: nothing of what was
        left to be changed was.
        """
        with changing.paused():
            return self.wait()
