"""One at a time in a folder, among threads and processes: `FolderLock`."""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator

from hf_tiered_cache.store.files import FILE_MODE, REFUSALS

NAME = "lock"


class FolderLock:
    """`with lock.held():`, reentrant. `is_read_only`: the folder refuses to be written to; the lock
    is a shared one then. Raises OSError where the folder cannot be locked."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._mutex = threading.RLock()
        self._depth = 0
        self.is_read_only = False
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(
                NAME, flags | os.O_RDWR | os.O_CREAT, FILE_MODE, dir_fd=self._root_fd
            )
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self.is_read_only = True
            # Without a lock there was no writer yet; the folder stands for it.
            name = NAME if os.access(NAME, os.R_OK, dir_fd=self._root_fd) else "."
            self._fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root_fd)

    @property
    def mutex(self) -> threading.RLock:
        """Of the threads of this process alone."""
        if self._pid != os.getpid():
            self._begin_in_child()
        return self._mutex

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While the `with` block runs. Raises OSError, EBADF once it is closed."""
        with self.mutex:
            pid = os.getpid()
            if self._fd < 0:
                raise OSError(errno.EBADF, "the store is closed")
            if not self._depth:
                fcntl.flock(self._fd, fcntl.LOCK_SH if self.is_read_only else fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                if pid == os.getpid():  # else a child that was forked meanwhile: it holds nothing
                    self._depth -= 1
                if pid == os.getpid() and not self._depth:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _begin_in_child(self) -> None:
        """A forked child shares the parent's open file, and so its lock: it needs one of its own.
        A thread that held the mutex stayed with the parent."""
        self._mutex, self._depth = threading.RLock(), 0
        shared, self._fd = self._fd, -1
        if shared >= 0:
            os.close(shared)
            self._open()
        self._pid = os.getpid()

    def close(self) -> None:
        """Give the descriptor back; waits for whoever holds the lock. Idempotent."""
        with self.mutex:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
