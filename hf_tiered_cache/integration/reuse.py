"""`reuse`: every `generate` of a model begins with what a store has of its prompt, and leaves its
full blocks there.

`generate` of the one model is wrapped, on the object and not on its class: pipelines, PEFT models
and servers call it. It gets a cache where none was given, the prompt's prefix is restored before it
begins, and what it computed is published while it goes on. Where reuse could not be right (padding,
embeddings, rows that differ, caches of another kind) it is bypassed: counted in `store.stats()` and
told once.
"""

import functools
import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hf_tiered_cache.errors import ConfigError, TierIOError, UnsupportedInputError
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.integration.stored_prefix import why_not_stored
from hf_tiered_cache.integration.token_record import named_arguments
from hf_tiered_cache.store.block_store import BlockStore

# A prompt whose restored blocks cannot be read is begun anew: once with what is left of them, then
# with nothing.
ATTEMPTS = 3


class Reuse:
    """`model.generate` with a store, until `detach()` or the end of the `with` block.

    knobs: of the caches it makes, as `TieredCache` takes them. Raises ConfigError where the model
    cannot be served.
    """

    def __init__(self, model: torch.nn.Module, store: BlockStore, **knobs: Any) -> None:
        base: Any = model
        if hasattr(model, "get_base_model"):
            base = model.get_base_model()  # type: ignore[operator]
        if not isinstance(base, PreTrainedModel):
            raise ConfigError(
                f"reuse(model={type(model).__name__}): expected a model of transformers, or a PEFT"
                " model around one"
            )
        if not isinstance(store, BlockStore):
            raise ConfigError(f"reuse(store={store!r}): expected a BlockStore")
        if isinstance(vars(base).get("generate"), _Reusing):
            raise ConfigError("reuse() of a model that reuses a store already: detach() that first")
        with TieredCache(base.config, store=store, **knobs) as cache:  # wrong knobs are said now
            self._why_not = why_not_stored(cache.layers)
        self.model = base
        self.store = store
        self._knobs = knobs
        self._generate = base.generate
        self._had = vars(base).get("generate")
        base.generate = _Reusing(self)

    def detach(self) -> None:
        """Let the model generate as before. Idempotent."""
        attached = vars(self.model).get("generate")
        if isinstance(attached, _Reusing) and attached.reuse is self:
            if self._had is None:
                del self.model.generate
            else:
                self.model.generate = self._had

    def __enter__(self) -> "Reuse":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with the store."""
        call = _Call(self.model, self._generate, args, kwargs)
        given = call.kwargs.get("past_key_values")
        if given is not None and not self._is_ours(given):
            self.store.bypass("generate() is given a cache of another kind, or of no store")
            return self._generate(*args, **kwargs)
        if given is None and (why := self._why_not or call.why_no_cache()):
            self.store.bypass(why)
            return self._generate(*args, **kwargs)
        if given is not None and given.get_seq_length():  # it cannot be begun anew
            return self._run(call, given)
        for attempt in range(1, ATTEMPTS + 1):
            cache = given
            if cache is None:
                cache = TieredCache(self.model.config, store=self.store, **self._knobs)
            try:
                return self._run(call, cache, attempt < ATTEMPTS)
            except TierIOError as error:
                # Nothing was returned yet, but a streamer may have been told.
                is_ours = cache.restored_tokens > 0 and attempt < ATTEMPTS
                if self.store.on_load_failure == "raise" or not (is_ours and call.may_repeat()):
                    raise
                self.store.note_recompute(error)
                cache.reset()
        raise AssertionError("the last attempt restores nothing")

    def _is_ours(self, cache: Any) -> bool:
        return isinstance(cache, TieredCache) and cache.store is self.store

    def _run(self, call: "_Call", cache: TieredCache, may_restore: bool = True) -> Any:
        if may_restore and cache.get_seq_length() == 0:
            self._restore(call, cache)
        with cache.publishing():
            return call.run(cache)

    def _restore(self, call: "_Call", cache: TieredCache) -> None:
        prompt, why = call.prompt()
        if prompt is None:
            self.store.bypass(why)
            return
        try:
            cache.restore(prompt, self.model)
        except UnsupportedInputError:  # rows that differ
            self.store.bypass("the rows of a batch differ")


def reuse(model: torch.nn.Module, store: BlockStore, **knobs: Any) -> Reuse:
    """Let every `model.generate` begin with what `store` has of its prompt, and leave its full
    blocks there; see `Reuse`.

        with reuse(model, store):
            model.generate(**inputs)

    knobs: of the caches it makes, as `TieredCache` takes them (device_bytes, disk_bytes, ...).
    """
    return Reuse(model, store, **knobs)


class _Reusing:
    """Stands for `generate` of one model."""

    def __init__(self, reuse: Reuse) -> None:
        self.reuse = reuse
        functools.update_wrapper(self, reuse._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reuse.generate(*args, **kwargs)


# Arguments of `generate` itself that change what is chosen, not what is cached of the prompt; what
# has another name is the model's.
_PLAIN = (
    inspect.signature(GenerationMixin.generate).parameters.keys()
    | vars(GenerationConfig()).keys()
    | {"input_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep"}
) - {"kwargs", "negative_prompt_ids", "negative_prompt_attention_mask"}


def _is_harmless(name: str, value: Any) -> bool:
    return name in _PLAIN or value is None or isinstance(value, bool | int | float)


class _Call:
    """One call of `generate` and what can be known of it before it begins."""

    def __init__(
        self, model: PreTrainedModel, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._model = model
        self._generate = generate
        self.kwargs = named_arguments(generate, args, kwargs)
        self._told: _Told | None = None
        if self.kwargs.get("streamer") is not None:
            self._told = self.kwargs["streamer"] = _Told(self.kwargs["streamer"])

    def run(self, cache: TieredCache) -> Any:
        """Generate with that cache."""
        return self._generate(**{**self.kwargs, "past_key_values": cache})

    def may_repeat(self) -> bool:
        """Whether nobody would notice if it began anew."""
        return self._told is None or self._told.begin_anew()

    def _option(self, name: str) -> Any:
        """What was asked for, by argument or config."""
        if name in self.kwargs:
            return self.kwargs[name]
        config = self.kwargs.get("generation_config") or self._model.generation_config
        return getattr(config, name, None)

    def why_no_cache(self) -> str:
        """Why it cannot be given a cache; empty where it can."""
        if self._model.config.is_encoder_decoder:
            return "the model is an encoder-decoder"
        if self._option("use_cache") is False:
            return "use_cache=False"
        if self._option("cache_implementation") not in (None, "dynamic"):
            return f"cache_implementation={self._option('cache_implementation')!r} is asked for"
        if self.kwargs.get("custom_generate") is not None:
            return "custom_generate is given"
        return ""

    def prompt(self) -> tuple[torch.Tensor | None, str]:
        """(the prompt's ids as the cache will hold them, "") or (None, why they have no name)."""
        ids = self.kwargs.get("inputs")
        ids = self.kwargs.get("input_ids") if ids is None else ids
        if self.kwargs.get("inputs_embeds") is not None or not isinstance(ids, torch.Tensor):
            return None, "embeddings were given in place of ids"
        if ids.dim() != 2 or ids.is_floating_point():
            return None, f"ids of shape {list(ids.shape)} and {ids.dtype}"
        mask = self.kwargs.get("attention_mask")
        if mask is None:
            pad = self._option("pad_token_id")
            if pad is not None and bool((ids == pad).any()):
                return None, "the prompt has pad tokens and no mask"  # generate makes one
        elif mask.dim() != 2 or not bool(mask.all()):
            return None, "the batch is padded"
        others = [name for name, value in self.kwargs.items() if not _is_harmless(name, value)]
        if others:
            return None, f"{', '.join(sorted(others))} came with the ids"
        if (self._option("guidance_scale") or 1) != 1:
            return None, "guidance runs a second sequence through the model"
        num_copies = max(self._option("num_beams") or 1, self._option("num_return_sequences") or 1)
        return ids.repeat_interleave(num_copies, 0), ""


class _Told:
    """A streamer that is told nothing twice when `generate` begins anew."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._num_told = self._num_now = 0

    def begin_anew(self) -> bool:
        """What comes next was told already, if that was but the prompt; else False."""
        self._num_now = 0
        return self._num_told <= 1

    def put(self, value: torch.Tensor) -> None:
        """See the streamers of transformers."""
        self._num_now += 1
        if self._num_now > self._num_told:
            self._num_told = self._num_now
            self._streamer.put(value)

    def end(self) -> None:
        """See the streamers of transformers."""
        self._streamer.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)
