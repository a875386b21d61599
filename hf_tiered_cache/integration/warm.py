"""`warm`: put a text into a store before anybody asks for it (a system prompt, a document)."""

import os
from pathlib import Path
from typing import Any

import torch

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.store.block_store import BlockStore

CHUNK_TOKENS = 1024


@torch.no_grad()
def warm(
    store: BlockStore,
    model: Any,
    tokenizer: Any,
    text: str | os.PathLike[str],
    *,
    pin: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
    **knobs: Any,
) -> int:
    """Compute a text and put its full blocks into the store; the tokens that are there then.

    text: the text, or a file of it as a `Path`; a prompt that begins with it finds it, where the
    tokenizer cuts its end alike (whole lines are). What the store has of it already is not computed
    again. pin: keep it from being evicted, until `store.unpin`. knobs: of the cache that computes
    it, as `TieredCache` takes them. Raises ConfigError where the text is shorter than a block, or
    the model's layers cannot be stored.
    """
    content = Path(text).read_text() if isinstance(text, os.PathLike) else text
    ids = torch.tensor([tokenizer(content)["input_ids"]], device=model.device)
    with TieredCache(model.config, store=store, **knobs) as cache:
        cache.restore(ids, model)
        for first in range(cache.get_seq_length(), ids.shape[1], chunk_tokens):
            part = ids[:, first : first + chunk_tokens]
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.publish()
        store.flush()
        names = cache.block_names()
        if not names:
            raise ConfigError(
                f"a text of {ids.shape[1]} tokens gives no block to be stored: expected"
                f" {cache.stats().block_tokens} or more, and a model of full-attention layers"
            )
        space, keys = names
        found = store.find(space, keys)
        if pin and found:
            store.pin(space, found[-1].key)
        return sum(block.header.num_tokens for block in found)
