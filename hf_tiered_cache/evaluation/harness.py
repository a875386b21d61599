"""`hf-tiered`: lm-evaluation-harness scores and generates through a `TieredCache`.

    python -m hf_tiered_cache.evaluation.harness run --model hf-tiered \\
        --model_args pretrained=MODEL,device_bytes=512MiB,disk_bytes=20GiB --tasks ...

The harness's own model attends a whole request at once, without a cache, and keeps the logits of
every token. Here a request is prefilled chunk by chunk, logits are kept where they are scored, so
that a request may be as long as the tiers hold, and what the next request shares with it (the
context of several choices) is not read again. To import this module registers the model;
running it, as above, does so and is the harness's own command line.
"""

from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from hf_tiered_cache.config import TieredCacheConfig
from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.integration.cache import TieredCache

KNOBS = frozenset(field.name for field in fields(TieredCacheConfig))


@register_model("hf-tiered")
class TieredHFLM(HFLM):
    """`HFLM` of a causal model through a `TieredCache`; of a batch of requests, through a new one.

    chunk: tokens of one prefill forward. Arguments that `TieredCache` knows (device_bytes,
    disk_bytes, ...) are its knobs, all others `HFLM`'s. Raises UnsupportedInputError for an
    encoder-decoder model.
    """

    def __init__(self, *args: Any, chunk: int = 1024, **kwargs: Any) -> None:
        self._knobs = {name: kwargs.pop(name) for name in KNOBS & kwargs.keys()}
        self._chunk = int(chunk)
        self._num_scored = 0
        self._cache: TieredCache | None = None  # of the last request, whose ids these are
        self._ids: list[int] = []
        super().__init__(*args, **kwargs)
        if self.backend != "causal":
            raise UnsupportedInputError(
                f"hf-tiered with {type(self.model).__name__}: expected a causal model; score this "
                "one with --model hf"
            )

    def _new_cache(self) -> TieredCache:
        return TieredCache(self.config, **self._knobs)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._num_scored = max((len(continuation) for *_, continuation in requests), default=0)
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._cache is not None:
            self._cache.close()
        self._cache, self._ids = None, []

    def _cache_with(self, ids: list[int], most: int) -> tuple[TieredCache, int]:
        """A cache that holds the first tokens of a request, `most` of them at most, and how many:
        the last request's, where it can be cut to what both have in common."""
        pairs = zip(ids[:most], self._ids, strict=False)
        num_held = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if num_held is None:
            num_held = min(most, len(self._ids))
        if self._cache is None or not num_held or not self._cache.is_croppable:
            self._forget()
            return self._new_cache(), 0
        self._cache.crop(num_held - len(self._ids))
        return self._cache, num_held

    def _model_call(
        self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None
    ) -> torch.Tensor:
        """Logits `[batch, tokens, vocabulary]` of the last tokens of `inps` `[batch, all tokens]`,
        of as many as any request scores; of all in a batch, whose shorter rows end in padding.
        (The harness counts them from the end.)"""
        batch, num_tokens = inps.shape
        num_kept = min(self._num_scored or num_tokens, num_tokens) if batch == 1 else num_tokens
        ids = inps[0].tolist() if batch == 1 else []
        cache, num_held = self._cache_with(ids, num_tokens - num_kept)
        kept = []
        device, dtype = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            for first in range(num_held, num_tokens, self._chunk):
                chunk = inps[:, first : first + self._chunk]
                num_here = first + chunk.shape[1] - (num_tokens - num_kept)
                logits = self.model(
                    chunk,
                    past_key_values=cache,
                    logits_to_keep=min(max(1, num_here), chunk.shape[1]),
                ).logits
                if num_here > 0:
                    kept.append(logits)
        self._cache, self._ids = cache, ids
        return torch.cat(kept, 1)

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._new_cache() as cache:
            return super()._model_generate(
                *args, past_key_values=cache, prefill_chunk_size=self._chunk, **kwargs
            )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
