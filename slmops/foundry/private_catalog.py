"""The protocol in which Foundry Local asks a catalog for models, answered from a list of entries.

It is not documented: this is what the runtime of foundry-local-sdk 2.2.1 was seen to send, and its library knows no
other filters. With ``catalog_urls=[(url + PATH, None)]`` a runtime sends POST requests with filters, and a model in the
answer must satisfy all of them. It asks so for what a device can run, for models by name (those in its cache, and ids
that it does not know yet), and for all versions behind an alias. A filter that this module does not know is an error:
an answer that ignores it would be wrong.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from slmops.core.errors import SlmopsError, UsageError
from slmops.core.validation import problems
from slmops.core.values import Frozen
from slmops.core.web import read_body
from slmops.foundry.layout import PUBLISHER

if TYPE_CHECKING:
    from starlette.applications import Starlette

PATH = "/asset-gallery/v1.0/models"
BODY_BYTES = 64 * 1024  # of the largest request
BODY_TIMEOUT_S = 10.0  # for a request to arrive
RETRY_AFTER_S = 5  # for an application to wait while the registry is down
MESSAGE_LIMIT = 1000  # characters of an error message, which may quote what was sent


class Entry(Frozen):
    """One version of a model that the catalog offers."""

    alias: str = Field(description="What an application asks for.")
    name: str = Field(description="Foundry's name, such as support-bot-int4-generic-cpu.")
    version: int
    display_name: str
    device: str = "cpu"
    provider: str = "CPUExecutionProvider"
    size_bytes: int
    created: datetime
    abilities: frozenset[str] = Field(frozenset(), description="Of tools and reasoning, what it can do.")
    latest: bool = Field(True, description="It is listed; others can still be looked up by name or alias.")


FIELDS: dict[str, Callable[[Entry], tuple[str, ...]]] = {
    "type": lambda _: ("models",),
    "kind": lambda _: ("Versioned",),
    "name": lambda entry: (entry.name,),
    "labels": lambda entry: ("latest",) if entry.latest else (),
    "annotations/archived": lambda _: ("false",),
    "annotations/systemCatalogData/deploymentOptions": lambda _: ("Foundry Local on Devices",),
    "annotations/tags/alias": lambda entry: (entry.alias,),
    "annotations/tags/foundryLocal": lambda _: ("",),
    "properties/variantInfo/variantMetadata/device": lambda entry: (entry.device,),
    "properties/variantInfo/variantMetadata/executionProvider": lambda entry: (entry.provider,),
}
"""The fields that a filter may name, and what an entry has there."""
OPERATORS: dict[str, Callable[[set[str], tuple[str, ...]], bool]] = {
    "eq": lambda wanted, has: not wanted.isdisjoint(has),
    "NotEquals": lambda unwanted, has: unwanted.isdisjoint(has),
}
"""How a filter's values are compared with what an entry has."""


class Filter(Frozen):
    """One condition: the entry's value at ``field`` is, or is not, one of ``values``."""

    field: str
    operator: str
    values: tuple[str, ...]


class Query(Frozen):
    """The body of a request; each page gives the token with which the next one is asked for."""

    filters: tuple[Filter, ...] = Field(max_length=50)
    page_size: int = Field(50, alias="pageSize", ge=1, le=1000, strict=True)
    continuation_token: str | None = Field(None, alias="continuationToken", pattern=r"^[0-9]{1,9}$")


def answer(body: bytes, entries: Sequence[Entry]) -> bytes:
    """Answer a request with a page of the entries that satisfy all its filters, both in JSON.

    A UsageError if the body is not such a request, or names an unknown field or operator.
    """
    try:
        query = Query.model_validate_json(body)
    except ValidationError as error:
        raise UsageError(f"Not a catalog request: {problems(error)[0]}.") from error
    for condition in query.filters:
        for kind, name, known in (("field", condition.field, FIELDS), ("operator", condition.operator, OPERATORS)):
            if name not in known:
                raise UsageError(f"This catalog has no filter {kind} {name[:100]!r}. It has {', '.join(known)}.")
    found = [
        entry
        for entry in entries
        if all(OPERATORS[one.operator](set(one.values), FIELDS[one.field](entry)) for one in query.filters)
    ]
    begin = int(query.continuation_token or 0)
    end = begin + query.page_size
    more = {"continuationToken": str(end)} if end < len(found) else {}
    return json.dumps({"value": [_entity(entry) for entry in found[begin:end]], **more}).encode()


def _entity(entry: Entry) -> dict[str, Any]:
    identity = f"azureml://registries/{PUBLISHER}/models/{entry.name}/versions/{entry.version}"
    tags = {"alias": entry.alias, "task": "chat-completion", "foundryLocal": "", "promptTemplate": ""}
    claims = {"tools": "supportsToolCalling", "reasoning": "supportsReasoning"}
    tags |= {claims[ability]: "true" for ability in entry.abilities}
    data = {"publisher": PUBLISHER, "displayName": entry.display_name, "inferenceTasks": ["chat-completion"]}
    runs_on = {"modelType": "ONNX", "device": entry.device, "executionProvider": entry.provider}
    properties = {
        "id": identity,
        "name": entry.name,
        "version": entry.version,
        "variantInfo": {"parents": [], "variantMetadata": {**runs_on, "fileSizeBytes": entry.size_bytes}},
        "creationContext": {"createdTime": entry.created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
    }
    annotations = {"tags": tags, "systemCatalogData": data}
    return {"assetId": identity, "entityId": identity, "annotations": annotations, "properties": properties}


def app(entries: Callable[[], Sequence[Entry]]) -> "Starlette":
    """A web application that answers at :data:`PATH`, and at ``/health``.

    ``entries`` is called for each request, in a thread; if it raises an error of ours, the answer has status 503.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def offered() -> Sequence[Entry]:
        try:
            return entries()
        except SlmopsError as error:
            raise HTTPException(503, error.message, {"retry-after": str(RETRY_AFTER_S)}) from error

    async def models(request: Request) -> Response:
        body = await read_body(request, BODY_BYTES, BODY_TIMEOUT_S)
        page = await run_in_threadpool(lambda: answer(body, offered()))
        return Response(page, media_type="application/json")

    async def health(_: Request) -> Response:
        offers = await run_in_threadpool(offered)
        return JSONResponse({"status": "ok", "models": len({entry.alias for entry in offers if entry.latest})})

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, UsageError):
            error = HTTPException(400, error.message)
        elif isinstance(error, ClientDisconnect):
            error = HTTPException(400, "The client went away.")
        elif not isinstance(error, HTTPException):
            error = HTTPException(500, "The catalog failed; its log says how.")
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        said = {"message": error.detail[:MESSAGE_LIMIT], "type": kind}
        return JSONResponse({"error": said}, error.status_code, error.headers)

    return Starlette(
        routes=[Route(PATH, models, methods=["POST"]), Route("/health", health)],
        exception_handlers=dict.fromkeys((UsageError, ClientDisconnect, HTTPException, Exception), refuse),
    )
