"""Every exception of the package: when it comes and what to do about it.

All derive from `TieredCacheError`; each also derives from the built-in exception a caller would
expect, so `except ValueError` and `except OSError` keep working.
"""


class TieredCacheError(RuntimeError):
    """Base of everything this package raises on purpose."""


class ConfigError(TieredCacheError, ValueError):
    """A knob has an impossible or unknown value. Raised before anything is allocated."""


class UnsupportedInputError(TieredCacheError, ValueError):
    """A tensor has the wrong shape, dtype or device. Raised before anything is written."""


class OutOfBlocksError(TieredCacheError, MemoryError):
    """No tier has room for the next blocks, or a budget cannot hold the smallest working set.

    The message names the tier, what it holds, what was asked and the knob to raise. The cache is
    as it was before the call.
    """


class TierIOError(TieredCacheError, OSError):
    """A tier could not store or load a block, or what it loaded is not what was stored.

    The message names the file, the record and the remedy. Blocks that are elsewhere stay usable.
    """


class ClosedCacheError(TieredCacheError, ValueError):
    """The cache was used after `close()`; make a new one."""


class CacheInUseError(TieredCacheError):
    """A thread came to a cache while another one was in the middle of a forward with it, or asked
    for what it holds while it was drafting.

    Nothing of the newcomer was stored; the other one may go on.
    """


class TornCacheError(TieredCacheError):
    """What changes all layers at once (`crop`, reordering, `reset`) was interrupted between two.

    The cache answers nothing from then on, until it is `reset()`.
    """


class KernelUnavailableError(TieredCacheError, ImportError):
    """A kernel was forced that was not built or that this processor cannot run."""


class BackwardError(TieredCacheError):
    """A gradient was asked for through the cache, which stores detached keys and values."""


class TornBooksError(TieredCacheError):
    """Another thread was interrupted (Ctrl-C) while it changed what this one waited for. Nothing
    was changed here: call again."""


class BlockStateError(TieredCacheError, AssertionError):
    """An internal law of the block tables is broken: a bug of this package, please report it."""


def io_error(code: int | None, message: str) -> TierIOError:
    """A TierIOError with its `errno` set; printed as `[Errno 5] message`.

    Both are set by hand, because RuntimeError comes before OSError among the bases of TierIOError
    and does not know them.
    """
    error = TierIOError(message)
    error.errno = code
    error.strerror = message
    return error
