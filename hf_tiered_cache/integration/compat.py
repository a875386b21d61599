"""What differs between the versions of transformers that are supported (5.17 and newer), and what
they do not hand on."""

import inspect
import sys
from typing import Any

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

__all__ = ["DummyLayer", "DynamicIndexedLayer", "streamer_of_generate"]


def streamer_of_generate() -> Any:
    """The streamer that the `generate` around this call was given, or None.

    transformers (5.17 to 5.23) tells a streamer of the prompt and then does not hand it to a
    `custom_generate` that is a function, so whoever reads from it would wait for ever.
    """
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals.get("streamer")
