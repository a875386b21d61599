"""Several generations on one thread, each a forward at a time: `TurnThread`.

`generate` of transformers runs from the first token to the last and knows nothing of others. Here
each call of it is a greenlet: before every forward it pauses, and whoever has had the least time of
the model goes on. So a short request waits for one chunk of a long prompt, not for the prompt; and
what was cancelled ends at its next forward, wherever it is. One thread, because a compiled model,
its graphs and the threads of torch's own operations belong to the thread that made them.
"""

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from transformers.cli.serving.utils import _GenerationCancelled

from hf_tiered_cache.serving.requests import Request, current_request


class PreemptedError(RuntimeError):
    """This call gives its memory back, so that others can go on; it may take it again later."""


class _Turn(greenlet):
    """One call that takes turns.

    seconds: of the model's time that it has had, beginning with the least of those that were there
    when it came. is_waiting: for memory that others hold. has_shed: it gave its own back.
    """

    def __init__(self, call: Callable[[], Any], request: Request) -> None:
        super().__init__(call)
        self.request = request
        self.future: Future[Any] = Future()
        self.seconds = 0.0
        self.is_waiting = False
        self.has_shed = False


class TurnThread:
    """Takes the place of transformers' `InferenceThread`: the same two methods.

    max_running: calls that are interleaved; the others wait in the order in which they came.
    """

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._inbox: SimpleQueue[tuple[Callable[[], Any], Request, Future[Any]] | None]
        self._inbox = SimpleQueue()
        self._waiting: deque[tuple[Callable[[], Any], Request, Future[Any]]] = deque()
        self._running: list[_Turn] = []
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `call` in turns, for the current request; its result, or what it raised."""
        request = current_request.get(None) or Request()
        future: Future[Any] = Future()
        self._inbox.put((lambda: call(*args, **kwargs), request, future))
        return future

    def async_submit(
        self, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> "asyncio.Future[Any]":
        """The same as an awaitable of the running loop."""
        return asyncio.wrap_future(self.submit(call, *args, **kwargs))

    def stop(self) -> None:
        """End when the forward under way has; what is unfinished is cancelled. Idempotent."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        # Outermost, so that no paused `generate` finds gradients switched on by another's end.
        with torch.no_grad():
            while self._take_in():
                ready = [it for it in self._running if it.request.is_over or not it.is_waiting]
                if ready:
                    self._continue(min(ready, key=lambda turn: turn.seconds))
                elif self._running:
                    self._preempt()
            for turn in list(self._running):
                turn.request.end()
                self._continue(turn)
        for _, _, future in self._waiting:
            future.cancel()

    def _take_in(self) -> bool:
        """Let new calls begin, waiting for one where there is nothing to do. False: stop."""
        while not self._inbox.empty() or not (self._running or self._waiting):
            arrived = self._inbox.get()
            if arrived is None:
                return False
            self._waiting.append(arrived)
        while self._waiting and len(self._running) < self._max_running:
            call, request, future = self._waiting.popleft()
            if request.is_over or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            turn = _Turn(call, request)
            turn.future = future
            turn.seconds = min((it.seconds for it in self._running), default=0.0)
            self._running.append(turn)
            request.start()
        return True

    def _continue(self, turn: _Turn) -> None:
        if turn.request.is_over:
            self._step(turn, functools.partial(turn.throw, _GenerationCancelled))
        else:
            self._step(turn, turn.switch)

    def _step(self, turn: _Turn, switch: Callable[[], Any]) -> None:
        """Let a call run until it pauses or ends."""
        began = perf_counter()
        try:
            result = switch()
        except BaseException as error:  # a greenlet's own comes out where it was switched to
            self._leave(turn)
            turn.future.set_exception(error)
        else:
            turn.seconds += perf_counter() - began
            if turn.dead:
                self._leave(turn)
                turn.future.set_result(result)

    def _leave(self, turn: _Turn) -> None:
        self._running.remove(turn)
        self._wake()

    def _wake(self) -> None:
        for turn in self._running:
            turn.is_waiting = False

    def _preempt(self) -> None:
        """All wait for memory: the one that came last gives its own back. The one that is left in
        the end is told that nobody will."""
        holders = [turn for turn in self._running if not turn.has_shed]
        last = holders[-1]
        self._wake()
        if len(holders) == 1:
            self._step(last, functools.partial(last.switch, False))
        else:
            last.has_shed = True
            self._step(last, functools.partial(last.throw, PreemptedError))


def pause() -> None:
    """Let others run their forwards. Raises what ends this call: the request is over."""
    getcurrent().parent.switch()


def wait_for_memory() -> bool:
    """Wait until another call has given memory back; False if none will, so that there is no hope.

    Raises PreemptedError where it is this call's turn to give: it then does so, waits again, and
    says when it takes its memory back (`take_back`)."""
    turn = getcurrent()
    turn.is_waiting = True
    return turn.parent.switch() is not False


def take_back() -> None:
    """This call, which was preempted, takes memory again from now on."""
    getcurrent().has_shed = False
