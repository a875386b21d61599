"""Tiny random models on any device, and budgets that make them stream."""

import copy
import re
from typing import Any

import pytest
import torch
from test_generate_parity import tiny_model
from transformers import Cache

from hf_tiered_cache.errors import OutOfBlocksError

BLOCK_BYTES = 4096  # of the smallest block: float32, 2 heads of 8, 4 tokens, padded
PROMPT, NEW = 150, 12  # tokens; with blocks of 4, more than two groups of them


def model_on(device: torch.device, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a tiny model whose tokens depend on its attention."""
    return copy.deepcopy(tiny_model(family)).to(device, dtype)


def prompt_on(device: torch.device, num_tokens: int = PROMPT, batch: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randint(2, 97, (batch, num_tokens), generator=random).to(device)


def generate(
    model: Any, cache: Cache, ids: torch.Tensor, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits of every new token), on the CPU, of one greedy `generate`."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    return out.sequences.cpu(), torch.stack(out.logits, 1).cpu()


def least_bytes(make_cache: Any, model: Any, ids: torch.Tensor, **knobs: Any) -> int:
    """The smallest device budget that works, as the error for a smaller one says."""
    with pytest.raises(OutOfBlocksError, match="smallest device_bytes that works") as raised:
        generate(model, make_cache(model.config, 1, **knobs), ids)
    found = re.search(r"that works is (\d+)", str(raised.value))
    assert found, raised.value
    return int(found[1])
