"""What the tests of the private catalog share: entries, requests, and servers."""

import asyncio
import json
import socket
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Self

import uvicorn

from slmops.foundry import private_catalog
from slmops.foundry.private_catalog import PATH, Entry
from slmops.foundry.versions import ModelVersion
from tests import values

MADE = datetime(2026, 11, 22, 21, 30, tzinfo=UTC)


def entry(name: str, version: int, **changed: Any) -> Entry:
    usual = {"alias": name.partition("-")[0], "display_name": name, "size_bytes": 1000 * version, "created": MADE}
    return Entry(name=f"{name}-generic-cpu", version=version, **{**usual, **changed})


BOT3, BOT2, FAQ1 = entry("bot-int8", 3), entry("bot-int4", 2, latest=False), entry("faq-fp32", 1)
ENTRIES = [BOT3, BOT2, FAQ1]
DEVICE = "properties/variantInfo/variantMetadata/device"
PROVIDER = "properties/variantInfo/variantMetadata/executionProvider"
OPTIONS = "annotations/systemCatalogData/deploymentOptions"


def condition(field: str, *values: str, operator: str = "eq") -> dict[str, Any]:
    return {"field": field, "operator": operator, "values": list(values)}


# Word for word what foundry-local-sdk 2.2.1 sends.
COMMON = [condition("type", "models"), condition("kind", "Versioned")]
HARDWARE = [condition(DEVICE, "cpu"), condition(PROVIDER, "CPUExecutionProvider")]
LIST = [
    *COMMON,
    condition(OPTIONS, "Foundry Local on Devices"),
    condition("annotations/archived", "true", operator="NotEquals"),
    condition("labels", "latest"),
    *HARDWARE,
]


def body(*filters: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"filters": filters, "pageSize": 50, **more}).encode()


def found(answered: bytes) -> list[tuple[str, int]]:
    return [(one["properties"]["name"], one["properties"]["version"]) for one in json.loads(answered)["value"]]


def ids(*entries: Entry) -> list[tuple[str, int]]:
    return [(one.name, one.version) for one in entries]


class Exchange:
    """A request by hand, its body in pieces: what a client library does not send, and many of them take time."""

    def __init__(self, pieces: Sequence[dict[str, Any]], headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.left, self.headers, self.sent = list(pieces), list(headers), list[dict[str, Any]]()

    async def run(self, application: Any, method: str = "POST", path: str = PATH) -> None:
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": self.headers}
        await application(scope, self.receive, self.send)

    async def receive(self) -> dict[str, Any]:
        if not self.left:
            await asyncio.sleep(60)  # a client that says nothing more
        return self.left.pop(0)

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def answered(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent))


class Server:
    """A catalog on a real server in a thread, which keeps what it is sent."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.bodies: list[bytes] = []
        self._app = private_catalog.app(lambda: self.entries)
        self._server = uvicorn.Server(uvicorn.Config(self, lifespan="off", log_config=None, log_level="warning"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}{PATH}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()

        async def keep() -> Any:
            message = await receive()
            body.extend(message.get("body", b"")[:100_000])
            return message

        await self._app(scope, keep, send)
        self.bodies.append(bytes(body))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def version(number: int, variant: str = "fp32", **changed: Any) -> ModelVersion:
    return values.model_version(number, **{"name": "tiny", "variant": variant, "created": MADE, **changed})


class FakeRegistry:
    """Champions and what was before, by name."""

    def __init__(self, **models: tuple[ModelVersion | None, ModelVersion | None] | Exception) -> None:
        self._models = models
        self.models = models.keys

    def champion(self, name: str, at: int = 0) -> ModelVersion | None:
        found = self._models[name]
        if isinstance(found, Exception):
            raise found
        return found[at]

    def previous(self, name: str) -> ModelVersion | None:
        return self.champion(name, 1)

    def release(self, version: ModelVersion) -> list[ModelVersion]:
        """With one for WebGPU, if its tags name one."""
        made_for = {"variant": "fp32-webgpu", "device": "gpu", "provider": "WebGpuExecutionProvider"}
        return [version, *(version.model_copy(update={**made_for, "version": int(one)}) for one in version.others)]
