"""What stands before the app: who comes in, for how long, and what is told when it ends early.

An ASGI middleware. It counts before a body is read, so a burst is refused at once and not after it
was tokenised; it answers `/health`, `/ready` and `/metrics` itself, so they never wait; and it
holds back the beginning of a stream until there is a first token, so that until then a failure
still has a status of its own.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from hf_tiered_cache.serving.instruments import Instruments
from hf_tiered_cache.serving.requests import Failure, Request, Requests, current_request

logger = logging.get_logger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GENERATING = {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
PASSING = {"/v1/models", "/docs", "/openapi.json"}  # what else there is would load or unload models
DRAIN_SECONDS = 1.0  # for the body of a request that is refused, so that its client hears why

BODY_SECONDS = (
    10.0  # for the body of one that was let in: it has a place without being any work yet
)
CLOSE_SECONDS = 5.0  # for the last words to a client that may not be reading

INTERNAL_ERROR = "internal error, see the server's log"
GONE = Failure(499, "the client went away", "client_closed_request")


LATE = Failure(408, f"the body took more than {BODY_SECONDS:g} s", "body_timeout")


class NoBodyError(Exception):
    """Why there is no body."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class Limits:
    """Seconds a request may wait for the model, and may take in all; bytes its body may have."""

    queue_timeout: float = 60
    request_timeout: float = 600
    max_body_bytes: int = 8 * 1024 * 1024


