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
import secrets
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.layout import ALIGNMENT_BYTES
from hf_tiered_cache.tiers.disk.remedies import remedy

logger = logging.getLogger(__name__)

FILE_MODE = 0o600
# What a file system answers that has no unnamed files, or no direct I/O.
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS}
# What has nothing to do with the file system.
_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Entrance:
    """A descriptor of the file. It is closed when nobody holds it any more: neither the file nor a
    call under way, so that its number does not name another file a moment too early."""

    __slots__ = ("__weakref__", "_fds")

    def __init__(self) -> None:
        self._fds: list[int] = []
        # In one step of C: an interrupt of Python code would be swallowed here, and the rest lost.
        closing = weakref.finalize(self, deque, map(os.close, self._fds), 0)
        closing.atexit = False  # the system does it

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self._fds[0]

    def open(self, path: str, flags: int) -> None:
        """Open a file, once. Raises OSError."""
        self._fds.append(os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, FILE_MODE))

    def close_after_fork(self) -> None:
        """Close the child's copy, whoever held it in the parent."""
        while self._fds:
            os.close(self._fds.pop())


class BlockFile:
    """An unnamed read-write file of mode 0600 with a buffered and a direct entrance.

    `has_direct`: whether `direct=True` may be asked for. Direct I/O needs offsets, lengths and
    memory in multiples of 4096; its descriptor is opened when first asked for. Calls may come from
    any thread; `close()` waits for none of them: the file goes when the last call under way
    returns, and later calls raise EBADF.
    """

    def __init__(self, directory: str, *, want_direct: bool) -> None:
        """Raises ConfigError when no file can be made in `directory`."""
        self.directory = directory
        self._direct: Entrance | None = None
        try:
            self._buffered: Entrance | None = _open_unnamed(directory)
            os.fchmod(self._fd, FILE_MODE)
            self.has_direct = want_direct and _takes_direct(self._fd)
        except OSError as error:
            raise ConfigError(
                f"cannot make a file in {directory!r}: {error.strerror}; {remedy(error.errno)}"
            ) from error
        if want_direct and not self.has_direct:
            _say_no_direct(directory)

    @property
    def _fd(self) -> int:
        return self.entrance(direct=False).fd

    def entrance(self, *, direct: bool) -> Entrance:
        """An entrance, to be held as long as its descriptor is used. Raises OSError when the file
        is closed, or cannot be opened once more."""
        buffered, entrance = self._buffered, self._direct if direct else self._buffered
        if buffered is None:
            raise OSError(errno.EBADF, "the file of the tier is closed")
        if entrance is None:
            assert self.has_direct, "direct I/O asked for where there is none"
            entrance = self._direct = _open_direct(buffered.fd)
        return entrance

    def pread_into(self, buffers: list[memoryview], offset: int, *, direct: bool) -> int:
        """Fill `buffers`, one after the other, from `offset`; the bytes read, maybe fewer."""
        entrance = self.entrance(direct=direct)
        return os.preadv(entrance.fd, buffers, offset)

    def pwrite_from(self, buffers: list[memoryview], offset: int, *, direct: bool) -> int:
        """Store `buffers`, one after the other, at `offset`; the bytes written, maybe fewer."""
        entrance = self.entrance(direct=direct)
        return os.pwritev(entrance.fd, buffers, offset)

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Get disk space for `[offset, offset + num_bytes)`, if the file system can promise it."""
        if not hasattr(os, "posix_fallocate"):
            return
        entrance = self.entrance(direct=False)
        try:
            os.posix_fallocate(entrance.fd, offset, num_bytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def close(self) -> None:
        """Give the file and its space back once no call is under way. Idempotent."""
        self._buffered = self._direct = None

    def close_after_fork(self) -> None:
        """Close the child's copies of the descriptors."""
        for entrance in (self._buffered, self._direct):
            if entrance is not None:
                entrance.close_after_fork()


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


def _open_unnamed(directory: str) -> Entrance:
    """A new file without a name."""
    entrance = Entrance()
    flags = getattr(os, "O_TMPFILE", None)
    if flags is not None:
        try:
            entrance.open(directory, flags)
            return entrance
        except OSError as error:
            if error.errno not in _UNSUPPORTED or not os.path.isdir(directory):
                raise
    # A name, for a moment.
    path = os.path.join(directory, f".hf_tiered_cache.{secrets.token_hex(8)}")
    try:
        entrance.open(path, os.O_CREAT | os.O_EXCL)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return entrance


def _open_direct(fd: int) -> Entrance:
    """Another descriptor of the file of `fd`, for direct I/O."""
    entrance = Entrance()
    entrance.open(f"/proc/self/fd/{fd}", os.O_DIRECT)
    return entrance


def _takes_direct(fd: int) -> bool:
    """Whether direct I/O works on the file of `fd`, which is empty. Raises OSError when that cannot
    be known for want of descriptors or memory.

    Some file systems take the flag and refuse the I/O, so one page is written and read.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        entrance = _open_direct(fd)
        with mmap.mmap(-1, ALIGNMENT_BYTES) as page:
            # At the second page: a file system with larger sectors refuses that offset.
            done = os.pwritev(entrance.fd, [page], ALIGNMENT_BYTES) == ALIGNMENT_BYTES
            done = done and os.preadv(entrance.fd, [page], ALIGNMENT_BYTES) == ALIGNMENT_BYTES
        os.ftruncate(fd, 0)
        return done
    except OSError as error:
        if error.errno in _SCARCE:
            raise
        return False


@cache
def _say_no_direct(directory: str) -> None:
    """Say it once per folder."""
    logger.warning(
        "the file system of %r takes no direct I/O, so blocks on disk go through the page cache:"
        " slower than the disk when they outgrow memory. Choose a folder on ext4, xfs or btrfs with"
        " disk_dir.",
        directory,
    )
