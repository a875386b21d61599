"""`generate` of transformers with a parked cache, a forward at a time.

`TieredGenerateManager` is transformers' `GenerateManager`, whose calls of `model.generate` reach a
`Generation` instead: it finds the cache that holds most of the prompt, lets `generate` of the model
feed the rest, and parks the cache afterwards, whatever ended it.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from fastapi import HTTPException
from transformers import PreTrainedModel
from transformers.cli.serving.utils import GenerateManager, _GenerationCancelled
from transformers.generation import GenerationMode
from transformers.utils import logging

from hf_tiered_cache.errors import OutOfBlocksError, TierIOError
from hf_tiered_cache.observe.metrics import span
from hf_tiered_cache.serving import mistakes, turns
from hf_tiered_cache.serving.conversations import Conversations
from hf_tiered_cache.serving.instruments import Instruments
from hf_tiered_cache.serving.requests import Failure, Request, current_request
from hf_tiered_cache.serving.utilisation import ModelFlops

logger = logging.get_logger(__name__)


# What `generate` is given for text; whatever else comes (pictures, sound) is in no token, so that
# tokens do not tell what a cache holds.
FOR_TEXT = {
    *("input_ids", "attention_mask", "generation_config", "tokenizer", "streamer"),
    "generation_mode",
}

# Others feed the whole prompt again, or several rows, whatever the cache holds.
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class GenerationFailedError(RuntimeError):
    """Said to the client; the message is safe inside a JSON string, where transformers puts it."""


class TieredGenerateManager(GenerateManager):
    """transformers' manager over a `TurnThread` and parked conversations.

    chunk: prompt tokens per forward, and so for how long others may have to wait.
    """

    def __init__(
        self,
        thread: turns.TurnThread,
        conversations: Conversations,
        instruments: Instruments,
        flops: ModelFlops,
        chunk: int,
    ) -> None:
        self._thread = thread
        self._flops = flops
        self._conversations = conversations
        self._instruments = instruments
        self._chunk = chunk

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' own; its queue and streamer."""
        generation = self._begin(model, inputs, gen_config)
        return super().generate_streaming(
            generation, processor, inputs, gen_config, *args, **kwargs
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' own; (text, prompt tokens, generated ids)."""
        generation = self._begin(model, inputs, gen_config)
        return await super().generate_non_streaming(
            generation, processor, inputs, gen_config, *args, **kwargs
        )

    def stop(self) -> None:
        """End the thread."""
        self._thread.stop()

    def _begin(self, model: PreTrainedModel, inputs: Any, gen_config: Any) -> "Generation":
        """A generation for the current request. Raises HTTPException for a prompt that is empty or
        that the model was not made for, options that are none, or a way of decoding that cannot
        begin with a cache that holds the prompt; what it may add is cut to the positions that are
        left."""
        request = current_request.get(None) or Request()
        request.prompt_tokens = prompt = inputs["input_ids"].shape[-1]
        if not prompt:
            raise HTTPException(400, "the prompt is empty: expected one token at least")
        mistakes.check_config(gen_config)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            if prompt >= limit:
                raise HTTPException(
                    400, f"the prompt has {prompt} tokens; the model was made for {limit} in all"
                )
            if gen_config.max_new_tokens is not None:
                gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - prompt)
        mode = gen_config.get_generation_mode()
        if mode not in MODES or (gen_config.num_return_sequences or 1) != 1:
            raise HTTPException(400, f"{mode.value}: expected one sequence, greedy or sampled")
        gen_config.use_cache, gen_config.cache_implementation = True, None  # it has a cache
        gen_config.prefill_chunk_size = None  # see `_feed`
        parts = self._conversations, self._instruments, self._flops
        return Generation(model, request, *parts, self._chunk)