class Admission:
    """The app behind its doors.

    keys: who may come in, each a tenant of its own; none: everybody, all one tenant. is_alive:
    whether the model's thread is there.
    """

    def __init__(
        self,
        app: Any,
        requests: Requests,
        instruments: Instruments,
        limits: Limits,
        keys: Sequence[str] = (),
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._app = app
        self._requests = requests
        self._instruments = instruments
        self._limits = limits
        self._tenants = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
        self._is_alive = is_alive
        for reason in ("queue", "body"):
            instruments.rejected.labels(reason)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        if path == "/health":
            alive = self._is_alive()
            await _answer(send, 200 if alive else 503, {"status": "ok" if alive else "dead"})
        elif path == "/ready":
            full = self._requests.is_full or not self._is_alive()
            await _answer(send, 503 if full else 200, {"status": "full" if full else "ready"})
        elif (tenant := self._tenant(scope)) is None:
            await _fail(send, Failure(401, "no such API key", "invalid_api_key"))
        elif path == "/metrics":
            await self._show_metrics(send)
        elif path in GENERATING and method == "POST":
            await self._let_in(tenant, scope, receive, send)
        elif path in PASSING or path in GENERATING:
            await self._app(scope, receive, send)
        else:
            await _fail(send, Failure(404, f"{method} {path}: no such endpoint", "not_found"))

    def _tenant(self, scope: Any) -> str | None:
        """Whose request this is; None for nobody's."""
        if not self._tenants:
            return ""
        given = _header(scope, b"authorization").removeprefix("Bearer ").strip()
        digest = hashlib.sha256(given.encode()).hexdigest()
        known = [tenant for tenant in self._tenants if hmac.compare_digest(tenant, digest)]
        return known[0] if known else None

    async def _show_metrics(self, send: Send) -> None:
        self._instruments.requests.labels("running").set(self._requests.num_running)
        self._instruments.requests.labels("queued").set(self._requests.num_queued)
        await _answer(send, 200, self._instruments.text(), b"text/plain; version=0.0.4")

    async def _let_in(self, tenant: str, scope: Any, receive: Receive, send: Send) -> None:
        length = _header(scope, b"content-length")
        num_bytes = int(length) if length.isdigit() else 0
        if num_bytes > self._limits.max_body_bytes:
            self._instruments.rejected.labels("body").inc()
            await _fail(send, self._too_large)
            return
        admitted = self._requests.admit(tenant, num_bytes)
        if isinstance(admitted, Failure):
            self._instruments.rejected.labels("queue").inc()
            with contextlib.suppress(asyncio.TimeoutError, NoBodyError):
                await asyncio.wait_for(self._body(receive, keep=False), DRAIN_SECONDS)
            await _fail(send, admitted)
            return
        token = current_request.set(admitted)
        try:
            await self._serve(admitted, scope, receive, send)
        finally:
            current_request.reset(token)
            self._requests.leave(admitted)
            admitted.end()
            failure = admitted.failure
            self._instruments.ended.labels(failure.kind if failure else "answered").inc()

    async def _serve(self, request: Request, scope: Any, receive: Receive, send: Send) -> None:
        """Run the app until it has answered, or the request is over before."""
        gate = Gate(request, send)
        deadlines = self._set_deadlines(request)
        work = asyncio.create_task(self._work(request, scope, receive, gate))
        over = asyncio.create_task(request.until(lambda it: it.is_over))
        try:
            await asyncio.wait({work, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for deadline in deadlines:
                deadline.cancel()
            over.cancel()
            if not work.done():
                request.end(GONE)  # where the server itself is going down
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work
        error = None if work.cancelled() else work.exception()
        if error is not None and request.failure is None:
            logger.error("a request failed", exc_info=error)
            request.fail(Failure(500, INTERNAL_ERROR, "server_error"))
        if request.failure is not None and request.failure is not GONE:
            self._requests.leave(request)  # its place is not its client's to keep
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(gate.close(request.failure), CLOSE_SECONDS)

    def _set_deadlines(self, request: Request) -> list[asyncio.TimerHandle]:
        loop, limits = asyncio.get_running_loop(), self._limits

        def end(failure: Failure) -> None:
            if failure.kind == "request_timeout" or request.started is None:
                request.end(failure)

        waited = f"waited {limits.queue_timeout:g} s for the model (--queue-timeout)"
        took = f"took more than {limits.request_timeout:g} s (--request-timeout)"
        again = self._requests.retry_after
        late = Failure(504, f"the request {waited}", "queue_timeout", again)
        slow = Failure(504, f"the request {took}", "request_timeout")
        return [
            loop.call_later(limits.queue_timeout, end, late),
            loop.call_later(limits.request_timeout, end, slow),
        ]

    async def _work(self, request: Request, scope: Any, receive: Receive, gate: "Gate") -> None:
        try:
            body = await asyncio.wait_for(self._body(receive), BODY_SECONDS)
        except TimeoutError:
            request.end(LATE)
            return
        except NoBodyError as error:
            request.end(error.failure)
            return
        full = self._requests.measure(request, len(body))
        if full is not None:
            self._instruments.rejected.labels("queue").inc()
            request.end(full)
            return
        listening = asyncio.create_task(_until_gone(request, receive, gate))
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            if given:
                return given.pop()
            await request.until(lambda it: it.is_over)
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, receive_again, gate.send)
        finally:
            listening.cancel()

    async def _body(self, receive: Receive, keep: bool = True) -> bytes:
        """The whole body, or nothing of it. Raises NoBodyError where it is too large, or its client
        goes away."""
        parts, num_bytes, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise NoBodyError(GONE)
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > self._limits.max_body_bytes:
                raise NoBodyError(self._too_large)
            if keep:
                parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)

    @property
    def _too_large(self) -> Failure:
        most = self._limits.max_body_bytes
        return Failure(413, f"the body has more than {most} bytes (--max-body-bytes)", "too_large")


class Gate:
    """What the app sends, on its way out.

    A stream's beginning waits here for the first token. A failure that is known before anything
    went out takes the place of the app's answer; one that comes later ends the stream with an
    event.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self._request = request
        self._send = send
        self._is_open = self._is_stream = self.is_done = False

    async def send(self, message: Message) -> None:
        """For the app."""
        request = self._request
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", ()))
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._is_stream:
                await request.until(_has_news)
            if request.failure is not None and (request.first_token is None or not self._is_stream):
                raise asyncio.CancelledError  # `close` answers instead
            self._is_open = True
        elif not message.get("more_body"):
            self.is_done = True
        await self._send(message)

    async def close(self, failure: Failure) -> None:
        """The app sends no more: answer with the failure, as far as that is still possible."""
        if not self._is_open:
            await _fail(self._send, failure)
        elif not self.is_done:
            event = b""
            if self._is_stream:
                event = b"data: " + json.dumps({"error": _as_json(failure)}).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _has_news(request: Request) -> bool:
    return request.first_token is not None or request.failure is not None or request.is_over


async def _until_gone(request: Request, receive: Receive, gate: Gate) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not gate.is_done:  # uvicorn says the same after a whole answer
        request.end(GONE)


def _header(scope: Any, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _as_json(failure: Failure) -> dict[str, Any]:
    return {"message": failure.message, "type": failure.kind, "code": failure.kind}


async def _fail(send: Send, failure: Failure) -> None:
    seconds = failure.retry_after_seconds
    extra = [] if seconds is None else [(b"retry-after", str(seconds).encode())]
    await _answer(send, failure.status, {"error": _as_json(failure)}, headers=extra)


async def _answer(
    send: Send,
    status: int,
    content: Any,
    content_type: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    own = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
