"""What clients see: OpenAI's interface to the champion and the other versions of one model, health and metrics.

    POST /v1/chat/completions, /v1/responses    answered by a runtime process, whole or as a stream
    GET  /v1/models, /v1/models/{id}            the names that can be asked for
    GET  /health                                open to all: whether the champion answers
    GET  /metrics                               for Prometheus

Every error is JSON in OpenAI's form with a status that fits.
"""

import asyncio
import hmac
import time

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from slmops.core.web import read_body
from slmops.serving.backend import CHAT
from slmops.serving.fleet import Fleet
from slmops.serving.limits import Serve
from slmops.serving.relay import Relay, RelayedResponse
from slmops.serving.requests import Refused, read

BODY_S = 30.0  # for a client to send its request
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}
RESPONSES = "/v1/responses"
_ENDPOINTS = (CHAT, RESPONSES, "/v1/models", "/health", "/metrics")
_CODES = {405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}
CLIENT_LEFT = 499


class Proxy:
    """The service as an ASGI application: who may come in, what is answered, and the count of it.

    If ``local``, it answers to loopback's names only: otherwise a web page whose name is made to point to this machine
    could use it. Clients must show the ``token``, if there is one, as a bearer token.
    """

    def __init__(self, fleet: Fleet, limits: Serve, token: str | None = None, *, local: bool = True) -> None:
        self._fleet, self._limits = fleet, limits
        self._token = None if token is None else token.encode()
        self._local = local
        self._relay = Relay(fleet, limits)
        self.close = self._relay.close
        self._inner = Starlette(
            routes=[
                Route(CHAT, self._answer, methods=["POST"]),
                Route(RESPONSES, self._answer, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{model}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers=dict.fromkeys((Refused, HTTPException, Exception), _failed),
        )
        self._inner.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # If the server has just found that the body is not HTTP, it ends the connection now, before there is an answer.
        await asyncio.sleep(0)
        try:
            app = _response(refused) if (refused := self._refuses(scope)) else self._inner
            await app(scope, receive, noting)
        except ClientDisconnect:
            status = CLIENT_LEFT
        finally:
            endpoint = scope["path"] if scope["path"] in _ENDPOINTS else "other"
            outcome = str(scope.get("slmops.status", status)), scope.get("slmops.version", "")
            self._relay.metrics.requests.labels(endpoint, *outcome).inc()
            self._relay.metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

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

    async def _answer(self, request: Request) -> RelayedResponse:
        started = time.perf_counter()
        # A web page may send other content types to any address without asking.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "The content type must be application/json.", "unsupported_media_type")
        body = await read_body(request, self._limits.max_body_kb * 1000, BODY_S)
        path = request.scope["path"]
        asked = read(body, self._limits.max_output_tokens, chat=path == CHAT)
        return RelayedResponse(self._relay, asked, path, started)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._fleet.models()})

    async def _model(self, request: Request) -> Response:
        for model in self._fleet.models():
            if model["id"] == request.path_params["model"]:
                return JSONResponse(model)
        raise Refused(404, "There is no such model here; see /v1/models.", "model_not_found", "model")

    async def _health(self, _: Request) -> Response:
        fleet = self._fleet
        health = {"status": "ok" if fleet.ready else "unavailable", "model": fleet.name, "version": fleet.version}
        return JSONResponse(health, 200 if fleet.ready else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._relay.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _response(refused: Refused) -> Response:
    return Response(refused.body(), refused.status, refused.headers, "application/json")


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return _response(error)
    if not isinstance(error, HTTPException):  # the traceback is logged by the server
        return _response(Refused(500, "The service failed; its log says why.", "internal_error"))
    said = {404: "There is nothing here.", 405: f"{request.method} is not possible here."}
    message, code = said.get(error.status_code, error.detail), _CODES.get(error.status_code, "not_found")
    return _response(Refused(error.status_code, message, code, headers=dict(error.headers or {})))
