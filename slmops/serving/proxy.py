"""What clients see: OpenAI's interface to the champion and the other versions of one model, health and metrics.

    POST /v1/chat/completions, /v1/responses    answered by a runtime process, whole or as a stream
    GET  /v1/models, /v1/models/{id}            the names that can be asked for
    GET  /health                                open to all: whether there is an answer to be had
    GET  /metrics                               for Prometheus

Every error is JSON in OpenAI's form with a status that fits.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmops.serving.limits import Limits
from slmops.serving.refused import Refused
from slmops.serving.relay import Answer, Gone, Relay
from slmops.serving.requests import read

if TYPE_CHECKING:
    from slmops.serving.fleet import Fleet

log = logging.getLogger(__name__)

BODY_S = 30.0
"""Seconds that a client may take to send its request."""
DRAIN_BYTES = 8_000_000
DRAIN_S = 2.0
"""How much of a body that is too large is read away before the answer: a client that still sends would not see it."""
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
_ENDPOINTS = (CHAT, RESPONSES, "/v1/models", "/health", "/metrics")
LEFT = 499


def app(fleet: Fleet, limits: Limits, token: str | None = None, *, local: bool = True) -> ASGIApp:
    """The service as an ASGI application.

    Args:
        fleet: The processes that answer.
        limits: What is let through.
        token: What clients must show as a bearer token; None: nothing.
        local: It listens on loopback only, and answers to loopback's names only: else a web page whose name is made to
            point to this machine could use it.
    """
    relay = Relay(fleet, limits)
    routes = _Routes(relay, limits)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await relay.close()

    inner = Starlette(
        routes=[
            Route(CHAT, routes.chat, methods=["POST"]),
            Route(RESPONSES, routes.responses, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model}", routes.model),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
        ],
        exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _unforeseen},
        lifespan=lifespan,
    )
    inner.router.redirect_slashes = False
    return _Front(inner, relay, token, local)


class _Routes:
    def __init__(self, relay: Relay, limits: Limits) -> None:
        self._relay = relay
        self._limits = limits

    async def chat(self, request: Request) -> Answer:
        return await self._answer(request, "chat", CHAT)

    async def responses(self, request: Request) -> Answer:
        return await self._answer(request, "responses", RESPONSES)

    async def _answer(self, request: Request, endpoint: Literal["chat", "responses"], path: str) -> Answer:
        started = time.perf_counter()
        # Also: what is not JSON a web page may send to any address without asking.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "The content type must be application/json.", "unsupported_media_type")
        body = await _body(request, self._limits.max_body_kb * 1000)
        return Answer(self._relay, read(body, endpoint, self._limits), path, started)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._relay.fleet.models()})

    async def model(self, request: Request) -> Response:
        for model in self._relay.fleet.models():
            if model["id"] == request.path_params["model"]:
                return JSONResponse(model)
        raise Refused(404, "There is no such model here; see /v1/models.", "model_not_found", "model")

    async def health(self, _: Request) -> Response:
        state = self._relay.fleet.state()
        status = "ok" if state.ready else "unavailable"
        return JSONResponse(
            {"status": status, "model": state.model, "version": state.version}, 200 if state.ready else 503
        )

    async def metrics(self, _: Request) -> Response:
        return Response(self._relay.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _Front:
    """Who may come in, and the count of who did."""

    def __init__(self, inner: ASGIApp, relay: Relay, token: str | None, local: bool) -> None:
        self._inner = inner
        self._relay = relay
        self._token = None if token is None else token.encode()
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started = time.perf_counter()
        status = LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if refused := self._refuses(scope):
                await _response(refused)(scope, receive, noting)
            else:
                await self._inner(scope, receive, noting)
        except Gone:
            status = LEFT
        finally:
            path = scope["path"]
            self._relay.metrics.request(
                path if path in _ENDPOINTS else "other",
                scope.get("slmops.status", status),
                scope.get("slmops.version", ""),
                time.perf_counter() - started,
            )

    def _refuses(self, scope: Scope) -> Refused | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._local and name not in LOOPBACK:
            return Refused(421, "This service answers to 127.0.0.1 and localhost only.", "wrong_host")
        if self._token is None or scope["path"] == "/health":
            return None
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), self._token):
            return None
        challenge = {"www-authenticate": "Bearer"}
        return Refused(401, "A valid token is needed: Authorization: Bearer TOKEN.", "invalid_api_key", None, challenge)


async def _body(request: Request, limit: int) -> bytes:
    """The whole body, read before anything is taken for the request.

    Raises:
        Refused: It is too large, or does not come.
        Gone: The client left.
    """
    length = request.headers.get("content-length", "")
    body = bytearray()
    too_large = length.isdigit() and int(length) > limit
    try:
        async with asyncio.timeout(BODY_S):
            if not too_large:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        too_large = True
                        break
        if too_large and request.headers.get("expect", "").lower() != "100-continue":
            await _drain(request)
    except ClientDisconnect:
        raise Gone from None
    except TimeoutError:
        message = f"The request did not come within {BODY_S:g} s."
        raise Refused(408, message, "request_timeout", headers={"connection": "close"}) from None
    if too_large:
        message = f"The body is larger than {limit // 1000} kB."
        raise Refused(413, message, "request_too_large", headers={"connection": "close"})
    return bytes(body)


async def _drain(request: Request) -> None:
    left = DRAIN_BYTES
    try:
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    break
    except TimeoutError:
        pass


def _response(refused: Refused) -> Response:
    return Response(refused.body(), refused.status, refused.headers, "application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)  # noqa: S101 - for the type checker: registered for this class
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router raises: 404 and 405."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    message = f"{request.method} is not possible here." if error.status_code == 405 else "There is nothing here."
    headers = dict(error.headers or {})
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return _response(Refused(error.status_code, message, code, headers=headers))


async def _unforeseen(_: Request, __: Exception) -> Response:
    """What no check foresaw; the traceback is logged by the server."""
    return _response(Refused(500, "The service failed; its log says why.", "internal_error"))
