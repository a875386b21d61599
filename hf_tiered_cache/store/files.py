"""One token block on disk: an immutable file, named by its key, an extent for each layer.

    page 0     header: fixed fields, one entry per extent, checksum; zeros up to the first extent
    extents    4 KiB aligned, back to back, each the bytes of one layer's block with its checksum
    footer     32 bytes: magic, length of the file, the header's checksum

All numbers are little-endian at fixed offsets; there is nothing to be executed and nothing whose
size is believed before it was compared with what is expected. Checksums are xxh3_128: they find
what a disk changes, not what an attacker forges.

A file is written without a name (O_TMPFILE) and gets it when it is complete (`linkat`): readers see
whole files only, a killed writer leaves nothing, and of two writers of one key the second finds the
work done. Names are opened relative to the root's descriptor and never followed through links.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import xxhash

from hf_tiered_cache.errors import TierIOError

MAGIC = b"\x89HTC\r\n\x1a\n"
MAJOR, MINOR = 1, 0
VERSION_DIR = f"v{MAJOR}"
SUFFIX = ".htc"
ALIGNMENT_BYTES = 4096
MAX_HEADER_BYTES = 64 * 1024
MAX_EXTENTS = 512  # as many as fit into the largest header, and then some layers
FILE_MODE, DIR_MODE = 0o600, 0o700
CODEC_RAW = 0

# magic, major, minor, header length, file length, codec, reserved, extents,
# key, parent, namespace, tokens, number of the block, rank, world, created (ns since 1970)
_FIXED = struct.Struct("<8sHHIQHHI32s32s32sIIHHQ")
_TABLE = np.dtype(  # packed: 64 bytes a record
    [
        *(("layer", "<u4"), ("kind", "<u2"), ("dtype", "<u2"), ("shape", "<u4", 4)),
        *(("offset", "<u8"), ("stored", "<u8"), ("raw", "<u8")),
        ("checksum", "u1", 16),  # xxh3_128 of the stored bytes
    ]
)
_SHAPE = struct.Struct("<IHH4IQQQ")  # the same without the checksum
_CHECKSUM_BYTES = 16
_FOOTER = struct.Struct("<8sQ16s")

# What elements the bytes are; numbers are never reused.
DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "float64": 4}
KIND_KV = 0  # keys then values of one layer, as `BlockLayout` lays them out

# What a file system answers that has no unnamed files.
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS}


# What the system answers where nothing may be written.
REFUSALS = {errno.EROFS, errno.EACCES, errno.EPERM}
# Of a read that failed: what says nothing of the file.
PASSING = {errno.ECANCELED, errno.ENOMEM, errno.EMFILE, errno.ENFILE}

Inode = tuple[int, int]


class BlockFileError(TierIOError):
    """A file of a store is not what its name says: damaged, foreign, or of another kind. `inode`:
    of the file, where it could be opened."""

    inode: Inode | None = None


@dataclass(frozen=True)
class Extent:
    """One layer's part of a token block."""

    layer: int
    dtype: int  # of DTYPES
    shape: tuple[int, int, int, int]  # kv_heads, block_tokens, key_dim, value_dim
    offset: int
    num_bytes: int
    checksum: bytes  # xxh3_128 of the bytes
    kind: int = KIND_KV


