"""The service: a fleet behind the proxy, from the first signal of life to the last."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.files import write_atomic
from slmops.core.settings import Settings
from slmops.serving import proxy
from slmops.serving.fleet import Fleet
from slmops.serving.options import Serve
from slmops.serving.source import RegistrySource
from slmops.serving.status import SERVING, Running

log = logging.getLogger(__name__)

STOP_S = 30.0
"""Seconds that running requests have to finish when the service is stopped."""
HEADERS_S = 15.0
"""Seconds that a connection has to bring the headers of its first or next request."""
IDLE_S = 5
HEADER_BYTES = 16_384


def run(name: str, options: Serve, settings: Settings, uri: str) -> None:
    """Serve ``name`` until SIGTERM or Ctrl-C.

    Args:
        name: The model's name in the registry.
        options: Address and limits.
        settings: Where things are, and the token.
        uri: MLflow tracking server.

    Raises:
        UsageError: The address is not loopback and there is no token, or it is none of this machine, or nothing is
            promoted.
        PrerequisiteError: The port is in use.
        SlmopsError: Nothing can be served.
    """
    token = settings.serve_token.get_secret_value() if settings.serve_token else None
    local = _is_loopback(options.host)
    if not local and token is None:
        raise UsageError(
            f"{options.host} is not loopback, and without a token whoever reaches it could use the service.",
            "Set SLMOPS_SERVE_TOKEN, or leave --host at 127.0.0.1.",
        )
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError(
            "SLMOPS_SERVE_TOKEN has characters that HTTP clients cannot send.",
            "Use printable ASCII without spaces, as `openssl rand -hex 32` prints.",
        )
    if not local:
        log.warning("listening at %s: the token and all conversations travel unencrypted", options.host)
    with _listen(options.host, options.port) as listening:
        fleet = Fleet(
            name,
            settings,
            RegistrySource(name, settings, uri),
            spare=options.spare,
            poll_s=options.poll_s,
            drain_s=options.request_timeout_s,
        )
        asyncio.run(serve(fleet, options, settings.home, listening, token, local=local))


async def serve(
    fleet: Fleet, options: Serve, home: Path, listening: socket.socket, token: str | None, *, local: bool = True
) -> None:
    """Serve a fleet at a socket that listens; while it loads, clients are told so.

    Raises:
        SlmopsError: The fleet has nothing to serve.
    """
    server = _Server(_config(proxy.app(fleet, options, token, local=local)))
    url = _url(options.host, listening.getsockname()[1])
    try:
        with _signals(server):
            answering = asyncio.create_task(server.serve(sockets=[listening]))
            try:
                if await _started(fleet, answering):
                    with _written_down(home, url, fleet.name):
                        state = fleet.state()
                        log.info("serving %s version %s (%s) at %s", fleet.name, state.version, state.variant, url)
                        async with _watching(fleet):
                            await answering
            finally:
                server.should_exit = True
                await answering
    finally:
        await fleet.stop()


async def _started(fleet: Fleet, answering: asyncio.Task[None]) -> bool:
    """Load the champion; False if the service was stopped meanwhile."""
    starting = asyncio.create_task(fleet.start())
    try:
        await asyncio.wait((starting, answering), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return False
        starting.result()
        return True
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


@asynccontextmanager
async def _watching(fleet: Fleet) -> AsyncIterator[None]:
    task = asyncio.create_task(fleet.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _config(application: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        http=_Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=int(STOP_S),
    )


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: it would send them to this process again at its end, before the runtime processes are stopped."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the application clean up even when there is no time left."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


@contextmanager
def _signals(server: uvicorn.Server) -> Iterator[None]:
    """The first signal lets running requests finish, the second does not."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Protocol(H11Protocol):
    """Uvicorn's, but it does not wait for ever for a request that comes byte by byte, or never."""

    _hurry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Asyncio does this for its own sockets, not for one that it is given; without it an answer can take 40 ms more.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._hurry is not None:
            self._hurry.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        if self._hurry is not None and self.cycle is not None and not self.cycle.response_complete:
            self._hurry.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer to what is no HTTP; if it began as a request, the application has nothing more to say to it."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()

    def _wait_for_request(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
        self._hurry = self.loop.call_later(HEADERS_S, self.transport.close)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Listen before anything is loaded, so that nobody can take the port meanwhile."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"There is no address {host}: {error}.", "Give another with --host.") from None
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise PrerequisiteError(
            f"Port {port} of {host} cannot be used: {os.strerror(error.errno or 0)}.", "Give another with --port."
        ) from None


def _url(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextmanager
def _written_down(home: Path, url: str, model: str) -> Iterator[None]:
    """Write ``serving.json`` for as long as the service answers."""
    mine = Running(pid=os.getpid(), created=psutil.Process().create_time(), url=url, model=model).model_dump_json()
    path = home / SERVING
    write_atomic(path, mine)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == mine:
                path.unlink()
