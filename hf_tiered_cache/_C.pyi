"""The compiled core, as csrc/bindings.cpp defines it.

It knows no torch: tensors come as addresses, shapes and strides (in elements), as ints and tuples
of ints; which tuple holds what is said in hf_tiered_cache/kernels/cores.py. Callers have checked
their arguments: a wrong address is read.
"""

from collections.abc import Sequence
from typing import Final

def kernels() -> list[tuple[str, str]]:
    """(name, reason) of every known kernel, the preferred first; reason "" if it runs here. The
    functions below take a kernel by its place in this list."""

def attend(
    kernel: int,
    dtype: int,
    query: int,
    query_shape: tuple[int, ...],
    query_stride: tuple[int, ...],
    view: tuple[int, ...],
    kv_tokens: int,
    query_start: int,
    causal: bool,
    scale: float,
    softcap: float,
    starts: int,
    mask: tuple[int, ...] | None,
    state: tuple[int, ...] | None,
    out: tuple[int, ...] | None,
    num_threads: int,
    /,
) -> None:
    """Attend the blocks of a view into `state` (acc, max, sum) or into `out` (address, 4 strides,
    lse, sinks). Raises ValueError for a slot outside the slab, before anything is written, and for
    a kernel that cannot run here."""

def read_probe(
    kernel: int,
    dtype: int,
    query: int,
    query_shape: tuple[int, ...],
    query_stride: tuple[int, ...],
    view: tuple[int, ...],
    kv_tokens: int,
    query_start: int,
    causal: bool,
    scale: float,
    softcap: float,
    starts: int,
    mask: tuple[int, ...] | None,
    state: tuple[int, ...] | None,
    out: tuple[int, ...] | None,
    num_threads: int,
    /,
) -> int:
    """Read what `attend` would read and do nothing with it (for benchmarks)."""

def finish(
    kernel: int,
    dtype: int,
    shape: tuple[int, ...],
    state: tuple[int, ...],
    out: tuple[int, ...],
    num_threads: int,
    /,
) -> None:
    """Normalise a running state of `shape` (batch, heads, queries, value_dim) into `out`."""

def append(
    keys: int,
    key_shape: tuple[int, ...],
    key_stride: tuple[int, ...],
    values: int,
    value_stride: tuple[int, ...],
    view: tuple[int, ...],
    start_token: int,
    num_threads: int,
    /,
) -> None:
    """Write new tokens into their blocks. Raises ValueError for a slot outside the slab, before
    anything is written."""

def pack(kernel: int, shape: tuple[int, int, int, int], raw: int, packed: int, /) -> bool:
    """Pack a block of bfloat16 of `shape` (kv_heads, block_tokens, key_dim, value_dim); False, and
    what is at `packed` is undefined, if it cannot be. Raises ValueError for a shape that cannot."""

def unpack(kernel: int, shape: tuple[int, int, int, int], packed: int, raw: int, /) -> None:
    """Unpack what `pack` packed."""

class AttentionJob:
    """Attend `views` one after the other into `state`, which is begun anew, once the word at
    `ready` is raised to `value`; then raise the word at `done`. All memory must stay until
    `is_done`."""

    def __init__(
        self,
        *,
        kernel: int,
        dtype: int,
        query: int,
        query_shape: tuple[int, ...],
        query_stride: tuple[int, ...],
        views: Sequence[tuple[int, ...]],
        kv_tokens: int,
        query_start: int,
        causal: bool,
        scale: float,
        softcap: float,
        state: tuple[int, ...] | None,
        num_threads: int,
        ready: int,
        done: int,
        value: int,
    ) -> None:
        """Raises ValueError for a slot outside its slab."""

    @property
    def is_done(self) -> bool: ...
    @property
    def was_cancelled(self) -> bool: ...
    @property
    def error(self) -> str:
        """What went wrong; empty if nothing did."""

    @property
    def seconds(self) -> float:
        """How long it attended."""

class AttentionWorker:
    """A thread that does jobs in the order they were submitted."""

    def __init__(self) -> None: ...
    def submit(self, job: AttentionJob, /) -> None:
        """Queue a job; the thread starts with the first. Raises RuntimeError after `close`."""

    def wait(self, job: AttentionJob, timeout_seconds: float, /) -> bool:
        """Whether the job is done, after at most so long."""

    def close(self) -> None:
        """Let the job under way end and cancel the others. Idempotent."""

END_OF_FILE: Final[int]
"""`Move.error`: nothing more came through."""
CANCELLED: Final[int]
"""`Move.error`: its turn never came, or a move that it had to follow failed."""
UNPACKABLE: Final[int]
"""`Move.error`: a record that was to be packed cannot be; nothing was written."""

class Move:
    """Consecutive records to be moved between memory and a file. Their memory must stay until
    `is_done`; everything else is good from then on."""

    def __init__(
        self,
        *,
        is_write: bool,
        fd: int,
        offset: int,
        record_bytes: int,
        addresses: Sequence[int],
        is_direct: bool,
        after: Sequence[Move],
        packing: tuple[int, tuple[int, int, int, int], int] | None = None,
    ) -> None:
        """after: moves that end before this one begins; they were submitted before it. packing:
        (kernel, shape, bytes of a record in the file) of what `pack` does on the way; None: the
        file has the bytes of memory."""

    @property
    def is_done(self) -> bool: ...
    @property
    def error(self) -> int:
        """0, an errno, END_OF_FILE, CANCELLED or UNPACKABLE."""

    @property
    def error_offset(self) -> int:
        """Where in the file it stood still."""

    @property
    def began(self) -> float:
        """When a thread took it, in seconds of `time.perf_counter`."""

    @property
    def ended(self) -> float: ...
    @property
    def checksums(self) -> list[bytes]:
        """The xxh3_128 of each record; none if there was an error."""

class BlockIO:
    """Threads that move records, in the order of `submit`, while somebody uses them."""

    def __init__(self, num_threads: int, /) -> None: ...
    def enter(self, user: int, /) -> None:
        """`user` uses the threads from now on; they start unless they run. Raises RuntimeError when
        not even one starts."""

    def leave(self, user: int, /) -> None:
        """`user` uses them no more: its moves have ended. The last one joins them. Idempotent."""

    @property
    def num_threads(self) -> int:
        """How many run."""

    def submit(self, move: Move, /) -> None: ...
    def cancel(self, move: Move, /) -> None:
        """End `move` unless a thread has it already."""

    def wait(self, move: Move, timeout_seconds: float, /) -> bool:
        """Whether `move` is done, after at most so long."""

def xxh3_128(address: int, num_bytes: int, /) -> bytes:
    """The checksum of a record in memory (for tests). Raises ValueError up to 240 bytes."""
