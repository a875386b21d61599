"""What of a cache is not kept in blocks: transformers' own layers, and linear states.

Windows and linear states are small and stay so; layers with an indexer grow with every token, and
no budget holds them. All of it is counted and shown.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from hf_tiered_cache.integration.cache_layers import TieredLayer
from hf_tiered_cache.integration.compat import DummyLayer

logger = logging.get_logger(__name__)


class Untiered(NamedTuple):
    """Layers of transformers that hold something: how many, the tokens of the longest one (of a
    window those seen), and all bytes that lie in no block."""

    num_layers: int
    num_tokens: int
    num_bytes: int


def measure(layers: Iterable[Any]) -> Untiered:
    """What these layers of a cache hold that is not kept in blocks."""
    sizes = {layer: sum(map(_bytes, _states(layer))) for layer in layers}
    own = [one for one, size in sizes.items() if size and not isinstance(one, TieredLayer)]
    tokens = [one.get_seq_length() for one in own if isinstance(one, DynamicLayer)]
    return Untiered(len(own), max(tokens, default=0), sum(sizes.values()))


def warn_of_growing(layers: Iterable[Any]) -> None:
    """Tell once that no budget holds what grows with every token and is not kept in blocks."""
    growing = [
        type(layer).__name__
        for layer in layers
        if isinstance(layer, DynamicLayer)
        and not isinstance(layer, TieredLayer)
        and not layer.is_sliding
    ]
    if growing:
        logger.warning_once(
            f"{len(growing)} layers of this model keep keys and values in transformers' own "
            f"{growing[0]}, on the device, growing with every token: device_bytes, host_bytes and "
            "disk_bytes do not hold for them, and nothing of them is offloaded. The tokens are "
            "right; print(cache) shows the bytes. To bound them, shorten the sequence"
        )


def _states(layer: Any) -> list[Any]:
    if isinstance(layer, DummyLayer):
        return []
    own = TieredLayer.ATTRIBUTES if isinstance(layer, TieredLayer) else frozenset()
    return [value for name, value in vars(layer).items() if name not in own]


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.dim() else 0  # else a number about the layer
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
