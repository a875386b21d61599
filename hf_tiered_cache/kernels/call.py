"""`AttentionCall`: what a kernel must know of a call besides its query and its blocks.

The Python side of `AttentionParams` in csrc/paged_attention.h. Made once per layer and handed on
whole, to whatever attends some of the blocks. Every kernel names the facts that it knows; a call
with another one is refused or goes to a kernel that knows it, so a fact that is new here is
nowhere passed over in silence.
"""

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from hf_tiered_cache.errors import UnsupportedInputError


class AttentionCall(NamedTuple):
    """Which positions are attended and how they are scored; all restrictions hold together.

    A fact that is None is not given. Tensors are on the query's device. Values are checked where
    the call meets its query and blocks, in `ops`.
    """

    kv_tokens: int  # positions from here on do not exist
    query_start: int  # position of query 0; the others follow it
    scale: float  # of the products of queries and keys
    causal: bool = True  # a query attends positions up to its own
    starts: Tensor | None = None  # int32 [batch]: first attended positions (left padding)
    # bool [batch|1, heads|1, queries|1, >= kv_tokens], by absolute position, True = attend
    mask: Tensor | None = None
    bias: Tensor | None = None  # float, added to the scores; indexed as the mask
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    # [heads]: one more score per head that has no value; the log-sum-exp counts it. Folding blocks
    # into a running state leaves it to `ops.finish_attention`.
    sinks: Tensor | None = None
    # True: blocks of some positions are not shown, and so not attended. To those who take every
    # view by its own first position it makes no difference.
    has_gaps: bool | None = None

    def beyond(self, known: frozenset[str]) -> list[str]:
        """Names of the facts given that are not among `known`."""
        kind: Any = type(self)  # mypy takes the class of a named tuple for unhashable
        found = []  # filled by a loop: asked for every layer and token, and mostly empty
        for name in _others(kind, known):
            if getattr(self, name) is not None:
                found.append(name)
        return found

    def check_known(self, known: frozenset[str], who: str) -> None:
        """Raise UnsupportedInputError if a fact is given that is not among `known`, those of the
        kernel that is called `who`."""
        if unknown := self.beyond(known):
            raise UnsupportedInputError(
                f"attention call for {who}: got {', '.join(unknown)}, expected nothing beyond "
                f"{', '.join(sorted(known))}"
            )


@cache
def _others(kind: Any, known: frozenset[str]) -> tuple[str, ...]:
    return tuple(name for name in kind._fields if name not in known)
