"""One request on its way to a runtime process, and the answer on its way back."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
from starlette.types import Message, Receive, Scope, Send

from slmops.serving import events
from slmops.serving.limits import Gate, Limits, Overloaded
from slmops.serving.metrics import Metrics
from slmops.serving.refused import Refused
from slmops.serving.requests import Asked
from slmops.serving.runtime_errors import RuntimeRefused, from_body, in_event
from slmops.serving.values import Unavailable, UnknownModel

if TYPE_CHECKING:
    from slmops.serving.backend import Backend
    from slmops.serving.fleet import Fleet

Result = TypeVar("Result")
log = logging.getLogger(__name__)

CONNECT_S = 5.0
OVERLOADED_RETRY_S = 2
LAST_WORDS_S = 1.0
"""Seconds for telling a client that its answer broke off; one that does not read is left."""
ABANDONED = 2
"""An answer that nobody waits for any more keeps its slot for so many times the request timeout at most."""
_NO_RETRY = {"x-should-retry": "false"}
_BROKEN = (aiohttp.ClientError, ConnectionError, EOFError)


class Gone(Exception):
    """The client left."""


class Relay:
    """What all requests share.

    Attributes:
        gate: The queue.
        metrics: What is counted.
    """

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self.fleet = fleet
        self.limits = limits
        self.gate = Gate(limits)
        self.metrics = Metrics(fleet.state, self.gate)
        self._session: aiohttp.ClientSession | None = None
        self._abandonable: set[asyncio.Task[tuple[str, bytes]]] = set()

    async def close(self) -> None:
        """Break off what is still under way."""
        for task in self._abandonable:
            task.cancel()
        await asyncio.gather(*self._abandonable, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def post(self, backend: Backend, path: str, payload: bytes) -> Any:
        """Send a request; the answer is an asynchronous context."""
        if self._session is None:
            # Of the clients at hand the one that takes the least time for each piece of a stream.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                trust_env=False,
                auto_decompress=False,
            )
        return self._session.post(backend.url + path, data=payload, headers={"content-type": "application/json"})

    def keep(self, task: asyncio.Task[tuple[str, bytes]]) -> None:
        """Let a task go on when its client has left."""
        self._abandonable.add(task)
        task.add_done_callback(self._abandonable.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


class Answer:
    """The answer to one request, as a response of Starlette's kind.

    Args:
        relay: What all requests share.
        asked: The request.
        path: Of the endpoint, here and at the runtime.
        started: When it came in, in seconds of ``time.perf_counter()``.
    """

    def __init__(self, relay: Relay, asked: Asked, path: str, started: float) -> None:
        self._relay = relay
        self._asked = asked
        self._path = path
        self._started = started
        self._version = ""
        self._status = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            if self._asked.stream:
                await _unless_gone(receive, self._streamed(send))
                last: Message = {"type": "http.response.body", "body": b""}
            else:
                kind, body = await _unless_gone(receive, self._whole())
                await send(self._start(kind, [(b"content-length", str(len(body)).encode())]))
                last = {"type": "http.response.body", "body": body}
            # The server says "disconnected" to who still listens after the end: so the end comes after all that.
            await send(last)
        finally:
            scope["slmops.version"] = self._version
            if self._status != 200:
                scope["slmops.status"] = self._status

    def _start(self, kind: str, headers: list[tuple[bytes, bytes]]) -> Message:
        headers = [(b"content-type", kind.encode()), (b"x-slmops-version", self._version.encode()), *headers]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    # --- a place

    async def _enter(self, stack: AsyncExitStack) -> Backend:
        relay = self._relay
        try:
            backend = await stack.enter_async_context(relay.gate.enter(relay.fleet.lease(self._asked.model)))
        except UnknownModel as error:
            raise Refused(404, error.message, "model_not_found", "model") from None
        except Unavailable as error:
            wait = {"retry-after": str(math.ceil(error.retry_after_s))}
            raise Refused(503, error.message, "unavailable", headers=wait) from None
        except Overloaded as error:
            wait = {"retry-after": str(OVERLOADED_RETRY_S)}
            raise Refused(503, error.message, "overloaded", headers=wait) from None
        self._version = str(backend.installed.version)
        return backend

    def _failed(self, error: Exception) -> Refused:
        """What the client is told when the runtime breaks or is too slow."""
        if isinstance(error, TimeoutError):
            limit = self._relay.limits.request_timeout_s
            return Refused(504, f"The answer took longer than {limit:g} s.", "timeout", headers=_NO_RETRY)
        log.warning("%s: the runtime broke off: %s %s", self._path, type(error).__name__, error)
        if isinstance(error, aiohttp.ClientConnectorError):
            return Refused(503, "The runtime is being restarted.", "unavailable", headers={"retry-after": "3"})
        return Refused(502, "The runtime broke off.", "backend_error")

    # --- all at once

    async def _whole(self) -> tuple[str, bytes]:
        async with AsyncExitStack() as stack:
            backend = await self._enter(stack)
            # The runtime does not stop when nobody listens any more, so until it has answered its slot is taken.
            task = asyncio.create_task(self._computed(backend, stack.pop_all()))
        self._relay.keep(task)
        try:
            async with asyncio.timeout(self._relay.limits.request_timeout_s):
                return await asyncio.shield(task)
        except (TimeoutError, *_BROKEN) as error:
            raise self._failed(error) from None

    async def _computed(self, backend: Backend, stack: AsyncExitStack) -> tuple[str, bytes]:
        async with stack, asyncio.timeout(self._relay.limits.request_timeout_s * ABANDONED):
            try:
                kind, body = await self._post(backend, None)
            except RuntimeRefused as refused:
                if not (self._asked.ours and refused.room):
                    raise
                kind, body = await self._post(backend, refused.room)
            self._count(json.loads(body))
            return kind, body

    async def _post(self, backend: Backend, tokens: int | None) -> tuple[str, bytes]:
        payload = self._asked.payload(backend.installed.foundry_id, tokens)
        async with self._relay.post(backend, self._path, payload) as response:
            body: bytes = await response.read()
            if response.status != 200:
                raise from_body(response.status, body)
            return response.headers.get("content-type", "application/json"), body

    # --- piece by piece

    async def _streamed(self, send: Send) -> None:
        async with AsyncExitStack() as stack:
            backend = await self._enter(stack)
            broken: Refused | None = None
            begun = False
            try:
                async with asyncio.timeout(self._relay.limits.request_timeout_s):
                    pieces = await self._open(backend, stack)
                    await send(self._start("text/event-stream", [(b"cache-control", b"no-cache")]))
                    begun = True
                    await self._pass_on(pieces, send)
            except (TimeoutError, *_BROKEN) as error:
                broken = self._failed(error)
                if not begun:
                    raise broken from None
                self._status = broken.status
        if broken is not None:  # only now, when the slot is free again
            event = b"data: " + broken.body() + b"\n\n"
            try:
                async with asyncio.timeout(LAST_WORDS_S):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                raise Gone from None

    async def _open(self, backend: Backend, stack: AsyncExitStack) -> AsyncIterator[bytes]:
        """The stream of events, if it begins well."""
        try:
            return await self._begin(backend, stack, None)
        except RuntimeRefused as refused:
            if not (self._asked.ours and refused.room):
                raise
            return await self._begin(backend, stack, refused.room)

    async def _begin(self, backend: Backend, stack: AsyncExitStack, tokens: int | None) -> AsyncIterator[bytes]:
        payload = self._asked.payload(backend.installed.foundry_id, tokens)
        response = await stack.enter_async_context(self._relay.post(backend, self._path, payload))
        if response.status != 200:
            raise from_body(response.status, await response.read())
        pieces = events.whole(response.content)
        # The runtime says 200 before it has looked at the request; if it refuses, that is among the first events.
        head = b""
        async for piece in pieces:
            head += piece
            if event := events.first_telling(piece):
                if refused := in_event(event):
                    raise refused
                break
        return events.chained(head, pieces)

    async def _pass_on(self, pieces: AsyncIterator[bytes], send: Send) -> None:
        first = False
        usage = b""
        async for piece in pieces:
            if not first and events.DELTA in piece:
                first = True
                self._relay.metrics.first_token(time.perf_counter() - self._started)
            if events.USAGE in piece:
                usage = piece
                if self._asked.drop_usage:
                    piece = events.without_usage(piece)
            if events.tells_failure(piece):
                self._status = max(refused.status for event in piece.split(events.END) if (refused := in_event(event)))
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        for answer in events.with_usage(usage):
            self._count(answer)

    def _count(self, answer: dict[str, Any]) -> None:
        usage = answer.get("usage") or answer.get("response", {}).get("usage") or {}
        self._relay.metrics.tokens(
            usage.get("prompt_tokens", usage.get("input_tokens", 0)),
            usage.get("completion_tokens", usage.get("output_tokens", 0)),
        )


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work, and stop when the client leaves.

    Raises:
        Gone: It left.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
