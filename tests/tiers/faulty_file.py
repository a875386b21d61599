"""A block file that fails on demand: the n-th call of a kind gets the fault planned for it."""

import errno
import os
import threading
import time
from collections.abc import Callable

from hf_tiered_cache.tiers.disk.block_file import BlockFile

# A fault gets the real call (which returns a byte count), the buffers, and says how many went.
Fault = Callable[[Callable[[list[memoryview]], int], list[memoryview]], int]


def fails_with(code: int) -> Fault:
    def fault(call, buffers):
        raise OSError(code, os.strerror(code))

    return fault


def interrupted(call, buffers):
    raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))


def nothing(call, buffers):
    """The call returns 0, as at the end of a file."""
    return 0


def short(call, buffers):
    """A part comes through, to the page."""
    first = buffers[0]
    size = len(first) // 2 // 4096 * 4096
    return call([first[:size]]) if size else 0


def short_odd(call, buffers):
    """A part comes through that ends within a page; in memory that part is there."""
    moved = call(buffers)
    return moved - 1234


def slow(call, buffers):
    time.sleep(0.02)
    return call(buffers)


def bit_flip(call, buffers):
    """One bit is wrong on the way."""
    if buffers[0].readonly:
        raise AssertionError("flip bits of what is read")
    moved = call(buffers)
    buffers[-1][-1] ^= 0x10
    return moved


def torn(call, buffers):
    """All is reported as written, the second half of the first buffer is not."""
    half = len(buffers[0]) // 2 // 4096 * 4096
    if half:
        call([buffers[0][:half]])
    return sum(len(buffer) for buffer in buffers)


class FaultyFile(BlockFile):
    """Counts the calls of each kind ("read", "write", "reserve"), and plays the planned faults.

    `plan[kind, n]` is the fault of the n-th call of that kind.
    """

    def __init__(self, directory: str, *, want_direct: bool) -> None:
        super().__init__(directory, want_direct=want_direct)
        self.plan: dict[tuple[str, int], Fault] = {}
        self.num_calls = {"read": 0, "write": 0, "reserve": 0}
        self._count_lock = threading.Lock()

    def _fault(self, kind: str) -> Fault | None:
        with self._count_lock:
            number = self.num_calls[kind]
            self.num_calls[kind] += 1
        return self.plan.get((kind, number))

    def pread_into(self, buffers, offset, *, direct):
        fault = self._fault("read")
        real = super().pread_into
        if fault is None:
            return real(buffers, offset, direct=direct)
        return fault(lambda b: real(b, offset, direct=direct), buffers)

    def pwrite_from(self, buffers, offset, *, direct):
        fault = self._fault("write")
        real = super().pwrite_from
        if fault is None:
            return real(buffers, offset, direct=direct)
        return fault(lambda b: real(b, offset, direct=direct), buffers)

    def reserve(self, offset, num_bytes):
        fault = self._fault("reserve")
        if fault is not None:
            fault(len, [])
        super().reserve(offset, num_bytes)
