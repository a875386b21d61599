"""transformers' handlers, off the event loop and with the tokens that were not computed again.

Their `handle_request` renders the chat template and tokenises, a second for each megabyte, before
it hands over to `_streaming` or `_non_streaming`. Here the first half runs in a worker thread, so
that the loop goes on answering, and the second half on the loop, where their queues belong.
"""

import asyncio
import functools
import inspect
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from hf_tiered_cache.serving import mistakes
from hf_tiered_cache.serving.requests import Request, current_request


class OffLoop(BaseHandler):
    """A handler whose first half runs in a worker thread, and whose answers say how many tokens of
    the prompt were cached."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As transformers' own."""
        request = current_request.get(None) or Request()
        mistakes.check_seed(body)
        request.seed = body.pop("seed", None)  # of this request, not of the whole process
        first_half = super().handle_request
        second_half = await asyncio.to_thread(_run_to_end, first_half, body, request_id)
        response = second_half()
        if inspect.isawaitable(response):
            answer = json.loads((await response).body)
            _add_cached(answer, request)
            return JSONResponse(answer)
        events = _events_with_cached(response.body_iterator, request)
        return StreamingResponse(events, media_type=response.media_type)

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        resolved = super()._resolve_model(body)
        mistakes.check_body(body, resolved[1].config.get_text_config().vocab_size)
        return resolved

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._build_generation_config(body, *args, **kwargs)
        except (AttributeError, TypeError, ValueError) as error:
            raise HTTPException(400, f"the options of sampling: {error}") from None

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Any) -> Any:
        """As transformers' own. Raises HTTPException for messages it cannot read."""
        try:
            return BaseHandler.get_processor_inputs_from_messages(messages, modality)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise HTTPException(400, f"messages cannot be read ({what})") from None

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        return functools.partial(super()._streaming, *args, **kwargs)

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        return functools.partial(super()._non_streaming, *args, **kwargs)


class ChatHandler(OffLoop, ChatCompletionHandler):
    """`/v1/chat/completions`."""


class TextHandler(OffLoop, CompletionHandler):
    """`/v1/completions`."""


class ResponsesHandler(OffLoop, ResponseHandler):
    """`/v1/responses`."""


def _run_to_end(function: Any, *args: Any) -> Any:
    """What a coroutine function that waits for nothing returns."""
    coroutine = function(*args)
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("this transformers' handler waits before it generates: please report it")


async def _events_with_cached(events: AsyncIterator[str], request: Request) -> AsyncIterator[str]:
    async for part in events:
        if '"usage":{' in part:  # inside a text its quotes are escaped, so this is the field
            part = "\n\n".join(map(functools.partial(_event, request=request), part.split("\n\n")))
        yield part


def _event(text: str, request: Request) -> str:
    if '"usage":{' not in text:
        return text
    prefix, data = text.split("data: ", 1)
    event = json.loads(data)
    _add_cached(event, request)
    return f"{prefix}data: {json.dumps(event, separators=(',', ':'))}"


def _add_cached(answer: dict[str, Any], request: Request) -> None:
    usage = answer.get("usage") or (answer.get("response") or {}).get("usage")
    if usage is not None:
        details = "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details"
        usage[details] = {**(usage.get(details) or {}), "cached_tokens": request.cached_tokens}
