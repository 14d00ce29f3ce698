"""What our clients and our two web servers, the service and the catalog, share: the way past proxies, how they listen,
and how they read a request."""

import asyncio
import logging
import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING

from slmops.core.errors import PrerequisiteError, UsageError

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger(__name__)

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")

DISCARDED_BYTES = 16_000_000
DISCARD_S = 2.0
"""How much of a body that is too large is read and thrown away, and for how long: a client that is still sending does
not see the answer."""


def past_proxies() -> dict[str, str]:
    """Variables by which this machine is reached without the proxies of the environment; its NO_PROXY is extended.

    A SOCKS proxy that httpx cannot use is taken away: with it not even a client for this machine could be made.
    """
    usable = ("socks5://", "socks5h://") if find_spec("socksio") else ()
    socks = [key for key, url in os.environ.items() if key.lower() in _PROXIES and url.lower().startswith("socks")]
    broken = [key for key in socks if not os.environ[key].lower().startswith(usable)]
    if broken:
        log.warning("%s is not used, as it names a SOCKS proxy: set HTTPS_PROXY for the hub", " and ".join(broken))
    said = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host for one in said.split(",") if (host := one.strip())]
    direct = "*" if "*" in hosts else ",".join(dict.fromkeys((*hosts, "localhost", "127.0.0.1", "::1")))
    return {"NO_PROXY": direct, "no_proxy": direct, **dict.fromkeys(broken, "")}


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server at a host's name or address; port 0 takes a free one.

    It is done before anything is loaded, so that nobody can take the port meanwhile. It is a UsageError if there is no
    such address or port, and a PrerequisiteError if the port is in use, or the address is not one of this machine.
    """
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise UsageError(f"There is no port {port}.", "Give one from 1 to 65535 with --port.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"There is no address {host}: {error}.", "Give another with --host.") from None
    family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    try:
        listening = socket.create_server(address, family=family)
    except OSError as error:
        raise PrerequisiteError(
            f"Port {port} of {host} cannot be used: {os.strerror(error.errno or 0)}.",
            "Stop what listens there, or give another address with --host and --port.",
        ) from None
    # Connections inherit it. Without it an answer can take 40 ms more: asyncio sets it only on sockets of its own.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def read_body(request: "Request", limit: int, seconds: float) -> bytes:
    """Read a whole request body of at most ``limit`` bytes, for which the client may take so many seconds.

    It is an HTTPException, whose answer closes the connection, if it is too large or does not come in time; and a
    ClientDisconnect if the client left.
    """
    from starlette.exceptions import HTTPException

    length = request.headers.get("content-length", "")
    announced = float(length) if length.isdecimal() else 0.0  # of 5,000 digits int() refuses to make a number
    too_large = announced > limit
    waits = request.headers.get("expect", "").lower() == "100-continue"
    close = {"connection": "close"}
    refused = HTTPException(413, f"The body is larger than {limit} bytes.", close)
    if announced > DISCARDED_BYTES or (too_large and waits):
        raise refused
    body, discarded = bytearray(), 0
    try:
        async with asyncio.timeout(DISCARD_S if too_large else seconds) as timer:
            async for chunk in request.stream():
                if not too_large and len(body) + len(chunk) > limit:
                    too_large = True
                    timer.reschedule(asyncio.get_running_loop().time() + DISCARD_S)
                if not too_large:
                    body += chunk
                    continue
                discarded += len(chunk)
                if discarded > DISCARDED_BYTES:
                    break
    except TimeoutError:
        if not too_large:
            raise HTTPException(408, f"The request did not arrive within {seconds:g} s.", close) from None
    if too_large:
        raise refused
    return bytes(body)
