"""What differs between the versions of transformers that are supported (5.17 and newer)."""

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers 5.17: an empty linear layer stands for one without attention
    from transformers.cache_utils import LinearAttentionLayer

    class DummyLayer(LinearAttentionLayer):  # type: ignore[no-redef]
        """A layer that holds nothing."""

        is_croppable = True

        def crop(self, tokens_to_remove: int) -> None:
            """Nothing."""


try:
    from transformers.cache_utils import DynamicIndexedLayer
except ImportError:  # where no model has an indexer
    from transformers.cache_utils import DynamicLayer as DynamicIndexedLayer

__all__ = ["DummyLayer", "DynamicIndexedLayer"]
