"""Lossless self-speculation: several tokens for each time that the cold blocks are read.

    model.generate(**inputs, past_key_values=cache, custom_generate=hf_tiered_cache.speculate)

A token of exact decode costs one read of everything that is not on the device. So the model first
guesses some tokens while it attends only what is on the device (`TieredCache.drafting`), which
costs no load, and then checks them all in one forward, for which every cold block is read once.
What it would not have said itself is dropped (speculative decoding, Leviathan et al. 2023, arXiv
2211.17192, with the same model as its own draft: TriForce, arXiv 2404.11912).

Every token that comes out is chosen from the exact model's scores, by the rule of `generate`. For
greedy decoding that is the largest one. For sampling it is the same draw from torch's generator
that plain `generate` would make, and guesses are drawn with the numbers that this draw will use
(coupled sampling, Daliri et al. 2024, arXiv 2408.07978): likely to agree, and forgotten after, so
the text is that of plain `generate` under the same seed and no correction is needed.

transformers' `_assisted_decoding` is not composed of here: it computes the prompt in one forward
with the guesses, whatever `prefill_chunk_size` says, and asks stopping criteria once per pass.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.utils import logging

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.integration.cache import TieredCache
from hf_tiered_cache.integration.compat import streamer_of_generate
from hf_tiered_cache.integration.draft_length import DraftLength
from hf_tiered_cache.observe.metrics import span
from hf_tiered_cache.observe.tracing import DRAFT, VERIFY

logger = logging.get_logger(__name__)

NO_SINKS = (
    "speculate: the first tokens of the text are not on the device, and guesses made without them"
    " are often wrong (the tokens are right all the same):"
    " TieredCache(demotion='sinks_and_recent') keeps them there"
)

LEFT_BEHIND = (
    "speculate: the model left the given cache behind and computes with another one; leave out"
    " custom_generate"
)

LOOKUP_TOKENS = 3  # that must have stood somewhere before, for what followed them to be tried

# Processors that keep nothing from one call to the next, so that guesses may pass through them too.
# Any other one sees each token once, in order, as in plain `generate`.
STATELESS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def speculate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_tokens: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """`custom_generate` of a `generate` into a `TieredCache`: the tokens of plain `generate`, with
    several of them for each read of the cold blocks.

    draft_tokens: guesses for each pass, an argument of `generate`; default: as many as pay, by what
    was measured so far, none where nothing is cold. Everything else is as without it; tokens are
    identical but where two scores lie within rounding, since a forward of several tokens rounds
    otherwise than one of a single token.

    What is not speculated is generated plainly, and says so once: beams, several sequences,
    encoder-decoder models, other caches, attentions or hidden states asked for, token_type_ids,
    synced_gpus, texts that may cross the length where LongRoPE or dynamic rotary positions change.
    Raises UnsupportedInputError for a `draft_tokens` below 0, or if the model leaves the cache.
    """
    if draft_tokens is not None and (not isinstance(draft_tokens, int) or draft_tokens < 0):
        raise UnsupportedInputError(f"draft_tokens={draft_tokens!r}: expected 0 or more, or None")
    streamer = streamer_of_generate()
    mode = generation_config.get_generation_mode()
    if why := _why_plain(model, input_ids, generation_config, mode, model_kwargs):
        logger.warning_once(f"speculate: {why}, so this is generated plainly")
        plain = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        if streamer is not None:
            model_kwargs["streamer"] = streamer
        return plain(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )
    model_kwargs.pop("synced_gpus", None)  # no argument of a model
    text = _Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    _Speculation(model, text, draft_tokens, model_kwargs).run()
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.ids
    return GenerateDecoderOnlyOutput(
        sequences=text.ids,
        scores=text.scores,
        logits=text.logits,
        past_key_values=model_kwargs["past_key_values"],
    )


@contextmanager
def speculating(model: PreTrainedModel, draft_tokens: int | None = None) -> Iterator[None]:
    """Let every plain `model.generate(...)` within the `with` block `speculate`: those of a
    pipeline or a server as well. Nothing but this object's `generate` is replaced."""
    generate = model.generate
    had = vars(model).get("generate")
    custom = functools.partial(speculate, draft_tokens=draft_tokens)
    model.generate = functools.partial(generate, custom_generate=custom)
    try:
        yield
    finally:
        if had is None:
            del model.generate
        else:
            model.generate = had


