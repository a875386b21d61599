"""A window of text through a cache: what every token was given, and how far another cache's logits
are from that.

A window's first tokens are prefilled by chunks, its last ones go one by one, and a greedy
continuation follows, so that the prefill and the decode kernel both are what is measured. The
first pass keeps its logits, the passes after it are compared with them row by row. Which passes
there are says `passes.py`.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import Cache, PreTrainedModel

from hf_tiered_cache.blocks.assembly import MIN_STAGING_BLOCKS, STAGING_BYTES, STAGING_SHARE
from hf_tiered_cache.config import disk_directory, free_disk_bytes
from hf_tiered_cache.evaluation.documents import DataError, Document
from hf_tiered_cache.evaluation.models import check_has_full_attention
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.sizes import AUTO, format_bytes

REFERENCE, NOISE, TIERED = "DynamicCache", "DynamicCache, noise", "TieredCache"
MIN_BLOCK_TOKENS = 16
ROWS_AT_ONCE = 128  # of the logits, in float64
ROUNDINGS_OF_A_FLIP = 2


def uncounted(num_tokens: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Window:
    """Tokens that are measured together. ids: [1, context]."""

    document: str
    # of the first token in its document
    start: int
    ids: torch.Tensor
    # tokens before it were scored by the window before
    first_scored: int
    # of the text of the scored tokens
    num_bytes: int

    @property
    def context(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True)
class Plan:
    """How a window goes through a cache; counts of tokens."""

    chunk: int  # in one prefill forward
    decode_tokens: int  # the window's last, one by one
    new_tokens: int  # of the greedy continuation


@dataclass(frozen=True)
class Flip:
    """A place where two passes find another token the likeliest."""

    position: int
    # in the first pass, between its own choice and the other pass's
    margin: float
    # of the dtype, of the largest logit there: finfo.eps times it
    rounding: float

    @property
    def roundings(self) -> float:
        """The margin in roundings: up to ROUNDINGS_OF_A_FLIP rounded logits alone explain it. It
        stands between two logits, and each may come out one rounding apart in two passes (half of
        one off in either)."""
        is_number = self.rounding > 0 and math.isfinite(self.margin)
        return self.margin / self.rounding if is_number else math.inf


@dataclass
class Pass:
    """What one window gave with one cache."""

    cache: str  # REFERENCE, NOISE or TIERED
    share: float | None  # asked to be off the device
    attention: str = ""  # transformers' name of the implementation
    document: str = ""
    context: int = 0
    start: int = 0
    first_scored: int = 1
    num_bytes: int = 0
    # natural log, float64, of each scored token
    log_likelihoods: np.ndarray = field(default_factory=lambda: np.empty(0))
    # the likeliest token behind each of the window's tokens but the last
    guesses: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    continuation: list[int] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    # of the bits of all logits up to the continuation
    digest: str = ""
    max_delta_logit: float = 0.0
    compared_rows: int = 0
    flips: list[Flip] = field(default_factory=list)
    off_device: float = 0.0  # share of the blocks with no copy on the device, at the end
    block_tokens: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str, int]:
        return self.context, self.document, self.start

    @property
    def parting(self) -> Flip | None:
        """Where the continuation left that of the first pass."""
        return next((flip for flip in self.flips if flip.position >= self.context - 1), None)


def num_tokens(window: Window, plan: Plan) -> int:
    """Tokens that go through the model in one pass."""
    return window.context + max(0, plan.new_tokens - 1)


def make_windows(
    document: Document, tokenizer: Any, context: int, stride: int | None, limit: int
) -> Iterator[Window]:
    """Yield windows of `context` tokens, every token scored once.

    Without a stride, one window from the document's first token on: with a cache every token is
    scored with everything before it. With one, windows begin every `stride` tokens and score what
    the window before did not reach, its last `stride` tokens, as in the guide of transformers
    (https://huggingface.co/docs/transformers/perplexity).
    """
    last = len(document.ids) - context
    starts = range(0, last + 1, stride) if stride else range(1)
    for start in starts[:limit]:
        ids = document.ids[start : start + context]
        first_scored = context - stride if stride and start else 1
        num_bytes = len(tokenizer.decode(ids[first_scored:]).encode())
        yield Window(document.name, start, ids[None], first_scored, num_bytes)


class Reference:
    """Logits `[rows, vocabulary]` of a pass in a file that has no name: they may not fit in RAM.

    folder: where; default: that of the disk tier.
    """

    def __init__(self, num_rows: int, folder: str | None = None) -> None:
        self._num_rows, self._folder = num_rows, disk_directory(folder)
        self._logits: torch.Tensor | None = None

    def keep(self, first: int, logits: torch.Tensor) -> None:
        """Store the rows from `first` on. Raises DataError where there is no space for all."""
        if self._logits is None:
            size = self._num_rows * logits.shape[1]
            needed, free = size * logits.itemsize, free_disk_bytes(self._folder)
            if needed > free:  # written through memory: a full disk would end the process
                raise DataError(
                    f"the logits of {self._num_rows:,} tokens take {format_bytes(needed)}, but "
                    f"{self._folder} has {format_bytes(free)} free: give a smaller context or "
                    "another --disk-dir"
                )
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                self._logits = torch.from_file(
                    file.name, shared=True, size=size, dtype=logits.dtype
                ).view(self._num_rows, -1)
        self._logits[first : first + len(logits)] = logits

    def compare(self, first: int, logits: torch.Tensor, found: Pass) -> None:
        """Add to `found` how far the rows from `first` on are from those that were kept."""
        assert self._logits is not None
        kept = self._logits[first : first + len(logits)].double()
        ours = logits.double()
        delta = (ours - kept).abs().max().item()
        # NaN would lose against any number.
        found.max_delta_logit = (
            max(found.max_delta_logit, delta) if math.isfinite(delta) else math.inf
        )
        found.compared_rows += len(logits)
        chosen = ours.argmax(-1)
        top, expected = kept.max(-1)
        eps = torch.finfo(logits.dtype).eps
        for row in (chosen != expected).nonzero()[:, 0].tolist():
            margin = (top[row] - kept[row, chosen[row]]).item()
            found.flips.append(Flip(first + row, margin, eps * top[row].abs().item()))


@torch.no_grad()
def run_window(
    model: PreTrainedModel,
    cache: Cache,
    window: Window,
    plan: Plan,
    reference: Reference,
    found: Pass,
    on_tokens: Callable[[int], None] = uncounted,
) -> Pass:
    """Put a window and its continuation through a cache; fill in and return `found`.

    The first pass of a window is kept in `reference`, and later ones are compared with it up to
    the first token at which the continuations part.
    """
    found.document, found.context, found.start = window.document, window.context, window.start
    found.first_scored, found.num_bytes = window.first_scored, window.num_bytes
    is_first = reference._logits is None
    ids, context = window.ids.to(model.device), window.context
    prefilled = context - plan.decode_tokens
    digest = xxhash.xxh3_128()
    likelihoods, guesses = [], []

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        start = perf_counter()
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0]
        if logits.is_cuda:
            torch.cuda.synchronize()
        seconds = perf_counter() - start
        if tokens.shape[1] > 1:
            found.prefill_tokens += tokens.shape[1]
            found.prefill_seconds += seconds
        else:
            found.decode_tokens += 1
            found.decode_seconds += seconds
        on_tokens(tokens.shape[1])
        return logits.cpu()

    def note(first: int, logits: torch.Tensor) -> None:
        if is_first:
            reference.keep(first, logits)
        else:
            reference.compare(first, logits, found)

    chunks = [
        (first, min(first + plan.chunk, prefilled)) for first in range(0, prefilled, plan.chunk)
    ]
    for first, last in [*chunks, *((i, i + 1) for i in range(prefilled, context))]:
        logits = forward(ids[:, first:last])
        digest.update(logits.contiguous().view(torch.uint8).numpy().data)
        for row in range(0, last - first, ROWS_AT_ONCE):
            rows = logits[row : row + ROWS_AT_ONCE]
            note(first + row, rows)
            targets = window.ids[0, first + row + 1 : first + row + 1 + len(rows)]
            log_probabilities = rows[: len(targets)].double().log_softmax(-1)
            likelihoods.append(log_probabilities.gather(1, targets[:, None])[:, 0])
            guesses.append(rows[: len(targets)].argmax(-1))
    for step in range(plan.new_tokens):
        token = logits[-1:].argmax(-1)
        found.continuation.append(int(token))
        if step + 1 == plan.new_tokens:
            break
        logits = forward(token[None].to(model.device))
        if not any(flip.position >= context - 1 for flip in found.flips):
            note(context + step, logits)
    found.digest = digest.hexdigest()
    # Row r is about token r + 1.
    found.log_likelihoods = torch.cat(likelihoods)[window.first_scored - 1 :].numpy()
    found.guesses = torch.cat(guesses).numpy()
    return found


@dataclass(frozen=True)
class BlockShape:
    """How a model's keys and values lie in blocks."""

    block_tokens: int
    block_bytes: int
    num_layers: int
    packing: str = AUTO  # of those on disk

    def num_blocks(self, num_tokens: int) -> int:
        return self.num_layers * math.ceil(num_tokens / self.block_tokens)

    def budgets(self, num_tokens: int, share: float, num_forks: int = 0) -> dict[str, Any]:
        """Arguments for a TieredCache that keeps all but `share` of the blocks on the device.

        At least a block per layer, the one being filled, stays there; and one more for each of
        `num_forks` deep copies. Everything resident goes without a disk.
        """
        blocks = self.num_blocks(num_tokens)
        resident = (
            max(blocks - round(share * blocks), self.num_layers) + num_forks * self.num_layers
        )
        resident *= self.block_bytes
        staging = min(STAGING_BYTES, resident * STAGING_SHARE / (1 - STAGING_SHARE))
        staging = max(math.ceil(staging), MIN_STAGING_BLOCKS * self.block_bytes)
        return {
            "block_tokens": self.block_tokens,
            "device_bytes": resident + staging,
            "disk_bytes": 2 * blocks * self.block_bytes + (64 << 20) if share else 0,
            "packing": self.packing,
        }


@torch.no_grad()
def block_shape(
    model: PreTrainedModel, block_tokens: int | None, disk_dir: str | None
) -> BlockShape:
    """Ask a cache that holds a few tokens. Raises ModelError where no layer is kept in blocks."""
    check_has_full_attention(model)
    with TieredCache(config=model.config, block_tokens=block_tokens, disk_dir=disk_dir) as cache:
        for tokens in (4, 1):  # also the first, slow forward of either kind
            model(
                torch.zeros(1, tokens, dtype=torch.long, device=model.device), past_key_values=cache
            )
        stats = cache.stats()
    return BlockShape(stats.block_tokens, stats.block_bytes, stats.num_layers)


def fitting_shape(
    model: PreTrainedModel,
    context: int,
    share: float,
    block_tokens: int | None = None,
    disk_dir: str | None = None,
) -> BlockShape:
    """The shape of the blocks; smaller ones than usual where a context is short.

    Each layer's filling block stays on the device, so that at the usual size `context` tokens
    might not get `share` off it. block_tokens: asked for by the user, taken as it is.
    """
    shape = block_shape(model, block_tokens, disk_dir)
    if block_tokens:
        return shape
    most = context * (1 - share)
    fitting = max(MIN_BLOCK_TOKENS, 2 ** math.floor(math.log2(max(1.0, most))))
    if fitting < shape.block_tokens:
        return block_shape(model, fitting, disk_dir)
    return shape
