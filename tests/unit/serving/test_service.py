"""The service around the proxy: its address, its life, its signals, and what is seen of it from outside."""

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import ANY, AsyncMock, Mock

import httpx
import psutil
import pytest
from pydantic import SecretStr

from slmops.core import web
from slmops.core.errors import PrerequisiteError, ServingError, SlmopsError, UsageError
from slmops.core.settings import Settings
from slmops.serving import service
from slmops.serving.home_service import SERVING, Running, ServingStatus, status
from slmops.serving.limits import Serve
from slmops.serving.registry_watch import VersionSource
from tests.answering import answering
from tests.upstream import CHAT, OneFleet, Script, Stand, Upstream, answer, chat, client_of, endless, held

pytestmark = pytest.mark.anyio


@dataclass
class Service(Stand):
    note: Path
    task: asyncio.Task[None]

    async def answers(self, status: int = 200) -> None:
        """Wait until /health has this status, and then for what the service writes down."""
        async with asyncio.timeout(5):
            while (await self.client.get("/health")).status_code != status or self.note.exists() != (status == 200):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(home: Path, script: Script = answer, starts: asyncio.Event | None = None) -> AsyncIterator[Service]:
    upstream = Upstream(script)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    listening = web.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    async with upstream.listening() as url, client_of(port) as client:
        fleet = OneFleet(url)
        fleet.starts, fleet.champion = starts, None if starts else fleet.champion
        task = asyncio.create_task(service.serve(fleet, Serve(), home, listening, None))
        one = Service(client, upstream, fleet, port, home / SERVING, task)
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
            me, url = psutil.Process(), f"http://127.0.0.1:{one.port}"
            told = {"pid": me.pid, "created": me.create_time(), "url": url, "model": "bot"}
            assert json.loads(one.note.read_text(encoding="utf-8")) == told
            assert f"serving bot version 3 (int8) at {url}" in caplog.messages
            signal.raise_signal(signal.SIGTERM)
            await one.task
            assert not one.note.exists()
            assert one.fleet.log == ["started", "stopped"]


async def test_while_it_loads_it_can_be_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path, starts=asyncio.Event()) as one:  # meanwhile /health answers 503
        signal.raise_signal(signal.SIGTERM)
        await one.task
        assert one.fleet.log == ["stopped"]


async def test_a_fleet_that_has_nothing_to_serve_ends_it(tmp_path: Path) -> None:
    async with serving(tmp_path, starts=(starts := asyncio.Event())) as one:
        one.fleet.refuses = ServingError("no", "fix")
        starts.set()
        with pytest.raises(ServingError, match="no"):
            await one.task
        assert one.fleet.log == ["stopped"]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", one.port)) != 0


async def test_a_running_request_is_finished_and_no_new_one_is_taken(tmp_path: Path) -> None:
    async with serving(tmp_path, script=held) as one:
        asked = asyncio.create_task(one.ask())
        while not one.upstream.received:
            await asyncio.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            await one.client.get("/health")
        assert not one.task.done()
        one.upstream.let_go.set()
        assert ((await asked).status_code, one.fleet.log) == (200, ["started"])
        await one.task


@pytest.mark.parametrize("twice", [False, True])
async def test_a_request_that_does_not_end_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    if not twice:
        monkeypatch.setattr(service, "FINISH_S", 1)
    async with (
        serving(tmp_path, script=endless) as one,
        one.client.stream("POST", CHAT, json=chat(stream=True)) as streaming,
    ):
        pieces = streaming.aiter_raw()  # who drops it leaves
        await anext(pieces)
        one.note.write_text("{}", encoding="utf-8")
        signal.raise_signal(signal.SIGINT)
        if twice:
            await asyncio.sleep(0.3)
            assert not one.task.done()
            signal.raise_signal(signal.SIGINT)
        await asyncio.wait_for(one.task, 8)
        assert one.fleet.log == ["started", "stopped"]
        assert one.note.read_text(encoding="utf-8") == "{}"  # another service's note stays


