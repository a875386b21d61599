"""How much of the machine a model's forwards use: floating-point operations, counted and possible.

What is possible is measured with matrices of the model's own shape, since a data sheet's figure
says nothing about a CPU, nor about the threads that this process has.
"""

from time import perf_counter

import torch
from transformers import PreTrainedModel

PROBE_ROUNDS = 3
MOST_PROBED = 4096  # rows and columns: a second's work for two cores, and large enough for a GPU


class ModelFlops:
    """Operations of a forward: two for each weight that a token passes, and for each of its queries
    and each key 4 x head_dim. Weights of experts that stay idle are counted too."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        embedded = model.get_input_embeddings().weight
        is_tied = model.get_output_embeddings() is not None and (
            model.get_output_embeddings().weight is embedded
        )
        weights = sum(it.numel() for it in model.parameters())
        self._per_token = 2 * (weights if is_tied else weights - embedded.numel())
        heads = getattr(config, "num_attention_heads", 0)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        self._per_pair = 4 * config.num_hidden_layers * heads * head_dim

    def count(self, num_tokens: int, past: int) -> int:
        """Of a forward with so many tokens behind `past` others, each attending those before it."""
        pairs = num_tokens * past + num_tokens * (num_tokens + 1) // 2
        return self._per_token * num_tokens + self._per_pair * pairs


def probe_flops(model: PreTrainedModel) -> float:
    """Operations per second of a matrix product in the model's dtype on its device."""
    size = min(MOST_PROBED, model.config.get_text_config().hidden_size)
    weight = torch.ones(size, size, dtype=model.dtype, device=model.device)
    rows = torch.ones(min(MOST_PROBED, 512), size, dtype=model.dtype, device=model.device)
    seconds = []
    for _ in range(PROBE_ROUNDS):
        began = perf_counter()
        torch.mm(rows, weight).sum().item()  # waits for the device
        seconds.append(perf_counter() - began)
    return 2 * rows.shape[0] * size * size / min(seconds)