def _why_plain(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    mode: GenerationMode,
    model_kwargs: dict[str, Any],
) -> str:
    """Why this is not speculated; empty if it is. Raises UnsupportedInputError for what
    transformers itself cannot do any more without code from its hub."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        name = mode.name.replace("_", " ").lower()
        if "/" in GENERATION_MODES_MAPPING[mode]:
            raise UnsupportedInputError(
                f"speculate: got {name}, expected greedy decoding or sampling; leave out"
                " custom_generate"
            )
        return f"{name} is asked for"
    if input_ids.shape[0] != 1:
        return f"the batch has {input_ids.shape[0]} sequences"
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if not isinstance(model_kwargs.get("past_key_values"), TieredCache):
        return f"the cache is a {type(model_kwargs.get('past_key_values')).__name__}"
    if getattr(model, "_is_stateful", False):
        return "the model's states cannot be taken back"
    if not model_kwargs.get("use_cache", True):
        return "use_cache=False"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    if model_kwargs.get("token_type_ids") is not None:
        return "token_type_ids are given, which transformers extends for one token only"
    if model_kwargs.get("synced_gpus"):
        return "synced_gpus=True, and ranks would need different numbers of forwards"
    return _why_positions(model, input_ids, config, model_kwargs["past_key_values"])


def _why_positions(
    model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, cache: TieredCache
) -> str:
    """Why a forward of several tokens might turn keys otherwise than several of one; empty if none
    would. Some models choose rotary frequencies by the length of the whole text so far."""
    of_text = model.config.get_text_config(decoder=True)
    rope = getattr(of_text, "rope_parameters", None) or {}
    ropes = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one per layer type
    by_type = {one["rope_type"]: one for one in ropes if "rope_type" in one}
    if "dynamic" in by_type and config.max_length > of_text.max_position_embeddings:
        return f"dynamic rotary positions may pass {of_text.max_position_embeddings} tokens"
    # Models of LongRoPE (Phi-3, 5.17 to 5.23) drop the cache there, by the config's own attribute.
    original = getattr(of_text, "original_max_position_embeddings", None) or by_type.get(
        "longrope", {}
    ).get("original_max_position_embeddings")
    if original is None or not cache.get_seq_length() <= original < config.max_length:
        return ""
    if input_ids.shape[1] > original and not cache.layers:
        return ""  # all at once into a new cache made without config, which is not dropped
    return f"the text may cross original_max_position_embeddings={original}"


class _Text:
    """The tokens so far, and how the next one is chosen: as `generate` does."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> None:
        returns = bool(config.return_dict_in_generate)
        self.ids = input_ids
        self.is_finished = False
        self.scores: tuple[torch.Tensor, ...] | None = (
            () if returns and config.output_scores else None
        )
        self.logits: tuple[torch.Tensor, ...] | None = (
            () if returns and config.output_logits else None
        )
        self.config = config
        self._processors = processors
        self._repeatable = LogitsProcessorList(
            [one for one in processors if type(one) in STATELESS]
        )
        self._criteria = criteria
        self._streamer = streamer
        ends = config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.config.max_length - self.ids.shape[1]

    def accept(self, logits: torch.Tensor, guesses: Sequence[int]) -> int:
        """Choose tokens by `logits` `[1, len(guesses) + 1, vocabulary]`, of which each was computed
        behind one more guess, as long as the guesses are right; the number of tokens that came."""
        for done in range(len(guesses) + 1):
            # A copy, as processors may write into it.
            raw = logits[:, done].to(copy=True, dtype=torch.float32, device=self.ids.device)
            scores = self._processors(self.ids, raw)
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (raw,)
            token = self._choose(scores)
            self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
            self.is_finished = bool(self._criteria(self.ids, self.scores).all())
            if self._streamer is not None:
                self._streamer.put(token.cpu())
            if self.is_finished or done == len(guesses) or int(token) != guesses[done]:
                return done + 1
        raise AssertionError("the last one returns")

    def guess(self, logits: torch.Tensor, guesses: Sequence[int]) -> int:
        """What would be chosen behind these guesses by `logits` `[1, vocabulary]`."""
        ids = torch.cat([self.ids, self.ids.new_tensor([guesses])], dim=-1) if guesses else self.ids
        raw = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        return int(self._choose(self._repeatable(ids, raw)))

    def is_end(self, token: int) -> bool:
        """Whether nothing need be guessed behind it."""
        return token in self._ends

    def seen_before(self, guesses: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the last few, and the guesses, where these stood last
        before (prompt lookup)."""
        ids = torch.cat([self.ids[0], self.ids.new_tensor(guesses)]) if guesses else self.ids[0]
        if count < 1 or len(ids) <= LOOKUP_TOKENS:
            return []
        windows = ids.unfold(0, LOOKUP_TOKENS, 1)
        places = (windows[:-1] == windows[-1]).all(dim=1).nonzero()
        if not len(places):
            return []
        first = int(places[-1]) + LOOKUP_TOKENS
        return ids[first : first + count].tolist()

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """One token for each row of `scores`, as `generate` (5.17 to 5.23) does it."""
        if self.config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)


class _Speculation:
    """Guesses, checks and keeps, until the text is finished."""

    def __init__(
        self,
        model: Any,
        text: _Text,
        draft_tokens: int | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        self._model = model
        self._text = text
        self._cache: TieredCache = model_kwargs["past_key_values"]
        self._draft_tokens = draft_tokens
        self._length = DraftLength()
        self._is_cold = True  # whether the last pass read what is not on the device
        # What the model is to be told of `text.ids`: mask, positions.
        self._kwargs = model_kwargs

    def run(self) -> None:
        """Compute the prompt, then pass after pass."""
        text, model = self._text, self._model
        outputs = model._prefill(text.ids, text.config, self._kwargs)
        self._check_used(outputs)
        text.accept(outputs.logits[:, -1:], ())
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
        del outputs  # its logits may be those of the whole prompt
        if self._cache.begins_cold and self._draft_tokens != 0:
            logger.warning_once(NO_SINKS)
        try:
            self._cache.activate_past_recording()  # windows and linear states can go back
            while not text.is_finished:
                self._pass()
        finally:
            self._cache.end_past_recording()

    def _pass(self) -> None:
        text, cache, counts = self._text, self._cache, self._cache.speculation
        began = perf_counter()
        guesses = self._guess(min(self._num_guesses(), text.room - 1))
        drafted = perf_counter()
        before = cache.counters()
        ahead = cache.get_seq_length() - text.ids.shape[1]  # of the cache, the same ever after
        try:
            with span(VERIFY):
                outputs = self._forward(guesses, 1 + len(guesses))
            num_tokens = text.accept(outputs.logits[:, -1 - len(guesses) :], guesses)
        finally:  # whatever a streamer, a criterion or Ctrl-C raises: no guess stays unaccepted
            cache.crop(text.ids.shape[1] + ahead - cache.get_seq_length())
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, num_new_tokens=num_tokens
        )
        ended = perf_counter()
        after = cache.counters()
        self._is_cold = (after.cold_reads, after.in_place_reads) != (
            before.cold_reads,
            before.in_place_reads,
        )
        self._length.note(len(guesses), num_tokens - 1, drafted - began, ended - drafted)
        counts.passes += 1
        counts.drafted += len(guesses)
        counts.accepted += num_tokens - 1
        counts.tokens += num_tokens
        counts.draft_seconds += drafted - began
        counts.pass_seconds += ended - drafted
        counts.saved_bytes += (num_tokens - 1) * (after.loaded_bytes - before.loaded_bytes)

    def _num_guesses(self) -> int:
        if self._draft_tokens is not None:
            return self._draft_tokens
        return self._length.choose() if self._is_cold else 0

    def _guess(self, count: int) -> list[int]:
        """Up to `count` tokens that the model would say if it saw only what is on the device.

        What followed the last tokens where they stood before is guessed at no cost, and checked by
        the draft itself: several tokens in one forward.
        """
        if count < 1:
            return []
        text, cache = self._text, self._cache
        guesses: list[int] = []
        with span(DRAFT), cache.drafting(), self._same_draws():
            while len(guesses) < count and not (guesses and text.is_end(guesses[-1])):
                seen = text.seen_before(guesses, count - len(guesses) - 1)
                logits = self._forward([*guesses, *seen], 1 + len(seen)).logits
                for done in range(1 + len(seen)):
                    guesses.append(text.guess(logits[:, done - 1 - len(seen)], guesses))
                    if done < len(seen) and guesses[-1] != seen[done]:
                        cache.crop(done - len(seen))
                        break
        return guesses

    def _same_draws(self) -> Any:
        """Take back the draws of guesses, so that the tokens are chosen with the same numbers."""
        if not self._text.config.do_sample:
            return nullcontext()
        device = self._text.ids.device
        if device.type == "cpu":
            return torch.random.fork_rng([])
        return torch.random.fork_rng([device], device_type=device.type)

    def _forward(self, guesses: Sequence[int], num_tokens: int) -> Any:
        """A forward over the last `num_tokens` of the text and these guesses."""
        text, kwargs = self._text, self._kwargs
        ids = text.ids
        if guesses:
            ids = torch.cat([ids, ids.new_tensor([guesses])], dim=-1)
            kwargs = self._model._update_model_kwargs_for_generation(
                {}, dict(kwargs), num_new_tokens=len(guesses)
            )
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=num_tokens, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_tokens
        if inputs.get("past_key_values") is not self._cache:
            raise UnsupportedInputError(LEFT_BEHIND)
        outputs = self._model(**inputs, return_dict=True)
        self._check_used(outputs)
        return outputs

    def _check_used(self, outputs: Any) -> None:
        """Raise UnsupportedInputError if the model went on with another cache."""
        if outputs.past_key_values is not self._cache:
            raise UnsupportedInputError(LEFT_BEHIND)