async def test_what_turns_out_not_to_be_http_is_answered_once_and_more_connections_than_there_can_be_get_a_503(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IDLE_CONNECTIONS", 4 - Serve().concurrency - Serve().queue)
    async with serving(tmp_path) as one:
        # Refused at once, for its kind.
        reader, writer = await one.post("transfer-encoding: chunked", kind="text/plain", body=b"zz\r\n")
        answered = await asyncio.wait_for(reader.read(), 3)
        assert answered.startswith(b"HTTP/1.1 400")
        assert answered.count(b"HTTP/1.1") == 1
        writer.close()
        opened = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(4)]
        assert (await one.client.get("/health")).status_code == 503
        for _, writer in opened:
            writer.close()
        await one.answers()
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("host", "token", "error", "named"),
    [
        ("0.0.0.0", None, UsageError, "SLMOPS_SERVE_TOKEN"),  # noqa: S104 - it is refused
        *((host, None, UsageError, "SLMOPS_SERVE_TOKEN") for host in ("server.example", "192.0.2.1", "::")),
        ("localhost", "s\u00e9cret", UsageError, "SLMOPS_SERVE_TOKEN"),
        ("localhost", "two words", UsageError, "SLMOPS_SERVE_TOKEN"),
        ("localhost", "line\nbreak", UsageError, "SLMOPS_SERVE_TOKEN"),
        ("192.0.2.1", "xyz", PrerequisiteError, "192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    host: str, token: str | None, error: type[SlmopsError], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "Fleet", None)
    settings = Settings(serve_token=None if token is None else SecretStr(token))
    with pytest.raises(error) as caught:
        service.run("bot", Serve(host=host), settings, "sqlite://")
    said = f"{caught.value.message} {caught.value.fix}"
    assert named in said
    assert token is None or token not in said


def test_the_token_and_the_options_reach_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Mock(serve=AsyncMock())
    for name in ("Fleet", "serve"):
        monkeypatch.setattr(service, name, getattr(calls, name))
    with web.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    options = Serve(port=port, host="0.0.0.0", spare=2, poll_s=7, request_timeout_s=11)  # noqa: S104
    settings = Settings(home=tmp_path, serve_token=SecretStr("t"))
    service.run("bot", options, settings, "sqlite://")
    calls.Fleet.assert_called_once_with(VersionSource("bot", settings, "sqlite://"), options)
    calls.serve.assert_called_once_with(calls.Fleet.return_value, options, tmp_path, ANY, "t", local=False)


def test_the_url_is_one_that_a_client_can_use() -> None:
    same = {host: host for host in ("127.0.0.1", "localhost")}
    for host, shown in {**same, "0.0.0.0": "127.0.0.1", "::1": "[::1]", "::": "[::1]"}.items():  # noqa: S104
        assert service._url(host, 8080) == f"http://{shown}:8080"


def note(home: Path, url: str = "http://127.0.0.1:9", pid: int = os.getpid(), later: float = 0) -> None:
    running = Running(pid=pid, created=psutil.Process().create_time() + later, url=url, model="bot")
    (home / SERVING).write_text(running.model_dump_json())


def test_its_status(tmp_path: Path) -> None:
    assert status(tmp_path) is None
    codes = [503, 200]
    with answering(lambda request, _: (codes.pop() if request.path == "/health" else 404, "")) as url:
        note(tmp_path, url)
        for ok in (True, False):
            assert status(tmp_path) == ServingStatus(url=url, model="bot", ok=ok)
    assert status(tmp_path) == ServingStatus(url=url, model="bot", ok=False)  # it hangs, or does not listen
    note(tmp_path, pid=2**22 + 1)  # killed
    assert status(tmp_path) is None
    note(tmp_path, later=-60)  # the number is another process's by now
    assert status(tmp_path) is None
    (tmp_path / SERVING).write_text("{half")
    assert status(tmp_path) is None
