"""The service: a fleet behind the proxy, from its start to its end."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from pathlib import Path

import psutil
import uvicorn

from slmops.core import web
from slmops.core.errors import UsageError
from slmops.core.files import write_atomic
from slmops.core.settings import Settings
from slmops.processes import tree
from slmops.serving.fleet import Fleet
from slmops.serving.home_service import SERVING, Running
from slmops.serving.limits import Serve
from slmops.serving.proxy import Proxy
from slmops.serving.registry_watch import VersionSource

log = logging.getLogger(__name__)

FINISH_S = 30  # for running requests to finish when the service is stopped
IDLE_S = 5  # for which a connection may stay open after an answer
HEADER_BYTES = 16_384
IDLE_CONNECTIONS = 500  # beside those of the requests that are answered or wait; further ones get 503


def run(name: str, options: Serve, settings: Settings, uri: str) -> None:
    """Serve ``name`` until SIGTERM or Ctrl-C; an error of ours says why that cannot be."""
    token = settings.serve_token.get_secret_value() if settings.serve_token else None
    try:
        local = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        local = options.host.lower() == "localhost"
    if not local and token is None:
        exposed = f"{options.host} is not loopback, and without a token anybody who reaches it could use the service."
        raise UsageError(exposed, "Set SLMOPS_SERVE_TOKEN, or leave --host at 127.0.0.1.")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        advice = "Use printable ASCII without spaces, such as `openssl rand -hex 32` prints."
        raise UsageError("SLMOPS_SERVE_TOKEN has characters that HTTP clients cannot send.", advice)
    if not local:
        log.warning("listening at %s: the token and all conversations travel unencrypted", options.host)
    with web.listen(options.host, options.port) as listening:
        fleet = Fleet(VersionSource(name, settings, uri), options)
        asyncio.run(serve(fleet, options, settings.home, listening, token, local=local))


async def serve(
    fleet: Fleet, options: Serve, home: Path, listening: socket.socket, token: str | None, *, local: bool = True
) -> None:
    """Serve a fleet at a socket that listens; while it loads, clients get 503."""
    proxy = Proxy(fleet, options, token, local=local)
    server = uvicorn.Server(config(proxy, options))
    url = _url(options.host, listening.getsockname()[1])

    async def live() -> None:
        await fleet.start()
        assert fleet.champion is not None  # noqa: S101 - for the type checker: else it would have raised
        me = psutil.Process()
        running = Running(pid=me.pid, created=me.create_time(), url=url, model=fleet.name)
        mine = running.model_dump_json(exclude_defaults=True)  # it has no mark
        path = home / SERVING
        write_atomic(path, mine)
        try:
            variant = fleet.champion.installed.variant
            log.info("serving %s version %s (%s) at %s", fleet.name, fleet.version, variant, url)
            await fleet.run()
        finally:
            with contextlib.suppress(OSError):
                if path.read_text(encoding="utf-8") == mine:
                    path.unlink()

    try:
        with contextlib.ExitStack() as signals:
            # The server has them: the first lets running requests finish, a second Ctrl-C does not. When it has ended
            # at one, uvicorn sends it to this process again, which without a handler would be killed then, before the
            # runtime processes are stopped.
            for number in (*tree.ASKING, signal.SIGINT):
                signals.callback(signal.signal, number, signal.signal(number, server.handle_exit))
            answering = asyncio.create_task(server.serve(sockets=[listening]))
            living = asyncio.create_task(live())
            try:
                await asyncio.wait((living, answering), return_when=asyncio.FIRST_COMPLETED)
                if living.done():
                    living.result()
            finally:
                server.should_exit = True
                await answering
                living.cancel()
                await asyncio.gather(living, return_exceptions=True)
                await proxy.close()
    finally:
        await fleet.stop()


def config(proxy: Proxy, limits: Serve) -> uvicorn.Config:
    """The web server's settings; a limit on how slowly a client may send its first headers is for a reverse proxy."""
    return uvicorn.Config(
        proxy,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        limit_concurrency=limits.concurrency + limits.queue + IDLE_CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=FINISH_S,
    )


def _url(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
