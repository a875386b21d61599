"""`BlockStore`: token blocks in a folder, found by key, shared by processes and restarts.

    find    the longest prefix that is there, each block open and its header verified
    put     write a chain of blocks; what is there already is not written again
    pin     a block and those before it may not be evicted
    verify  read every byte and compare

A store may lose and never lies: what is damaged, foreign or half there is a miss. Writers need no
lock to write and take one to give files their names, which is when the byte cap is kept; readers
take none. Which block leaves is said by a policy over an index that every process replays from the
journal.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic, time_ns
from typing import Any, NamedTuple

from hf_tiered_cache.errors import ConfigError, TierIOError, io_error
from hf_tiered_cache.sizes import AUTO, format_bytes, parse_bytes
from hf_tiered_cache.store import files, journal
from hf_tiered_cache.store.files import BlockFileError, Inode, NewBlock, OpenBlock
from hf_tiered_cache.store.folder_lock import FolderLock
from hf_tiered_cache.store.index import Index
from hf_tiered_cache.store.journal import Event, Journal, Record, TornJournalError
from hf_tiered_cache.store.keys import KEY_BYTES
from hf_tiered_cache.store.policies import EvictionPolicy
from hf_tiered_cache.store.publisher import Publisher, Work

logger = logging.getLogger(__name__)

INGEST_MODES = ("all", "hot")
LOAD_FAILURE_MODES = ("recompute", "raise")
DURABILITY_MODES = ("none", "always")
AUTO_SHARE = 0.8  # of what is free on the disk
HOT_KEYS = 64_000  # keys that "hot" remembers
HOT_TIMES = 2
QUARANTINE_FILES = 16
# A journal of more records than this for each block, and of more than that, is begun anew.
RECORDS_PER_BLOCK, LEAST_RECORDS = 8, 10_000
MOST_DESCRIPTORS = 65_536  # asked of the system
BATCH_BYTES = 64 * 1024 * 1024  # named at once, under one lock
REFUSED_SECONDS = 60.0  # after the system refused a write, until the next is tried
_PINS, _CORRUPT = "pins", "corrupt"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REMEDIES = {
    **dict.fromkeys(_FULL, "free space there, or make the store with a smaller capacity_bytes"),
    **dict.fromkeys(files.REFUSALS, "the folder can only be read: blocks are found and not put"),
    **dict.fromkeys(
        (errno.ENOENT, errno.EBADF), "the folder is gone or the store closed: make a new BlockStore"
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "too many files are open: raise `ulimit -n`, or close some"
    ),
}


class LayerData(NamedTuple):
    """One layer's part of a token block, as `put` takes it."""

    layer: int
    dtype: str  # a name in `files.DTYPES`
    shape: tuple[int, int, int, int]  # kv_heads, block_tokens, key_dim, value_dim
    data: bytes | memoryview


class TokenBlock(NamedTuple):
    """All layers of consecutive tokens, as `put` takes it."""

    key: bytes
    number: int  # in its sequence
    num_tokens: int
    layers: Sequence[LayerData]


@dataclass(frozen=True)
class Listed:
    """A block as `ls` tells of it."""

    key: str
    space: str
    parent: str
    num_bytes: int
    num_tokens: int
    number: int  # of the block in its sequence
    created_ns: int
    is_pinned: bool


@dataclass(frozen=True)
class StoreStats:
    """What is in a store, and what this process did with it."""

    root: str
    blocks: int
    used_bytes: int
    capacity_bytes: int
    pinned: int
    counters: dict[str, int]

    def __str__(self) -> str:
        counted = ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items()))
        return (
            f"{self.root}: {self.blocks} blocks, {format_bytes(self.used_bytes)} of"
            f" {format_bytes(self.capacity_bytes)}, {self.pinned} pinned"
            + (f"\nthis process: {counted}" if counted else "")
        )


