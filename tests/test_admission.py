"""The doors of the server, with an app and clients of a few lines."""

import asyncio
import re

import pytest

from hf_tiered_cache.serving import admission
from hf_tiered_cache.serving.admission import Admission, Limits
from hf_tiered_cache.serving.instruments import Instruments
from hf_tiered_cache.serving.requests import Requests, current_request

CAP = 1000  # queued tokens
BODY = b"x" * 2000  # 500 tokens
GONE = {"type": "http.disconnect"}


class Doors:
    """An `Admission`, and what its clients were told."""

    def __init__(self, app, max_running: int = 1, max_queued: int = 0, **limits) -> None:
        self.requests = Requests(max_running, max_queued, CAP)
        self.instruments = Instruments()
        self.admission = Admission(app, self.requests, self.instruments, Limits(**limits))
        self.statuses: list[int] = []

    async def come(self, *messages, send=None, headers=()) -> None:
        """A client that sends these, and then waits."""
        left = list(messages)

        async def receive():
            return left.pop(0) if left else await asyncio.Event().wait()

        async def note(message) -> None:
            if "status" in message:
                self.statuses.append(message["status"])

        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": headers}
        await self.admission(scope, receive, send or note)

    def ended(self, kind: str) -> float:
        text = self.instruments.text().decode()
        found = re.search(rf'htc_requests_ended_total{{outcome="{kind}"}} (\S+)', text)
        return float(found[1]) if found else 0.0


def body(content: bytes = b"{}") -> dict:
    return {"type": "http.request", "body": content, "more_body": False}


async def answering(scope, receive, send) -> None:
    """An app that takes a moment."""
    await receive()
    await asyncio.sleep(0.1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def streaming(scope, receive, send) -> None:
    """An app that streams on and on."""
    await receive()
    current_request.get().start()
    current_request.get().note_token()
    kind = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": kind})
    while True:
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})


def test_a_client_that_stops_reading_gives_its_place_back_at_the_deadline(monkeypatch):
    monkeypatch.setattr(admission, "CLOSE_SECONDS", 0.3)
    doors = Doors(streaming, request_timeout=0.2)
    sent = []

    async def stuck(message) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()  # as uvicorn waits for a client's full buffer

    async def story() -> None:
        coming = asyncio.create_task(doors.come(body(), send=stuck))
        await asyncio.sleep(0.1)
        assert doors.requests.is_full
        await asyncio.sleep(0.25)
        assert not doors.requests.is_full and not coming.done()
        await asyncio.wait_for(coming, 2)

    asyncio.run(story())
    assert b"request_timeout" in sent[-1]["body"]
    assert doors.ended("request_timeout") == 1


@pytest.mark.parametrize("headers", [(), [(b"content-length", b"2000")]], ids=["chunked", "said"])
def test_tokens_are_counted_whether_a_body_says_its_length_or_not(headers):
    doors = Doors(answering, max_queued=9)

    async def story() -> None:
        await asyncio.gather(*(doors.come(body(BODY), headers=headers) for _ in range(5)))

    asyncio.run(story())
    assert sorted(doors.statuses) == [200, 200, 503, 503, 503]
    assert not doors.requests._all


def test_a_body_that_never_comes_has_a_deadline_of_its_own(monkeypatch):
    monkeypatch.setattr(admission, "BODY_SECONDS", 0.1)
    doors = Doors(answering)
    asyncio.run(asyncio.wait_for(doors.come(), 2))
    assert doors.statuses == [408]
    assert doors.ended("body_timeout") == 1 and not doors.requests._all


def test_a_client_that_goes_while_it_uploads_is_counted_as_gone():
    doors = Doors(answering)
    part = {"type": "http.request", "body": b"{", "more_body": True}
    asyncio.run(doors.come(part, GONE))
    assert (doors.ended("client_closed_request"), doors.ended("answered")) == (1, 0)
    assert doors.statuses == []


def test_a_refused_client_may_leave():
    doors = Doors(answering)

    async def story() -> None:
        first = asyncio.create_task(doors.come(body()))
        await asyncio.sleep(0.02)
        await doors.come(GONE)
        await first

    asyncio.run(story())
    assert doors.statuses == [503, 200]