@dataclass(frozen=True, eq=False)
class Header:
    """What a block file says of itself. `table`: one `_TABLE` record for each extent; made into an
    `Extent` where it is asked for, since a long prompt has many thousands."""

    key: bytes
    parent: bytes
    space: bytes
    num_tokens: int
    number: int  # of the block in its sequence
    table: np.ndarray
    created_ns: int = 0
    rank: int = 0
    world: int = 1

    def extent(self, number: int) -> Extent:
        """The extent of that number; not that of a layer, where only some are stored."""
        record = self.table[number]
        return Extent(
            int(record["layer"]),
            int(record["dtype"]),
            tuple(record["shape"].tolist()),
            int(record["offset"]),
            int(record["stored"]),
            record["checksum"].tobytes(),
            int(record["kind"]),
        )

    @property
    def extents(self) -> tuple[Extent, ...]:
        """All of them."""
        return tuple(map(self.extent, range(len(self.table))))

    @cached_property
    def shapes(self) -> bytes:
        """Equal for files whose extents differ in their bytes alone."""
        return _shapes(self.table)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first extent."""
        return _round_up(_FIXED.size + len(self.table) * _TABLE.itemsize + _CHECKSUM_BYTES)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.header_bytes + int(self.table["stored"].sum()) + _FOOTER.size

    def pack(self) -> bytes:
        """Page 0 (or more), ready to be written."""
        fixed = _FIXED.pack(
            *(MAGIC, MAJOR, MINOR, self.header_bytes, self.file_bytes, CODEC_RAW, 0),
            *(len(self.table), self.key, self.parent, self.space, self.num_tokens, self.number),
            *(self.rank, self.world, self.created_ns),
        )
        body = (fixed + self.table.tobytes()).ljust(self.header_bytes - _CHECKSUM_BYTES, b"\0")
        return body + xxhash.xxh3_128_digest(body)

    def footer(self, header: bytes) -> bytes:
        """The end of the file whose header is `header`."""
        return _FOOTER.pack(MAGIC, self.file_bytes, header[-_CHECKSUM_BYTES:])


FOOTER_BYTES = _FOOTER.size


def plan(
    key: bytes,
    parent: bytes,
    space: bytes,
    num_tokens: int,
    number: int,
    layers: Sequence[tuple[int, int, tuple[int, int, int, int], bytes | memoryview]],
    *,
    created_ns: int | None = None,
) -> Header:
    """The header of a file with these extents: (layer, dtype, shape, bytes) each, whose bytes are
    multiples of 4 KiB."""
    offset = _round_up(_FIXED.size + len(layers) * _TABLE.itemsize + _CHECKSUM_BYTES)
    extents = []
    for layer, dtype, shape, data in layers:
        checksum = xxhash.xxh3_128_digest(data)
        extents.append(Extent(layer, dtype, shape, offset, len(data), checksum))
        offset += len(data)
    created = time.time_ns() if created_ns is None else created_ns
    return Header(key, parent, space, num_tokens, number, table_of(extents), created)


def table_of(extents: Sequence[Extent]) -> np.ndarray:
    """The extents as `Header` keeps them."""
    table = np.zeros(len(extents), _TABLE)
    for number, it in enumerate(extents):
        checksum = np.frombuffer(it.checksum, np.uint8)
        table[number] = (
            *(it.layer, it.kind, it.dtype, it.shape, it.offset, it.num_bytes, it.num_bytes),
            checksum,
        )
    return table


def parse(data: bytes, file_bytes: int) -> Header:
    """The header in the first bytes of a file of `file_bytes`. Raises BlockFileError with the first
    thing that is wrong; what it says of sizes is compared before it is used."""
    if len(data) < _FIXED.size:
        raise BlockFileError(f"{file_bytes} bytes are fewer than a header")
    fields = _FIXED.unpack_from(data)
    magic, major, _, header_bytes, length, codec, _, num_extents = fields[:8]
    key, parent, space, num_tokens, number, rank, world, created = fields[8:]
    if magic != MAGIC:
        raise BlockFileError("not a block file")
    if major != MAJOR:
        raise BlockFileError(f"format {major}, expected {MAJOR}")
    if codec != CODEC_RAW:
        raise BlockFileError(f"codec {codec}, expected {CODEC_RAW}")
    if not 0 < num_extents <= MAX_EXTENTS:
        raise BlockFileError(f"{num_extents} extents, expected 1 to {MAX_EXTENTS}")
    least = _FIXED.size + num_extents * _TABLE.itemsize + _CHECKSUM_BYTES
    if not least <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes):
        raise BlockFileError(f"a header of {header_bytes} bytes for {num_extents} extents")
    if header_bytes % ALIGNMENT_BYTES or len(data) < header_bytes:
        raise BlockFileError(f"a header of {header_bytes} bytes in {len(data)}")
    body = data[: header_bytes - _CHECKSUM_BYTES]
    if xxhash.xxh3_128_digest(body) != data[header_bytes - _CHECKSUM_BYTES : header_bytes]:
        raise BlockFileError("the header's checksum differs")
    if length != file_bytes:
        raise BlockFileError(f"{file_bytes} bytes long, written with {length}")
    table = np.frombuffer(body, _TABLE, num_extents, _FIXED.size)
    _check_table(_shapes(table), header_bytes, file_bytes)
    return Header(key, parent, space, num_tokens, number, table, created, rank, world)


def _shapes(table: np.ndarray) -> bytes:
    """Everything in a table but the checksums, which are at the end of its records."""
    width = _TABLE.itemsize - _CHECKSUM_BYTES
    return table.view(np.uint8).reshape(len(table), _TABLE.itemsize)[:, :width].tobytes()


@lru_cache(maxsize=64)  # nearly all files of a store are alike
def _check_table(shapes: bytes, header_bytes: int, file_bytes: int) -> None:
    """Raise BlockFileError unless the extents fill the file, one after the other."""
    end = header_bytes
    for at in range(0, len(shapes), _SHAPE.size):
        layer, *_, offset, stored, raw = _SHAPE.unpack_from(shapes, at)
        if offset != end or stored != raw or stored == 0 or stored % ALIGNMENT_BYTES:
            raise BlockFileError(f"extent of layer {layer}: {stored} bytes at {offset}, not {end}")
        end += stored
    if end + _FOOTER.size != file_bytes:
        raise BlockFileError(f"extents end at {end} of {file_bytes} bytes")


def check_footer(data: bytes, header: bytes, file_bytes: int) -> None:
    """Raise BlockFileError unless `data` is the footer that belongs to the header."""
    if data != _FOOTER.pack(MAGIC, file_bytes, header[-_CHECKSUM_BYTES:]):
        raise BlockFileError("the footer does not belong to the header")


class OpenBlock:
    """A block file that was found good up to its extents, held open: whoever evicts it meanwhile
    takes the name and not the bytes. Extents are verified when they are read."""

    __slots__ = ("__weakref__", "fd", "header", "path")
    num_open: ClassVar[int] = 0
    """Of this process; each has a descriptor."""

    def __init__(self, fd: int, header: Header, path: str) -> None:
        type(self).num_open += 1
        self.fd = fd
        self.header = header
        self.path = path

    @property
    def key(self) -> bytes:
        """Its name."""
        return self.header.key

    @property
    def inode(self) -> Inode:
        """Which file it is, whatever name it has by now."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def read(self, extent: Extent) -> bytes:
        """The bytes of an extent. Raises BlockFileError if they are not what was stored."""
        data = os.pread(self.fd, extent.num_bytes, extent.offset)
        if xxhash.xxh3_128_digest(data) != extent.checksum:
            raise BlockFileError(f"{self.path}: the bytes of layer {extent.layer} differ")
        return data

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            type(self).num_open -= 1  # at exit the module may be gone
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def relative_path(space: bytes, key: bytes) -> str:
    """Where a block is, below the root."""
    name = key.hex()
    return f"{VERSION_DIR}/{space.hex()[:16]}/{name[:2]}/{name[2:4]}/{name}{SUFFIX}"