class BlockStore:
    """Token blocks in the folder `root`, which any number of processes may share.

    Args:
        root: the folder; made, mode 0700, where there is none.
        capacity_bytes: of all block files together, a hard cap over all processes (each of them
            writes a batch of up to 64 MiB beside it, unnamed, before it is let in). "auto": four
            fifths of what is free or held by it, and never less than it holds.
        eviction: which block leaves a full store: "lru", "fifo", "s3fifo", or a policy of your own
            as "module:Class".
        ingest: "all" that is published, or "hot": what is published for the second time.
        durability: "none": a power failure may lose blocks; "always": files are synced before they
            count.
        on_load_failure: of a restored block that turns out to be damaged, under `reuse`:
            "recompute" what is missing, or "raise" the TierIOError.
        salt: blocks are found under the salt only with which they were put (a tenant's secret).

    A folder that refuses to be written to is read from. Raises ConfigError for an impossible value,
    or a folder that cannot be used.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        capacity_bytes: int | str = AUTO,
        eviction: str = "lru",
        ingest: str = "all",
        durability: str = "none",
        on_load_failure: str = "recompute",
        salt: str | bytes = b"",
    ) -> None:
        if ingest not in INGEST_MODES:
            raise ConfigError(f"ingest={ingest!r}: expected one of {', '.join(INGEST_MODES)}")
        if durability not in DURABILITY_MODES:
            raise ConfigError(
                f"durability={durability!r}: expected one of {', '.join(DURABILITY_MODES)}"
            )
        if on_load_failure not in LOAD_FAILURE_MODES:
            raise ConfigError(
                f"on_load_failure={on_load_failure!r}: expected one of"
                f" {', '.join(LOAD_FAILURE_MODES)}"
            )
        capacity = parse_bytes("capacity_bytes", capacity_bytes)
        policy = EvictionPolicy.by_name(eviction)
        self.root = Path(root).expanduser()
        self._knobs = {
            **{"capacity_bytes": capacity_bytes, "eviction": eviction, "ingest": ingest},
            **{"durability": durability, "on_load_failure": on_load_failure, "salt": salt},
        }
        self.ingest = ingest
        self.on_load_failure = on_load_failure
        self.salt = salt.encode() if isinstance(salt, str) else salt
        self._durability = durability
        self._root_fd = _open_root(self.root)
        self._close_root = weakref.finalize(self, os.close, self._root_fd)
        self._close_root.atexit = False  # the publisher may still write
        status = os.fstatvfs(self._root_fd)
        free_bytes = status.f_bavail * status.f_frsize
        self.capacity_bytes = free_bytes if capacity == AUTO else int(capacity)
        self._policy: Callable[[int], EvictionPolicy] = policy
        self._most_open = _descriptors() // 2
        try:
            self._lock = FolderLock(self._root_fd)
        except OSError as error:
            raise ConfigError(
                f"the store's folder {str(self.root)!r} cannot be used: {error.strerror}; choose"
                " another"
            ) from None
        self._journal = Journal(self._root_fd)
        self._index = Index(policy(self.capacity_bytes))
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self.counters: Counter[str] = Counter()
        self._refused_until = 0.0
        self._unreadable: set[tuple[bytes, int]] = set()  # keys, and when they were written
        failed = weakref.WeakMethod(self._publishing_failed)  # its thread keeps no store alive
        self.publisher = Publisher(lambda error: (tell := failed()) and tell(error))
        if self._lock.is_read_only:
            logger.warning(
                "the store %s can only be read: what is found there is used, nothing is put",
                self.root,
            )
        with self._locked():
            self._catch_up()
            if capacity == AUTO:
                free_bytes += self._index.num_bytes
                self.capacity_bytes = max(int(AUTO_SHARE * free_bytes), self._index.num_bytes)
                self._index.policy.capacity_bytes = self.capacity_bytes

    # Reading

    def find(self, space: bytes, keys: Sequence[bytes]) -> list[OpenBlock]:
        """The blocks of the longest prefix of `keys` that is there, open and verified but for their
        bytes. They stay readable, whoever evicts them."""
        found: list[OpenBlock] = []
        for key in keys:
            if OpenBlock.num_open >= self._most_open:
                _warn_once(
                    f"{OpenBlock.num_open} blocks of stores are open, half of what this process may"
                    " open (ulimit -n): a hit ends there, the rest is computed"
                )
                break
            block = self.open(space, key)
            if block is None:
                break
            found.append(block)
        self.counters["found"] += len(found)
        self.counters["missed"] += len(keys) - len(found)
        if found:
            self._note_hit(found[-1].key)
        return found

    def open(self, space: bytes, key: bytes) -> OpenBlock | None:
        """The block of that key, or None. What is no good is put away, and is a miss."""
        try:
            block = files.open_block(self._root_fd, str(self.root), space, key)
        except FileNotFoundError:
            return None
        except BlockFileError as error:
            self.quarantine(files.relative_path(space, key), error, error.inode)
        except OSError as error:
            self._note_trouble(error)
        else:
            if (key, block.header.created_ns) not in self._unreadable:
                return block
        return None

    def _note_trouble(self, error: OSError) -> None:
        """The folder cannot be looked at; it is as if nothing were there."""
        self.counters["errors"] += 1
        _warn_once(
            f"the store {self.root} cannot be read ({error.strerror}): blocks are computed anew"
        )

    def _note_hit(self, key: bytes) -> None:
        with contextlib.suppress(OSError), self._lock.mutex:  # a hint
            if self._journal.is_current() or self._reopen():
                self._journal.append([Record(Event.HIT, key)])

    def put_away(self, block: OpenBlock, why: str) -> None:
        """`quarantine` of a block that is open. From any thread. This process does not find it
        again, also where it has to stay."""
        self._unreadable.add((block.key, block.header.created_ns))
        with contextlib.suppress(OSError):  # a file that cannot even be asked which one it is
            self.quarantine(files.relative_path(block.header.space, block.key), why, block.inode)

    def quarantine(self, path: str, why: object, inode: Inode | None = None) -> None:
        """Put a file away that is not what its name says, for people to look at; it is a miss from
        now on. path: below the root. inode: of the file that was found bad, where that is known:
        another one of that name, which somebody stored meanwhile, stays."""
        self.counters["quarantined"] += 1
        logger.warning(
            "a block of the store is no good and was put into %s: %s. It is computed anew; if this"
            " comes again, check the disk.",
            self.root / _CORRUPT,
            why,
        )
        with contextlib.suppress(OSError), self._locked():
            if inode not in (None, files.inode_of(self._root_fd, path)):
                return
            key = _key_of(path)
            with contextlib.suppress(FileExistsError):
                os.mkdir(_CORRUPT, files.DIR_MODE, dir_fd=self._root_fd)
            put_away = f"{_CORRUPT}/{key.hex()}.{time_ns()}"
            if len(os.listdir(self.root / _CORRUPT)) >= QUARANTINE_FILES:
                os.unlink(path, dir_fd=self._root_fd)
            else:
                os.rename(path, put_away, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
            self._catch_up()
            self._index.remove(key)
            self._journal.append([Record(Event.GONE, key)])

    # Writing

    def is_wanted(self, space: bytes, key: bytes) -> bool:
        """Whether a block is to be put: it is neither there nor on its way, and `ingest` takes
        it."""
        if self._is_read_only or self.publisher.has(key):
            return False
        try:
            if files.exists(self._root_fd, files.relative_path(space, key)):
                self.counters["already_there"] += 1
                return False
        except OSError as error:
            self._note_trouble(error)
            return False
        if self.ingest == "all":
            return True
        with self._lock.mutex:
            times = self._seen[key] = self._seen.pop(key, 0) + 1
            while len(self._seen) > HOT_KEYS:
                self._seen.popitem(last=False)
        return times >= HOT_TIMES

    def put(self, space: bytes, parent: bytes, chain: Sequence[TokenBlock]) -> int:
        """Write consecutive blocks, of which `parent` names the one before; the number written.

        Fewer than all where a block before them is not there, or they do not fit. On a full disk
        others leave for them. Raises TierIOError when they cannot be written; none of them is there
        then, or the first few.
        """
        written = 0
        for batch in _batches(chain):
            if self._is_read_only:
                break
            try:
                with _told(self.root):
                    done = self._put_even_if_full(space, parent, batch)
            except TierIOError:
                self.counters["write_errors"] += 1
                raise
            written += done
            if done < len(batch):
                break
            parent = batch[-1].key
        self.counters["put"] += written
        return written

    def _put_even_if_full(self, space: bytes, parent: bytes, batch: Sequence[TokenBlock]) -> int:
        try:
            return self._put_batch(space, parent, batch)
        except OSError as error:
            if error.errno not in _FULL or not self._let_leave(batch, parent):
                raise
        return self._put_batch(space, parent, batch)

    def _let_leave(self, batch: Sequence[TokenBlock], parent: bytes) -> bool:
        """Evict as much as the batch takes, below what is held now; whether that could be done."""
        with self._locked():
            self._catch_up()
            pages = sum(len(it.data) for block in batch for it in block.layers)
            pages += 2 * files.ALIGNMENT_BYTES * len(batch)  # header and footer
            held = self._index.num_bytes
            gone: list[bytes] = []
            keep = [*self._pinned(), parent]
            has_room = self._make_room(self.capacity_bytes - max(0, held - pages), gone, keep)
            self._journal.append(Record(Event.GONE, key) for key in gone)
        return has_room and bool(gone)

    def _put_batch(self, space: bytes, parent: bytes, batch: Sequence[TokenBlock]) -> int:
        with contextlib.ExitStack() as stack:
            new: list[tuple[NewBlock, Record]] = []
            for block in batch:
                header = files.plan(
                    block.key,
                    parent,
                    space,
                    block.num_tokens,
                    block.number,
                    [(it.layer, files.DTYPES[it.dtype], it.shape, it.data) for it in block.layers],
                )
                data = [it.data for it in block.layers]
                one = stack.enter_context(NewBlock(self._root_fd, header, data))
                if self._durability == "always":
                    one.sync()
                size = _size_on_disk(header.file_bytes)
                new.append((one, Record(Event.PUT, block.key, size, parent, space)))
                parent = block.key
            stack.enter_context(self._locked())
            return self._name_files(space, new, batch[0].number > 0)

    def _name_files(
        self, space: bytes, new: Sequence[tuple[NewBlock, Record]], has_parent: bool
    ) -> int:
        """Give files their names, as many as fit; the caller holds the lock."""
        self._catch_up()
        parent = new[0][1].parent
        if has_parent and not files.exists(self._root_fd, files.relative_path(space, parent)):
            self.counters["parent_gone"] += len(new)
            return 0
        size = sum(record.num_bytes for _, record in new if record.key not in self._index)
        gone: list[bytes] = []
        has_room = self._make_room(size, gone, keep=[*self._pinned(), parent])
        self._journal.append(Record(Event.GONE, key) for key in gone)
        if not has_room:
            self.counters["no_room"] += len(new)
            return 0
        # The last one first, so that of a chain its root is the most recent.
        self._journal.append(record for _, record in reversed(new))
        for one, _ in new:
            one.publish()
        if self._durability == "always":
            self._sync_folders(new)
        self._catch_up()
        return len(new)

    def _sync_folders(self, new: Sequence[tuple[NewBlock, Record]]) -> None:
        for folder in {os.path.dirname(one.path) for one, _ in new}:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root_fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _make_room(self, num_bytes: int, gone: list[bytes], keep: Sequence[bytes]) -> bool:
        def evict(key: bytes) -> None:
            self._unlink(files.relative_path(self._index.entries[key].space, key))
            self._index.remove(key)
            gone.append(key)
            self.counters["evicted"] += 1

        return self._index.make_room(num_bytes, evict, keep)

    def _unlink(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self._root_fd)

    def publish(self, num_bytes: int, run: Callable[[], None], **work: Any) -> bool:
        """Do `run`, which puts blocks of so many bytes, in the background; False, and it is never
        done, where too much waits already. work: see `Work`."""
        if self._is_read_only:
            return False
        is_queued = self.publisher.submit(Work(num_bytes, run, **work))
        if not is_queued:
            self.counters["dropped"] += 1
        return is_queued

    def bypass(self, reason: str) -> None:
        """Count, and tell once, that something went past the store."""
        self.counters["bypassed"] += 1
        _warn_once(f"the store is bypassed where {reason}")

    def note_recompute(self, error: Exception) -> None:
        """Blocks that were found could not be read; what they held is computed anew."""
        self.counters["recomputed"] += 1
        _warn_once(f"blocks of the store could not be read and are computed anew: {error}")

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything that was published is written; False where that took too long."""
        return self.publisher.flush(timeout_seconds)

    def _publishing_failed(self, error: Exception) -> None:
        self.counters["publish_errors"] += 1
        _warn_once(f"blocks could not be published to {self.root}: {error}")
        if isinstance(error, OSError) and error.errno in files.REFUSALS:
            self._refused_until = monotonic() + REFUSED_SECONDS

    @property
    def _is_read_only(self) -> bool:
        return self._lock.is_read_only or monotonic() < self._refused_until

    # Keeping house

    def pin(self, space: bytes, key: bytes) -> bool:
        """Keep a block, and those before it, from being evicted; False where it is not there."""
        with self._locked():
            if not files.exists(self._root_fd, files.relative_path(space, key)):
                return False
            with contextlib.suppress(FileExistsError):
                os.mkdir(_PINS, files.DIR_MODE, dir_fd=self._root_fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            name = f"{_PINS}/{key.hex()}"
            os.close(os.open(name, flags, files.FILE_MODE, dir_fd=self._root_fd))
        return True

    def unpin(self, key: bytes) -> bool:
        """Let a block be evicted again; False where it was not pinned."""
        with self._locked():
            try:
                os.unlink(f"{_PINS}/{key.hex()}", dir_fd=self._root_fd)
            except FileNotFoundError:
                return False
        return True

    def _pinned(self) -> list[bytes]:
        try:
            fd = os.open(_PINS, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root_fd)
        except FileNotFoundError:
            return []
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        with contextlib.suppress(ValueError):
            return [bytes.fromhex(name) for name in names]
        return []

    def ls(self) -> Iterator[Listed]:
        """Every block, as its own header tells. Damaged ones are left out."""
        pinned = set(self._pinned())
        for path, key, status in self._walk():
            try:
                block = files.open_path(self._root_fd, str(self.root), path)
            except OSError:
                continue
            header = block.header
            yield Listed(
                *(key.hex(), header.space.hex(), header.parent.hex(), status.st_size),
                *(header.num_tokens, header.number, header.created_ns),
                key in pinned,
            )
            block.close()

    def verify(self, repair: bool = False) -> Iterator[tuple[str, str]]:
        """(path, what is wrong) of every block whose header or bytes are not what was stored, or
        cannot be read. repair: put them away."""
        for path, _, _ in self._walk():
            error = self._wrong_with(path)
            if error is not None:
                yield path, str(error)
                if repair and error.errno not in files.PASSING:
                    self.quarantine(path, error)

    def _wrong_with(self, path: str) -> OSError | None:
        try:
            block = files.open_path(self._root_fd, str(self.root), path)
        except FileNotFoundError:
            return None
        except OSError as error:
            return error
        try:
            for extent in block.header.extents:
                block.read(extent)
        except OSError as error:
            return error
        finally:
            block.close()
        return None

    def purge(self) -> int:
        """Remove every block, pinned ones too; the number removed."""
        with self._locked():
            removed = 0
            for path, _, _ in self._walk():
                self._unlink(path)
                removed += 1
            for key in self._pinned():
                self.unpin(key)
            self._rebuild()
        return removed

    def gc(self) -> dict[str, int]:
        """Make the index anew from the files, remove what a killed writer left and what lies beyond
        the cap, pins of what is gone, and what is in quarantine; how many of each."""
        with self._locked():
            swept = _sweep(self._root_fd, self.root)
            self._rebuild()
            gone: list[bytes] = []
            self._make_room(0, gone, keep=self._pinned())
            self._journal.append(Record(Event.GONE, key) for key in gone)
            lost = [key for key in self._pinned() if key not in self._index]
            for key in lost:
                self.unpin(key)
            quarantined = _empty_folder(self._root_fd, _CORRUPT)
        return {
            "unfinished": swept,
            "evicted": len(gone),
            "pins": len(lost),
            "quarantined": quarantined,
        }

    def stats(self) -> StoreStats:
        """What is in the store."""
        with self._locked():
            self._catch_up()
            return StoreStats(
                str(self.root),
                len(self._index),
                self._index.num_bytes,
                self.capacity_bytes,
                len(self._pinned()),
                dict(self.counters),
            )

    def close(self, timeout_seconds: float | None = None) -> None:
        """Write what was published, then give threads and descriptors back. Idempotent."""
        self.publisher.close(timeout_seconds)
        with self._lock.mutex:
            self._journal.close()
            self._lock.close()
            self._root_fd = -1
            self._close_root()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (str(self.root), self._knobs)

    def __enter__(self) -> "BlockStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The index

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among threads and processes. Reentrant. What the system refuses becomes a
        TierIOError."""
        with _told(self.root), self._lock.held():
            yield

    def _catch_up(self) -> None:
        """Replay what happened since; the caller holds the lock."""
        try:
            if not (self._journal.is_current() or self._reopen()):
                self._rebuild()
                return
            self._replay(self._journal.read_new())
        except TornJournalError:
            self._rebuild()
        if self._journal.num_records > max(LEAST_RECORDS, RECORDS_PER_BLOCK * len(self._index)):
            with contextlib.suppress(OSError):  # a full disk: it goes on with the long one
                self._begin_anew(
                    [
                        Record(Event.PUT, key, it.num_bytes, it.parent, it.space)
                        for key, it in self._index.entries.items()  # the most recent last
                    ]
                )

    def _reopen(self) -> bool:
        """Begin with the store's journal, which is another one now; False where there is none."""
        self._index = Index(self._policy(self.capacity_bytes))
        return self._journal.open()

    def _replay(self, records: Sequence[Record]) -> None:
        for event, key, num_bytes, parent, space in records:
            if event is Event.PUT:
                self._index.put(key, num_bytes, parent, space)
            elif event is Event.GONE:
                self._index.remove(key)
            else:
                for one in self._index.upwards(key):
                    self._index.hit(one)

    def _rebuild(self) -> None:
        """Make journal and index from the files; the last one written counts as the most recent.
        The index alone, where the disk takes no journal."""
        found = []
        for path, key, status in self._walk():
            try:
                block = files.open_path(self._root_fd, str(self.root), path)
            except OSError:
                continue
            size = _size_on_disk(status.st_size)
            record = Record(Event.PUT, key, size, block.header.parent, block.header.space)
            found.append((status.st_mtime_ns, -block.header.number, record))
            block.close()
        records = [record for *_, record in sorted(found)]
        try:
            self._begin_anew(records)
        except OSError:
            self._journal.close()
            self._index = Index(self._policy(self.capacity_bytes))
            self._replay(records)

    def _begin_anew(self, records: Sequence[Record]) -> None:
        self._journal.rewrite(records)
        self._reopen()
        self._replay(self._journal.read_new())

    def _walk(self) -> Iterator[tuple[str, bytes, os.stat_result]]:
        """(path below the root, key, status) of every file that is named like a block."""
        for path in sorted((self.root / files.VERSION_DIR).glob(f"*/??/??/*{files.SUFFIX}")):
            try:
                key, status = _key_of(path), path.lstat()
            except (ValueError, OSError):
                continue
            if len(key) == KEY_BYTES:
                yield str(path.relative_to(self.root)), key, status


def _descriptors() -> int:
    """How many files this process may open; the soft limit is raised, which costs nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else soft


def _key_of(path: str | Path) -> bytes:
    return bytes.fromhex(os.path.basename(path).removesuffix(files.SUFFIX))


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _reopened(root: str, knobs: dict[str, Any]) -> BlockStore:
    return BlockStore(root, **knobs)


def _batches(chain: Sequence[TokenBlock]) -> Iterator[list[TokenBlock]]:
    batch: list[TokenBlock] = []
    num_bytes = 0
    for block in chain:
        size = sum(len(it.data) for it in block.layers)
        if batch and num_bytes + size > BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(block)
        num_bytes += size
    if batch:
        yield batch


def _size_on_disk(file_bytes: int) -> int:
    return -(-file_bytes // files.ALIGNMENT_BYTES) * files.ALIGNMENT_BYTES


def _open_root(root: Path) -> int:
    try:
        root.mkdir(mode=files.DIR_MODE, parents=True, exist_ok=True)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"the store's folder {str(root)!r} cannot be used: {error.strerror}; choose another"
        ) from None
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise ConfigError(
            f"the store's folder {str(root)!r} belongs to user {status.st_uid} and has mode"
            f" {status.st_mode & 0o777:o}: cached keys and values can be read back as text, so it"
            " must be yours and writable by nobody else (chmod 700)"
        )
    return fd


def _sweep(root_fd: int, root: Path) -> int:
    """Remove temporary files whose writer is gone; of journals, those of whoever had the lock."""
    swept = 0
    for path in root.glob(f"{journal.NAME}*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()
            swept += 1
    for path in (root / files.VERSION_DIR).glob("*/??/??/.*.tmp"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                swept += 1
            finally:
                os.close(fd)
    return swept


def _empty_folder(root_fd: int, name: str) -> int:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root_fd)
    except FileNotFoundError:
        return 0
    try:
        names = os.listdir(fd)
        for one in names:
            os.unlink(one, dir_fd=fd)
        return len(names)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    """Say of what the system refuses where it was, and what to do about it."""
    try:
        yield
    except TierIOError:
        raise
    except OSError as error:
        raise io_error(
            error.errno,
            f"the store {str(root)!r}: {error.strerror}; nothing was lost but the chance to find"
            f" blocks again; {_REMEDIES.get(error.errno or errno.EIO, 'check the disk')}",
        ) from error
