"""`Savepoint`: what a cache was before a forward, and the way back to it."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_tiered_cache.integration.cache_layers import OwnedTables, Saved, TieredLayer
from hf_tiered_cache.integration.compat import DynamicIndexedLayer
from hf_tiered_cache.integration.forwards import Forward
from hf_tiered_cache.integration.paged_states import ModelIdentity

# Of transformers' layers, those that never write into a tensor they hold: they make another one.
REPLACING = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


class Savepoint:
    """The state of every layer of a cache at one moment.

    Blocks are immutable but for the filling one, which only grows: of a tiered layer the number of
    its tokens says it all, and its table, which is kept where another one takes its place. Of
    transformers' own layers the attributes are kept; linear states are copied, for models write
    into them in place.
    """

    def __init__(self, layers: list[Any], owned: OwnedTables) -> None:
        self._list = layers
        self._owned = owned
        self._model = ModelIdentity(owned.model)
        self._layers = [(layer, _saved(layer)) for layer in layers]

    def restore(self, forward: Forward) -> None:
        """Put every layer back; those that came later go. Repeatable."""
        saved = {id(layer) for layer, _ in self._layers}
        tables = {state.table for _, (state, _) in self._layers if state is not None}
        for layer in self._list:
            if isinstance(layer, TieredLayer) and id(layer) not in saved:
                layer.drop_blocks(except_for=tables)
        for layer, (tokens, attributes) in self._layers:
            if tokens is not None:
                layer.restore(tokens)
            if attributes is not None:
                later = vars(layer).keys() - attributes.keys() - TieredLayer.ATTRIBUTES
                for name in later if tokens is not None else vars(layer).keys() - attributes.keys():
                    delattr(layer, name)
                vars(layer).update(attributes)
        self._list[:] = [layer for layer, _ in self._layers]
        self._owned.model = self._model
        forward.forget_cross_attention(self._list)


def _saved(layer: Any) -> tuple[Saved | None, dict[str, Any] | None]:
    """(what `TieredLayer.restore` takes, the attributes to be put back); None where not needed."""
    if type(layer) is TieredLayer:
        return layer.saved(), None
    if isinstance(layer, TieredLayer):
        own = TieredLayer.ATTRIBUTES
        states = {name: _copied(it) for name, it in vars(layer).items() if name not in own}
        return layer.saved(), states
    if type(layer) in REPLACING:
        return None, dict(vars(layer))
    return None, {name: _copied(value) for name, value in vars(layer).items()}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value