def exists(root_fd: int, path: str) -> bool:
    """Whether there is something of that name."""
    try:
        os.stat(path, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def inode_of(root_fd: int, path: str) -> Inode:
    """Which file has that name. Raises FileNotFoundError."""
    status = os.stat(path, dir_fd=root_fd, follow_symlinks=False)
    return status.st_dev, status.st_ino


def open_block(root_fd: int, root: str, space: bytes, key: bytes) -> OpenBlock:
    """Open the block of that key and verify header and footer.

    Raises FileNotFoundError where there is none, BlockFileError where it is not what it should be,
    other OSErrors as the system raises them.
    """
    return _open(root_fd, root, relative_path(space, key), space)


def open_path(root_fd: int, root: str, path: str) -> OpenBlock:
    """The same by where it is, for those who know no namespaces."""
    return _open(root_fd, root, path, None)


def _open(root_fd: int, root: str, path: str, space: bytes | None) -> OpenBlock:
    try:
        fd = os.open(
            path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root_fd
        )
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BlockFileError(f"{path}: a symbolic link") from None
        raise
    try:
        header = _checked(fd)
        is_named_so = relative_path(header.space, header.key) == path
        if not is_named_so or space not in (None, header.space):
            raise BlockFileError("it holds another block than its name says")
    except BaseException as error:
        status = os.fstat(fd)
        os.close(fd)
        if isinstance(error, BlockFileError):
            told = BlockFileError(f"{root}/{path}: {error}")
            told.inode = status.st_dev, status.st_ino
            raise told from None
        raise
    return OpenBlock(fd, header, f"{root}/{path}")


def _checked(fd: int) -> Header:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BlockFileError("not a regular file")
    if status.st_uid != os.geteuid():
        raise BlockFileError(f"it belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise BlockFileError(f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})")
    if status.st_nlink > 1:
        raise BlockFileError(f"it has {status.st_nlink} names")
    head = os.pread(fd, ALIGNMENT_BYTES, 0)
    if len(head) >= _FIXED.size:
        wanted = _FIXED.unpack_from(head)[3]
        if len(head) < wanted <= min(MAX_HEADER_BYTES, status.st_size):
            head = os.pread(fd, wanted, 0)
    header = parse(head, status.st_size)
    footer = os.pread(fd, _FOOTER.size, status.st_size - _FOOTER.size)
    check_footer(footer, head[: header.header_bytes], status.st_size)
    return header


class NewBlock:
    """A block file in the making: written, without a name yet.

    with NewBlock(root_fd, header, payloads) as new:
        is_new = new.publish()
    """

    def __init__(
        self, root_fd: int, header: Header, payloads: Sequence[bytes | memoryview]
    ) -> None:
        """Writes all of it. Raises OSError, and leaves nothing."""
        self._root_fd = root_fd
        self.path = relative_path(header.space, header.key)
        self._temporary: str | None = None
        folder = os.path.dirname(self.path)
        _make_folders(root_fd, folder)
        self._fd = self._open(folder)
        try:
            os.fchmod(self._fd, FILE_MODE)
            head = header.pack()
            _write_all(self._fd, [head, *payloads, header.footer(head)])
        except BaseException:
            self.close()
            raise

    def _open(self, folder: str) -> int:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            return os.open(folder, flags | os.O_TMPFILE, FILE_MODE, dir_fd=self._root_fd)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        # File systems without unnamed files (NFS, some overlays): a name that nobody else has.
        self._temporary = f"{folder}/.{os.getpid()}.{secrets.token_hex(8)}.tmp"
        flags |= os.O_CREAT | os.O_EXCL
        fd = os.open(self._temporary, flags, FILE_MODE, dir_fd=self._root_fd)
        fcntl.flock(fd, fcntl.LOCK_EX)  # who sweeps up takes those whose writer is gone
        return fd

    def sync(self) -> None:
        """See to it that the bytes outlive a power failure; its folder is the caller's."""
        os.fdatasync(self._fd)

    def publish(self) -> bool:
        """Give the file its name; False where the name is taken: somebody stored the same."""
        try:
            if self._temporary is None:
                source = f"/proc/self/fd/{self._fd}"
                os.link(source, self.path, dst_dir_fd=self._root_fd, follow_symlinks=True)
            elif exists(self._root_fd, self.path):
                return False
            else:  # a link would give it two names for a moment; whom it replaces holds the same
                os.rename(
                    self._temporary,
                    self.path,
                    src_dir_fd=self._root_fd,
                    dst_dir_fd=self._root_fd,
                )
                self._temporary = None
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        """Give up what has no name. Idempotent."""
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._root_fd)
            self._temporary = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "NewBlock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _make_folders(root_fd: int, folder: str) -> None:
    """Make a folder and those above it, mode 0700, whatever the umask is."""
    try:
        os.mkdir(folder, DIR_MODE, dir_fd=root_fd)
    except FileExistsError:
        return
    except FileNotFoundError:
        above = os.path.dirname(folder)
        if not above:  # the root itself is gone
            raise
        _make_folders(root_fd, above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, DIR_MODE, dir_fd=root_fd)


def _write_all(fd: int, buffers: Sequence[bytes | memoryview]) -> None:
    """Write everything, one buffer after the other. Raises OSError, ENOSPC where a full disk takes
    nothing more."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while view:
            done = os.write(fd, view)
            if done == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view = view[done:]


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
