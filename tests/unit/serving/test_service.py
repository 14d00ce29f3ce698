"""The service around the proxy: its address, its life, its signals."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from slmops.core import web
from slmops.core.errors import PrerequisiteError, ServingError, UsageError
from slmops.core.settings import Settings
from slmops.serving import service
from slmops.serving.limits import Serve
from tests.upstream import CHAT, GOOD, OneFleet, Script, Upstream, answer, endless, held

pytestmark = pytest.mark.anyio


class Service:
    """A service that runs in this process, with a scripted runtime behind it."""

    def __init__(self, fleet: OneFleet, home: Path, port: int, task: asyncio.Task[None], upstream: Upstream) -> None:
        self.fleet = fleet
        self.note = home / "serving.json"
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.task = task
        self.upstream = upstream

    async def answers(self, status: int = 200) -> None:
        """Wait until /health has this status, and then for what the service writes down."""
        async with asyncio.timeout(5), httpx.AsyncClient(trust_env=False) as client:
            while (await client.get(self.url + "/health")).status_code != status:
                await asyncio.sleep(0.01)
            while status == 200 and not self.note.exists():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(home: Path, script: Script = answer, starts: asyncio.Event | None = None) -> AsyncIterator[Service]:
    upstream = Upstream(script)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with upstream.listening() as url:
        fleet = OneFleet(url)
        fleet.starts, fleet.champion = starts, None if starts else fleet.champion
        listening = web.listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        task = asyncio.create_task(service.serve(fleet, Serve(), home, listening, None))  # type: ignore[arg-type]
        one = Service(fleet, home, port, task, upstream)
        try:
            await one.answers(200 if starts is None else 503)
            yield one
        finally:
            upstream.let_go.set()
            if not task.done():
                signal.raise_signal(signal.SIGTERM)
            await asyncio.gather(task, return_exceptions=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def test_it_says_where_it_is_and_takes_that_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with serving(tmp_path) as one:
            assert json.loads(one.note.read_text(encoding="utf-8")) == {
                "pid": os.getpid(),
                "created": psutil.Process().create_time(),
                "url": one.url,
                "model": "bot",
            }
            assert f"serving bot version 3 (int8) at {one.url}" in caplog.messages
            signal.raise_signal(signal.SIGTERM)
            await one.task
            assert not one.note.exists()
            assert one.fleet.log == ["started", "stopped"]


async def test_another_services_note_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as one:
        one.note.write_text("{}", encoding="utf-8")
        signal.raise_signal(signal.SIGINT)
        await one.task
        assert one.note.read_text(encoding="utf-8") == "{}"


async def test_while_it_loads_clients_are_told_so_and_it_can_be_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path, starts=asyncio.Event()) as one:
        async with httpx.AsyncClient(trust_env=False) as client:
            health = await client.get(one.url + "/health")
            assert health.json() == {"status": "unavailable", "model": "bot", "version": None}
        signal.raise_signal(signal.SIGTERM)
        await one.task
        assert one.fleet.log == ["stopped"]
        assert not one.note.exists()


async def test_a_fleet_that_has_nothing_to_serve_ends_it(tmp_path: Path) -> None:
    starts = asyncio.Event()

    async with serving(tmp_path, starts=starts) as one:
        one.fleet.refuses = ServingError("no", "fix")
        starts.set()
        with pytest.raises(ServingError, match="no"):
            await one.task
        assert one.fleet.log == ["stopped"]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", one.port)) != 0


async def test_a_running_request_is_finished_and_no_new_one_is_taken(tmp_path: Path) -> None:
    async with serving(tmp_path, script=held) as one, httpx.AsyncClient(trust_env=False) as client:
        asked = asyncio.create_task(client.post(one.url + CHAT, json=GOOD))
        while not one.upstream.received:
            await asyncio.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            await client.get(one.url + "/health")
        assert not one.task.done()
        one.upstream.let_go.set()
        assert (await asked).status_code == 200
        assert one.fleet.log == ["started"]
        await one.task


@pytest.mark.parametrize("twice", [False, True])
async def test_a_request_that_does_not_end_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    if not twice:
        monkeypatch.setattr(service, "FINISH_S", 1)
    async with (
        serving(tmp_path, script=endless) as one,
        httpx.AsyncClient(trust_env=False) as client,
        client.stream("POST", one.url + CHAT, json={**GOOD, "stream": True}) as streaming,
    ):
        pieces = streaming.aiter_raw()  # who drops it leaves
        await anext(pieces)
        signal.raise_signal(signal.SIGINT)
        if twice:
            await asyncio.sleep(0.3)
            assert not one.task.done()
            signal.raise_signal(signal.SIGINT)
        await asyncio.wait_for(one.task, 8)
        assert one.fleet.log == ["started", "stopped"]


async def test_a_request_that_turns_out_not_to_be_http_is_answered_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\n"  # without a type it is refused at once
        writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
        answered = await asyncio.wait_for(reader.read(), 3)
        assert answered.startswith(b"HTTP/1.1 400")
        assert answered.count(b"HTTP/1.1") == 1
        writer.close()
    assert not any(record.exc_info for record in caplog.records)


async def test_more_connections_than_there_can_be_get_a_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "IDLE_CONNECTIONS", 4 - Serve().concurrency - Serve().queue)
    async with serving(tmp_path) as one:
        opened = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(4)]
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(one.url + "/health")).status_code == 503
            for _, writer in opened:
                writer.close()
            await one.answers(200)


# --- the address


@pytest.mark.parametrize(
    ("options", "settings", "error", "named"),
    [
        *(
            ({"host": host}, {}, UsageError, "SLMOPS_SERVE_TOKEN")
            for host in ("0.0.0.0", "::", "192.0.2.1", "server.example")  # noqa: S104 - it is refused
        ),
        *(
            ({}, {"serve_token": SecretStr(token)}, UsageError, "SLMOPS_SERVE_TOKEN")
            for token in ("s\u00e9cret", "two words", "line\nbreak")
        ),
        ({"host": "no.such.invalid"}, {"serve_token": SecretStr("t")}, UsageError, "no.such.invalid"),
        ({"host": "192.0.2.1"}, {"serve_token": SecretStr("t")}, PrerequisiteError, "192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    options: dict[str, Any],
    settings: dict[str, Any],
    error: type[Exception],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("something is loaded")

    monkeypatch.setattr(service, "Fleet", loads)
    with pytest.raises(error) as caught:
        service.run("bot", Serve(**options), Settings(home=tmp_path, **settings), "sqlite://")
    said = f"{caught.value.message} {caught.value.fix}"  # type: ignore[attr-defined]
    assert named in said
    if "serve_token" in settings and named == "SLMOPS_SERVE_TOKEN":
        assert settings["serve_token"].get_secret_value() not in said


def test_the_token_and_the_options_reach_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def fleet(source: Any, limits: Serve) -> None:
        told.update(name=source.name, limits=limits)

    async def serve(_fleet: Any, options: Serve, home: Path, _socket: Any, token: str | None, *, local: bool) -> None:
        told.update(options=options, home=home, token=token, local=local)

    monkeypatch.setattr(service, "Fleet", fleet)
    monkeypatch.setattr(service, "serve", serve)
    with web.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    options = Serve(port=port, host="0.0.0.0", spare=2, poll_s=7, request_timeout_s=11)  # noqa: S104
    service.run("bot", options, Settings(home=tmp_path, serve_token=SecretStr("t")), "sqlite://")
    expected = {"name": "bot", "limits": options, "options": options, "home": tmp_path, "token": "t", "local": False}
    assert told == expected


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("localhost", "http://localhost:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),  # noqa: S104
        ("::1", "http://[::1]:8080"),
        ("::", "http://[::1]:8080"),
    ],
)
def test_the_url_is_one_that_a_client_can_use(host: str, url: str) -> None:
    assert service._url(host, 8080) == url