class Generation:
    """What transformers takes for the model: one call of `generate`, for one request."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: Request,
        conversations: Conversations,
        instruments: Instruments,
        flops: ModelFlops,
        chunk: int,
    ) -> None:
        self._model = model
        self._flops = flops
        self._request = request
        self._conversations = conversations
        self._instruments = instruments
        self._chunk = chunk
        self._ids: list[int] = []  # that the cache holds
        self._is_text = True
        self._randomness = OwnRandomness(request.seed, model.device)

    def generate(self, **kwargs: Any) -> Any:
        """`generate` of the model, with a cache that holds all of the prompt but its last token."""
        request, prompt = self._request, kwargs["input_ids"]
        with self._told(), self._randomness:
            began = perf_counter()
            self._is_text = FOR_TEXT.issuperset(kwargs)
            known = prompt[0] if self._is_text else prompt[0, :0]
            with span("lookup"):
                self._cache = self._conversations.open(known, request.tenant, self._model)
            request.cached_tokens = self._cache.get_seq_length()
            self._ids = prompt[0, : request.cached_tokens].tolist()
            self._instruments.note_lookup(
                request, self._cache.restored_tokens, perf_counter() - began
            )
            has_store = self._cache.store is not None
            publishing = self._cache.publishing() if has_store else nullcontext()
            try:
                with publishing:
                    if self._is_text:
                        self._feed(prompt[:, request.cached_tokens : -1])
                    return in_turns(self._model, self._forward).generate(
                        **kwargs, past_key_values=self._cache
                    )
            finally:
                self._park()

    def _feed(self, input_ids: torch.Tensor) -> None:
        """Let the cache hold these tokens (`[1, tokens]`) too, a chunk in a turn.

        `generate` has chunks of its own, but in transformers 5.17 they begin at the first token
        again, whatever the cache holds.
        """
        for part in input_ids.split(self._chunk, dim=1):
            if part.shape[1]:
                self._in_turn(
                    functools.partial(
                        self._model, input_ids=part, past_key_values=self._cache, **self._one_logit
                    ),
                    part,
                )

    @property
    def _one_logit(self) -> dict[str, int]:
        """The last token's alone, where the model can: a chunk's would take `vocabulary` floats for
        each token."""
        known = inspect.signature(self._model.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def _park(self) -> None:
        self._instruments.note_stats(self._cache.stats())
        length = self._cache.get_seq_length()
        if self._is_text and 0 < length <= len(self._ids):
            ids = self._ids[:length]
            prompt_tokens = min(length, self._request.prompt_tokens)
            self._conversations.park(self._cache, ids, prompt_tokens, self._request.tenant)
        else:
            self._cache.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The request learns why it failed before anybody else does."""
        try:
            yield
        except _GenerationCancelled:
            raise
        except OutOfBlocksError as error:
            failure = Failure(400, f"the request does not fit: {error}", "context_length_exceeded")
        except Exception as error:
            logger.exception("a generation failed")
            failure = Failure(500, f"{type(error).__name__}: {error}", "server_error")
        else:
            return
        self._request.fail(failure)
        raise GenerationFailedError(json.dumps(failure.message)[1:-1])

    def _forward(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One forward of `generate`, which gives a token."""
        outputs = self._in_turn(functools.partial(call, *args, **kwargs), kwargs["input_ids"])
        self._instruments.note_token(self._request)
        return outputs

    def _in_turn(self, call: Callable[[], Any], input_ids: torch.Tensor) -> Any:
        """The outputs of a forward that feeds `input_ids` (`[1, tokens]`), when it is its turn."""
        with self._randomness.others():
            turns.pause()
        return self._with_memory(call, input_ids)

    def _with_memory(self, call: Callable[[], Any], input_ids: torch.Tensor) -> Any:
        """The same now. Where the cache's tiers are full, parked conversations go, the oldest
        first; then other requests are waited for."""
        past = self._cache.get_seq_length()
        may_repair = True
        began = perf_counter()
        while True:
            try:
                with span("prefill chunk" if input_ids.shape[1] > 1 else "decode step"):
                    outputs = call()
                break
            except OutOfBlocksError:
                if not self._conversations.drop_oldest() and not self._may_wait():
                    raise
            except TierIOError:  # what was read is damaged: compute it again, once
                if not (may_repair and self._is_text):
                    raise
                logger.exception("a block could not be read; its tokens are computed again")
                may_repair = False
                self._feed_again(self._forget())
        del self._ids[past:]
        self._ids += input_ids[0].tolist()
        flops = self._flops.count(input_ids.shape[1], past)
        self._instruments.note_forward(input_ids.shape[1], flops, perf_counter() - began)
        return outputs

    def _may_wait(self) -> bool:
        """Wait for memory that others hold; False if there is no hope."""
        try:
            with self._randomness.others():
                return turns.wait_for_memory()
        except turns.PreemptedError:
            if not self._is_text:  # its tokens alone do not bring it back
                return False
            known = self._forget()
        self._instruments.preempted.inc()
        with self._randomness.others():
            turns.wait_for_memory()
        turns.take_back()
        self._feed_again(known)
        return True

    def _forget(self) -> list[int]:
        """Empty the cache; the ids that it held."""
        known, self._ids = self._ids, []
        self._cache.reset()
        return known

    def _feed_again(self, ids: list[int]) -> None:
        self._feed(torch.tensor([ids], device=self._model.device))


class OwnRandomness:
    """While entered, random numbers come from a seed of this generation's own; None: from the
    process', as they come."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._others: Any = None

    def __enter__(self) -> None:
        if self._seed is not None:
            self._others = self._state()
            torch.manual_seed(self._seed)

    def __exit__(self, *exc: object) -> None:
        if self._seed is not None:
            self._restore(self._others)

    @contextmanager
    def others(self) -> Iterator[None]:
        """While others run."""
        if self._seed is None:
            yield
            return
        mine = self._state()
        self._restore(self._others)
        try:
            yield
        finally:
            self._others = self._state()
            self._restore(mine)

    def _state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        on_gpu = self._device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu else None

    def _restore(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)


def in_turns(model: PreTrainedModel, forward: Callable[..., Any]) -> PreTrainedModel:
    """The same model, with the same weights and all, whose calls go through
    `forward(call, args, kwargs)`. The given one stays as it is."""
    view: Any = object.__new__(_class_in_turns(type(model)))  # type: ignore[arg-type]
    view.__dict__ = model.__dict__
    object.__setattr__(view, "forward_in_turn", forward)
    return view


@functools.cache
def _class_in_turns(kind: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward_in_turn(functools.partial(kind.__call__, self), args, kwargs)

    names = {"__slots__": ("forward_in_turn",), "__call__": call, "__module__": kind.__module__}
    names["__qualname__"] = kind.__qualname__  # part of a stored block's key
    return type(kind.__name__, (kind,), names)
