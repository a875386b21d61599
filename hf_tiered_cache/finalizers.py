"""What runs while Python takes an object away, where nobody can be told of an error."""

import _thread
import contextlib
import threading
from collections.abc import Callable

# An interrupt of a finalizer comes again so much later: Python must be out of it by then.
AGAIN_SECONDS = 0.02


def do_all(*steps: Callable[[], None]) -> None:
    """Do every step, each of which may be repeated. If one raises, as an interrupt does, all are
    done once more before it is passed on: whoever finalizes is not called again."""
    try:
        for step in steps:
            step()
    except BaseException:
        for step in steps:
            step()
        raise


def in_finalizer(close: Callable[..., None], *arguments: object) -> None:
    """Close something from a finalizer, where Python swallows whatever is raised: Ctrl-C in there
    comes again a moment later, in the main thread."""
    try:
        close(*arguments)
    except KeyboardInterrupt:
        with contextlib.suppress(RuntimeError):  # no thread at interpreter exit: it ends anyway
            threading.Timer(AGAIN_SECONDS, _thread.interrupt_main).start()
