"""The only place that touches the operating system for blocks on disk.

`BlockFile` is one unnamed file: it has no path, so a killed process leaves nothing behind. Its
calls are single system calls that may come up short or raise OSError; `full_transfer` makes them
whole. Tests put faults between the two.
"""

import contextlib
import errno
import logging
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from functools import cache

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.layout import ALIGNMENT_BYTES

logger = logging.getLogger(__name__)

FILE_MODE = 0o600
# What a file system answers that has no unnamed files, or no direct I/O.
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS}


class BlockFile:
    """An unnamed read-write file of mode 0600 with a buffered and a direct entrance.

    `has_direct`: whether `direct=True` may be asked for. Direct I/O needs offsets, lengths and
    memory in multiples of 4096. Calls may come from any thread; `close()` waits for none of them:
    the file goes when the last call under way returns, and later calls raise EBADF.
    """

    def __init__(self, directory: str, *, want_direct: bool) -> None:
        """Raises ConfigError when no file can be made in `directory`."""
        self.directory = directory
        self._users = 1  # this object, until close(); and every call under way
        self._lock = threading.Lock()
        self._is_closed = False
        self._direct_fd: int | None = None
        descriptors: list[int] = []
        # Closes them in every case, also when this constructor or the owner's fails half-way.
        self._close_descriptors = weakref.finalize(self, _close_all, descriptors)
        try:
            self._fd = _open_unnamed(directory)
            descriptors.append(self._fd)
            os.fchmod(self._fd, FILE_MODE)
        except OSError as error:
            raise ConfigError(
                f"cannot make a file in {directory!r}: {error.strerror}; choose another folder with"
                " disk_dir (or HF_TIERED_CACHE_DIR)"
            ) from error
        if want_direct:
            self._direct_fd = _open_direct(self._fd)
            if self._direct_fd is None:
                _say_no_direct(directory)
            else:
                descriptors.append(self._direct_fd)

    @property
    def has_direct(self) -> bool:
        """Whether the file system takes direct I/O."""
        return self._direct_fd is not None

    def descriptor(self, *, direct: bool) -> int:
        """The descriptor of an entrance, for calls that end before `close()`."""
        fd = self._direct_fd if direct else self._fd
        assert fd is not None, "direct I/O asked for where there is none"
        return fd

    def pread_into(self, buffers: list[memoryview], offset: int, *, direct: bool) -> int:
        """Fill `buffers`, one after the other, from `offset`; the bytes read, maybe fewer."""
        return self._call(os.preadv, buffers, offset, direct)

    def pwrite_from(self, buffers: list[memoryview], offset: int, *, direct: bool) -> int:
        """Store `buffers`, one after the other, at `offset`; the bytes written, maybe fewer."""
        return self._call(os.pwritev, buffers, offset, direct)

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Get disk space for `[offset, offset + num_bytes)`, if the file system can promise it."""
        if not hasattr(os, "posix_fallocate"):
            return
        self._enter()
        try:
            os.posix_fallocate(self._fd, offset, num_bytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        finally:
            self._leave()

    def close(self) -> None:
        """Give the file and its space back once no call is under way. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._leave()

    def close_after_fork(self) -> None:
        """Close the child's copies of the descriptors. The lock may have been held by a thread of
        the parent, so it is not asked."""
        self._is_closed = True
        self._close_descriptors()

    def _call(
        self,
        system_call: Callable[[int, list[memoryview], int], int],
        buffers: list[memoryview],
        offset: int,
        direct: bool,
    ) -> int:
        fd = self.descriptor(direct=direct)
        self._enter()
        try:
            return system_call(fd, buffers, offset)
        finally:
            self._leave()

    def _enter(self) -> None:
        """Keep the descriptors open: a closed number could name another file a moment later."""
        with self._lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "the file of the tier is closed")
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._close_descriptors()


def full_transfer(
    call: Callable[..., int], buffers: list[memoryview], offset: int, *, direct: bool
) -> None:
    """Repeat `call` until all of `buffers` went through. Raises OSError, also when it stands still.

    An interrupted call is repeated; a short one is continued where it stopped, under direct I/O
    from the last multiple of 4096 before that.
    """
    while buffers:
        try:
            num_bytes = call(buffers, offset, direct=direct)
        except InterruptedError:
            continue
        if direct:
            num_bytes -= num_bytes % ALIGNMENT_BYTES
        if num_bytes <= 0:
            raise stood_still(offset, sum(len(buffer) for buffer in buffers))
        offset += num_bytes
        buffers = _without_first(buffers, num_bytes)


def stood_still(offset: int, num_missing: int) -> OSError:
    """What is wrong when a call moves nothing, as at the end of a file."""
    return OSError(errno.EIO, f"nothing more went through at byte {offset}, {num_missing} missing")


def _without_first(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """The views of `buffers` behind their first `num_bytes`."""
    for index, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= len(buffer)
    return []


def _open_unnamed(directory: str) -> int:
    """A descriptor of a new file without a name."""
    flags = getattr(os, "O_TMPFILE", None)
    fd = -1
    if flags is not None:
        try:
            fd = os.open(directory, flags | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            if error.errno not in _UNSUPPORTED or not os.path.isdir(directory):
                raise
    if fd < 0:  # a name for the moment between these two lines
        fd, path = tempfile.mkstemp(prefix=".hf_tiered_cache.", dir=directory)
        os.unlink(path)
    return fd


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _open_direct(fd: int) -> int | None:
    """A second descriptor of the file of `fd` for direct I/O, None where that does not work.

    Some file systems take the flag and refuse the I/O, so one page is written and read.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    direct_fd = None
    try:
        direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | flag)
        with mmap.mmap(-1, ALIGNMENT_BYTES) as page:
            # At the second page: a file system with larger sectors refuses that offset.
            done = os.pwritev(direct_fd, [page], ALIGNMENT_BYTES) == ALIGNMENT_BYTES
            done = done and os.preadv(direct_fd, [page], ALIGNMENT_BYTES) == ALIGNMENT_BYTES
        os.ftruncate(fd, 0)
        if done:
            return direct_fd
    except OSError:
        pass
    if direct_fd is not None:
        with contextlib.suppress(OSError):
            os.close(direct_fd)
    return None


@cache
def _say_no_direct(directory: str) -> None:
    """Say it once per folder."""
    logger.warning(
        "the file system of %r takes no direct I/O, so blocks on disk go through the page cache:"
        " slower than the disk when they outgrow memory. Choose a folder on ext4, xfs or btrfs with"
        " disk_dir.",
        directory,
    )
