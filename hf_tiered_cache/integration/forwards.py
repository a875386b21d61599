"""Which forward is under way in this thread, and whether it ended well.

A cache hears from a model when a layer brings tokens, not when a forward begins, ends or fails, and
a failure in the last layer, or behind it, looks like success from there. So the call of a model is
watched: `watch` wraps `PreTrainedModel.__call__`, which every model of transformers inherits; the
outermost call of a thread is its forward. The hooks of torch do not serve: those of one module must
be there before its call begins, and those of all modules slow every module down.

Layers that come outside of such a call (a module of one's own, a test) are a forward as well, begun
by the first and ended when an earlier layer comes again: that it failed is known only of what
failed in the cache itself.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

DROPPED = (
    "transformers drops the given cache where this model's LongRoPE crosses "
    "original_max_position_embeddings={original} tokens, computes all tokens anew and goes on with "
    "a DynamicCache: right, but nothing is tiered any more. To keep the tiers, give the whole text "
    "at once, longer than {original} tokens, to a new TieredCache() made without config, and let "
    "no cache grow across that length"
)


class Settling(Protocol):
    """What is told when a forward that it took part in has ended."""

    def settle(self) -> None:
        """Keep what the forward did if it is good, else undo it. Idempotent."""


class Forward:
    """One forward of one thread. `is_good`: it went through, what it did to caches stays.

    `last_layer` and `last_tokens`: of one that is not watched, the layers that came last, with
    anything and with tokens.
    """

    __slots__ = (
        *("is_good", "last_layer", "last_tokens", "members"),
        *("_call", "_cross", "_has_ended", "_thread"),
    )

    def __init__(self, call: "_Call | None" = None) -> None:
        """call: lives as long as the call of the model; None: this forward is not watched."""
        self.is_good = False
        self.last_layer = self.last_tokens = -1
        self.members: list[Settling] = []
        self._call = None if call is None else weakref.ref(call)
        self._cross: tuple[EncoderDecoderCache, dict[int, bool]] | None = None
        self._has_ended = False
        self._thread = weakref.ref(threading.current_thread())

    @property
    def is_watched(self) -> bool:
        return self._call is not None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet. The call's own end is believed even where an interrupt
        kept it from telling."""
        return not self._has_ended and (self._call is None or self._call() is not None)

    @property
    def thread(self) -> threading.Thread | None:
        """The thread it runs in; None once that is gone."""
        return self._thread()

    def end(self, is_good: bool) -> None:
        """It ended: whoever took part keeps or undoes what it did."""
        self.is_good = is_good
        self._has_ended = True
        for member in self.members:
            with contextlib.suppress(Exception):  # what failed it is told; they try again when used
                member.settle()
        self.members.clear()

    def note_cross_attention(self, past: Any) -> None:
        """Remember which layers of an `EncoderDecoderCache` have their cross-attention states."""
        if isinstance(past, EncoderDecoderCache):
            self._cross = past, dict(past.is_updated)

    def forget_cross_attention(self, layers: list[Any]) -> None:
        """The states of the cross-attention cache that has these layers were undone."""
        if self._cross is not None and self._cross[0].cross_attention_cache.layers is layers:
            past, is_updated = self._cross
            past.is_updated.update(is_updated)


class _Call:
    """Lives in the frame of a watched call, and so exactly as long."""

    __slots__ = ("__weakref__",)


class _Here(threading.local):
    forward: Forward | None = None
    measured: weakref.ref[Any] | None = None  # the cache that `note_measured` was last told of


_here = _Here()
_original: Callable[..., Any] | None = None


def current() -> Forward | None:
    """The watched forward that is under way in this thread."""
    forward = _here.forward
    return forward if forward is not None and forward.is_running else None


def note_measured(cache: Any) -> None:
    """The length of `cache` was asked for outside of any forward, as `generate` does before one."""
    _here.measured = weakref.ref(cache)


def watch() -> None:
    """Watch the calls of transformers' models from now on. Idempotent."""
    global _original
    if _original is None:
        _original = PreTrainedModel.__call__
        PreTrainedModel.__call__ = _watched(_original)


def unwatch() -> None:
    """Put the models' own call back."""
    global _original
    if _original is not None:
        if "__call__" in vars(PreTrainedModel):
            del PreTrainedModel.__call__  # inherited from torch, as before
        _original = None


def _tell_if_dropped(
    config: Any, cache: Any, input_ids: Any = None, *rest: Any, **kwargs: Any
) -> None:
    """Warn if `generate` measured this cache and then left it behind: models of LongRoPE turn their
    keys differently when there are more tokens than `original_max_position_embeddings`."""
    original = getattr(config, "original_max_position_embeddings", None)
    ids = kwargs.get("inputs_embeds") if input_ids is None else input_ids
    if cache is None or original is None or ids is None or ids.shape[1] <= original:
        return
    if cache.get_seq_length() <= original:
        logger.warning_once(DROPPED.format(original=original))
    _here.measured = None


def _watched(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def watched_call(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or current() is not None:
            return call(model, *args, **kwargs)
        measured, _here.measured = _here.measured, None
        if measured is not None and kwargs.get("past_key_values") is None:
            _tell_if_dropped(model.config, measured(), *args, **kwargs)
        lifetime = _Call()
        forward = Forward(lifetime)
        is_good = False
        past = kwargs.get("past_key_values")
        before = getattr(past, "before_forward", None)
        note = None if before is None else before(model, args, kwargs)
        try:
            forward.note_cross_attention(past)
            _here.forward = forward
            outputs = call(model, *args, **kwargs)
            is_good = True
        finally:
            forward.end(is_good)
            _here.forward = None
        if note is not None:
            note()
        return outputs

    return watched_call
