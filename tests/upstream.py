"""A fake of the runtime's web service, the proxy before it, and clients on real sockets."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from aiohttp import web

from slmops.core.errors import SlmopsError
from slmops.serving import service
from slmops.serving.backend import Backend
from slmops.serving.fleet import Fleet
from slmops.serving.limits import Serve
from slmops.serving.proxy import Proxy
from tests.fleets import FakeBackend, World, installed, version

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
FOUNDRY_ID = "bot-int8-generic-cpu:3"
GOOD = {"model": "bot", "messages": [{"role": "user", "content": "Hi"}]}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
Script = Callable[["Connection"], Awaitable[None]]


@dataclass
class Connection:
    request: web.BaseRequest
    body: dict[str, Any]
    let_go: asyncio.Event
    response: web.StreamResponse = field(default_factory=web.StreamResponse)

    async def piece(self, data: bytes) -> None:
        if not self.response.prepared:
            self.response.content_type = "text/event-stream"
            await self.response.prepare(self.request)
        await self.response.write(data)


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def chunk(text: str | None, **more: Any) -> dict[str, Any]:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return {"choices": choices, "id": "c", "model": FOUNDRY_ID, "object": "chat.completion.chunk", **more}


async def answer(connection: Connection) -> None:
    choice = {"message": {"content": "abc"}, "finish_reason": "stop"}
    script = replies({"choices": [choice], "model": FOUNDRY_ID, "usage": USAGE})
    if connection.body.get("stream"):
        wanted = connection.body.get("stream_options", {}).get("include_usage")
        chunks = [*map(chunk, "abc"), *([chunk(None, usage=USAGE)] if wanted else [])]
        script = streams(b": keep-alive\n\n", *map(event, chunks), b"data: [DONE]\n\n")
    await script(connection)


def streams(*pieces: bytes) -> Script:
    async def script(connection: Connection) -> None:
        for piece in pieces:
            await connection.piece(piece)
            await asyncio.sleep(0)

    return script


def replies(data: Any, status: int = 200) -> Script:
    async def script(connection: Connection) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        connection.response = web.Response(body=body, status=status, content_type="application/json")

    return script


async def endless(connection: Connection, text: str = "a") -> None:
    while True:
        await connection.piece(event(chunk(text)))
        await asyncio.sleep(0.01)


async def held(connection: Connection) -> None:
    await connection.let_go.wait()
    await answer(connection)


@dataclass
class Upstream:
    """A web service that follows a script, and notes what came and who left."""

    script: Script = answer
    received: list[dict[str, Any]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = Connection(request, await request.json(), self.let_go)
        self.received.append(connection.body)
        try:
            await self.script(connection)
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return connection.response

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """The address of the service; whoever waits is let go at the end."""
        server = web.Server(self.handle, handler_cancellation=True)  # type: ignore[arg-type]
        behind = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{behind.sockets[0].getsockname()[1]}"
        finally:
            self.let_go.set()
            behind.close()
            await server.shutdown(0.1)


class OneFleet(Fleet):
    """A fleet that serves version 3 from the start, at ``url``, where two of its processes are."""

    def __init__(self, url: str) -> None:
        super().__init__(World(), Serve())  # type: ignore[arg-type]
        self.champion = self.backend = FakeBackend(installed(3))
        self.backend.url = url
        self.watch.versions = [version(3)]
        self._draining = [self.backend]
        self.switches, self.restarts = 2, 1
        self.loads_s = 0.0
        self.refuses: SlmopsError | None = None
        self.log: list[str] = []
        self.starts: asyncio.Event | None = None

    async def start(self) -> None:
        if self.starts is not None:
            await self.starts.wait()
        if self.refuses is not None:
            raise self.refuses
        self.log.append("started")

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self.log.append("stopped")

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Backend]:
        if self.refuses is not None:
            raise self.refuses
        await asyncio.sleep(self.loads_s)
        async with super().lease(model) as backend:
            yield backend


@dataclass
class Stand:
    client: httpx.AsyncClient
    upstream: Upstream
    fleet: OneFleet
    port: int

    async def ask(self, body: Any = GOOD, path: str = CHAT, **more: Any) -> httpx.Response:
        """Send a body, as it is if it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **more.pop("headers", {})}
        return await self.client.post(path, content=content, headers=headers, **more)

    async def post(
        self, *headers: str, body: bytes = b"", kind: str = "application/json", **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Begin a request on a socket of its own, with these headers beside the usual ones."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, **options)
        head = (f"POST {CHAT} HTTP/1.1", "host: 127.0.0.1", f"content-type: {kind}", *headers, "", "")
        writer.write("\r\n".join(head).encode() + body)
        return reader, writer

    async def metric(self, name: str) -> float:
        """One sample, its labels in the name."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)

    async def counted(self, status: int) -> float:
        """Chat requests that ended with this status and were sent to the runtime."""
        return await self.metric(f'slmops_requests_total{{endpoint="{CHAT}",status="{status}",version="3"}}')

    async def in_flight(self) -> tuple[float, float]:
        """Requests that run, and that wait."""
        return await self.metric("slmops_in_flight"), await self.metric("slmops_queued")

    async def reaches(self, running: int, waiting: int) -> None:
        async with asyncio.timeout(5):
            while await self.in_flight() != (running, waiting):
                await asyncio.sleep(0.01)


def client_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10)


@asynccontextmanager
async def stand(
    limits: Serve | None = None, token: str | None = None, script: Script = answer, local: bool = True
) -> AsyncIterator[Stand]:
    """The proxy as it is served, before a scripted upstream; nothing may be leased when it ends."""
    upstream = Upstream(script)
    async with upstream.listening() as url:
        fleet = OneFleet(url)
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        limits = limits or Serve()
        proxy = Proxy(fleet, limits, token, local=local)  # type: ignore[arg-type]
        server = uvicorn.Server(service.config(proxy, limits))
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[listening])  # alone: the naps of serve() are longer than most tests
        try:
            async with client_of(port) as client:
                yield Stand(client, upstream, fleet, port)
        finally:
            upstream.let_go.set()
            await server.shutdown(sockets=[listening])
            await proxy.close()
    assert fleet.backend.in_flight == 0


def told(response: httpx.Response) -> tuple[int, str | None]:
    """Status and code of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    return response.status_code, error["code"]


def chat(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def response(**fields: Any) -> dict[str, Any]:
    return {"model": "bot", "input": "Hi", **fields}


def says(content: Any, role: Any = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content}])
