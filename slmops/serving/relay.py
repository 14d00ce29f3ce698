"""One request on its way to a runtime process, by a queue, and the answer on its way back; and the count of both."""

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aiohttp
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from slmops.serving import runtime_answers
from slmops.serving.backend import Backend
from slmops.serving.fleet import RESTART_S, Fleet
from slmops.serving.limits import Serve
from slmops.serving.requests import Asked, Refused, not_now
from slmops.serving.runtime_answers import RuntimeRefused

Done = TypeVar("Done")
log = logging.getLogger(__name__)

RETRY_S = 2.0  # after which a client should ask again
CONNECT_S = 5.0
LAST_WORDS_S = 1.0  # for telling a client that its answer broke off; one that does not read is left
ABANDONED_TIMES = 2  # the request timeout, for which an answer whose client has left keeps its slot at most
_BROKEN = (aiohttp.ClientError, ConnectionError, EOFError)
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Relay:
    """What all requests share. So many as ``limits`` says run at once; the others wait in the order in which they came.

    Those that run include those whose client has left; ``abandonable`` are answers that go on then.
    """

    def __init__(self, fleet: Fleet, limits: Serve) -> None:
        self.fleet = fleet
        self.limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)  # it is fair
        self.waiting = self.running = 0
        self.metrics = Metrics(self)
        self.abandonable: set[asyncio.Task[tuple[str, bytes]]] = set()
        # aiohttp takes the least time for each piece of a stream.
        self.session = aiohttp.ClientSession(
            headers={"content-type": "application/json"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=False,
            auto_decompress=False,
        )

    @asynccontextmanager
    async def enter(self, model: str) -> AsyncIterator[Backend]:
        """Wait for a process and then for a slot, and hold both; Refused if the queue or the wait is too long.

        In this order, because the first can take a while, when a version has to be loaded for it.
        """
        limits = self.limits
        if self.waiting + self.running >= limits.queue + limits.concurrency:
            raise not_now(f"{limits.queue} requests are waiting already.", RETRY_S, "overloaded")
        async with AsyncExitStack() as stack:
            self.waiting += 1
            missing = "The model was not loaded"
            try:
                async with asyncio.timeout(limits.queue_timeout_s):
                    leased = await stack.enter_async_context(self.fleet.lease(model))
                    missing = "No slot was free"
                    await stack.enter_async_context(self._slots)
            except TimeoutError:
                raise not_now(f"{missing} within {limits.queue_timeout_s:g} s.", RETRY_S, "overloaded") from None
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                yield leased
            finally:
                self.running -= 1

    async def close(self) -> None:
        for task in self.abandonable:
            task.cancel()
        await asyncio.gather(*self.abandonable, return_exceptions=True)
        await self.session.close()


class Metrics(Collector):
    """Prometheus metrics of one service since its start, in a registry of its own. No label carries text of a client.

    The status of a request is what the client got, or would have got: 499 if it left, 502 and 504 if an answer broke
    off. Its endpoint is a path or "other"; its version is "" if none was asked.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, buckets=BUCKETS_S, registry=self._registry)
        self.requests = counter("slmops_requests", "Requests by outcome.", ["endpoint", "status", "version"])
        self.seconds = histogram(
            "slmops_request_seconds", "From the request's headers to the end of the answer.", ["endpoint"]
        )
        self.first_token = histogram(
            "slmops_first_token_seconds", "From the request's headers to the first token of a streamed answer."
        )
        counts = "as the runtime counts."
        self.prompt_tokens = counter("slmops_prompt_tokens", f"Tokens of the rendered conversations, {counts}")
        self.completion_tokens = counter("slmops_completion_tokens", f"Tokens of the answers, {counts}")
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        fleet = self._relay.fleet
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        for kind, name, text, value in (
            (gauge, "slmops_in_flight", "Requests that are being answered.", self._relay.running),
            (gauge, "slmops_queued", "Requests that wait.", self._relay.waiting),
            (gauge, "slmops_ready", "1 if the champion answers.", fleet.ready),
            (gauge, "slmops_registry_up", "1 if the registry answered when it was last asked.", fleet.watch.reachable),
            (counter, "slmops_switches", "Changes to another version.", fleet.switches),
            (counter, "slmops_backend_restarts", "Runtime processes that died and were started again.", fleet.restarts),
        ):
            yield kind(name, text, value=int(value))
        memory = gauge("slmops_backend_memory_bytes", "Memory of each runtime process.", labels=["foundry_id"])
        total: defaultdict[str, float] = defaultdict(float)
        for one in fleet.running:
            total[one.installed.foundry_id] += one.memory_mb() * 1e6
        for foundry_id, size in total.items():
            memory.add_metric([foundry_id], size)
        yield memory
        served = gauge("slmops_model_info", "The version that answers.", labels=["model", "version", "variant"])
        if fleet.champion is not None:
            version = fleet.champion.installed
            served.add_metric([fleet.name, str(version.version), version.variant], 1)
        yield served


@dataclass
class RelayedResponse:
    """The answer to one request, as an ASGI response like Starlette's."""

    relay: Relay
    asked: Asked
    path: str  # of the endpoint, here and at the runtime
    started: float  # when it came in, in seconds of time.perf_counter()
    _version: str = field(default="", init=False)
    _status: int = field(default=200, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and note the version and the outcome in the scope."""
        body = b""
        try:
            if self.asked.stream:
                await _unless_gone(receive, self._streamed(send))
            else:
                kind, body = await _unless_gone(receive, self._whole())
                await send(self._start(kind, (b"content-length", str(len(body)).encode())))
            # After the end of an answer the server reports "disconnected", so it is sent when nothing waits for that.
            await send({"type": "http.response.body", "body": body})
        finally:
            scope["slmops.version"] = self._version
            if self._status != 200:
                scope["slmops.status"] = self._status

    def _start(self, kind: str, header: tuple[bytes, bytes]) -> Message:
        headers = [(b"content-type", kind.encode()), (b"x-slmops-version", self._version.encode()), header]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    async def _enter(self, stack: AsyncExitStack) -> Backend:
        backend = await stack.enter_async_context(self.relay.enter(self.asked.model))
        self._version = str(backend.installed.version)
        return backend

    def _failed(self, error: Exception) -> Refused:
        if isinstance(error, TimeoutError):
            late = f"The answer took longer than {self.relay.limits.request_timeout_s:g} s."
            return Refused(504, late, "timeout", headers={"x-should-retry": "false"})
        log.warning("%s: the runtime broke off: %s %s", self.path, type(error).__name__, error)
        if isinstance(error, aiohttp.ClientConnectorError):
            return not_now("The runtime is being restarted.", RESTART_S)
        return Refused(502, "The runtime broke off.", "backend_error")

    async def _sent(
        self, backend: Backend, stack: AsyncExitStack, read: Callable[[aiohttp.ClientResponse], Awaitable[Done]]
    ) -> Done:
        """What ``read`` makes of the answer; a token limit of ours that is more than there is room for is lowered."""
        room: int | None = None
        while True:
            payload = self.asked.payload(backend.installed.foundry_id, room)
            sent = self.relay.session.post(backend.url + self.path, data=payload)
            response = await stack.enter_async_context(sent)
            try:
                if response.status != 200:
                    raise runtime_answers.from_body(response.status, await response.read())
                return await read(response)
            except RuntimeRefused as refused:
                if room or not (self.asked.ours and refused.room):
                    raise
                room = refused.room

    async def _whole(self) -> tuple[str, bytes]:
        async with AsyncExitStack() as stack:
            backend = await self._enter(stack)
            # The runtime does not stop when its client leaves, so its slot is taken until it has answered.
            task = asyncio.create_task(self._computed(backend, stack.pop_all()))
        self.relay.abandonable.add(task)
        task.add_done_callback(self.relay.abandonable.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(self.relay.limits.request_timeout_s):
                return await asyncio.shield(task)
        except (TimeoutError, *_BROKEN) as error:
            raise self._failed(error) from None

    async def _computed(self, backend: Backend, stack: AsyncExitStack) -> tuple[str, bytes]:
        async def read(response: aiohttp.ClientResponse) -> tuple[str, bytes]:
            return response.headers.get("content-type", "application/json"), await response.read()

        async with stack, asyncio.timeout(self.relay.limits.request_timeout_s * ABANDONED_TIMES):
            kind, body = await self._sent(backend, stack, read)
            self._count(json.loads(body))
            return kind, body

    async def _streamed(self, send: Send) -> None:
        async with AsyncExitStack() as stack:
            backend = await self._enter(stack)
            broken: Refused | None = None
            begun = False
            try:
                async with asyncio.timeout(self.relay.limits.request_timeout_s):
                    pieces = await self._sent(backend, stack, runtime_answers.accepted)
                    await send(self._start("text/event-stream", (b"cache-control", b"no-cache")))
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
                raise ClientDisconnect from None

    async def _pass_on(self, pieces: AsyncIterator[bytes], send: Send) -> None:
        first = False
        usage = b""
        async for piece in pieces:
            if not first and runtime_answers.DELTA in piece:
                first = True
                self.relay.metrics.first_token.observe(time.perf_counter() - self.started)
            if runtime_answers.USAGE in piece:
                usage = piece
                if self.asked.drop_usage:
                    piece = runtime_answers.without_usage(piece)
            self._status = max((refused.status for refused in runtime_answers.errors(piece)), default=self._status)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        for answer in runtime_answers.with_usage(usage):
            self._count(answer)

    def _count(self, answer: dict[str, Any]) -> None:
        usage = answer.get("usage") or answer.get("response", {}).get("usage") or {}
        metrics = self.relay.metrics
        metrics.prompt_tokens.inc(usage.get("prompt_tokens", usage.get("input_tokens", 0)))
        metrics.completion_tokens.inc(usage.get("completion_tokens", usage.get("output_tokens", 0)))


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Done]) -> Done:
    """Do the work, and stop with ClientDisconnect when the client leaves."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    gone = asyncio.create_task(left())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
