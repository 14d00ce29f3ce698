"""Starting, testing and ending one version's process; the process is a script, its web service scripted."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from slmops.core.errors import PrerequisiteError, ServingError, SlmopsError
from slmops.core.settings import Settings
from slmops.foundry import service_worker
from slmops.foundry.versions import Installed
from slmops.processes import children as processes
from slmops.serving import backend as module
from slmops.serving.backend import Backend
from tests import fleets
from tests.upstream import Script, Upstream, answer, chunk, event, held, replies, streams

pytestmark = pytest.mark.anyio
WAIT = "sys.stdin.read()\n"
LISTENS = f'print(json.dumps({{"url": "http://127.0.0.1:9"}}), flush=True)\n{WAIT}'
MAKES = "request = json.loads(sys.argv[1])\nos.makedirs(request['scratch'])\n"
Start = Callable[[str], Awaitable[Backend]]


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    folder = tmp_path / "home" / "deployed" / "models" / "slmops" / "bot-int8-generic-cpu-1"
    folder.mkdir(parents=True)
    return fleets.installed(1).model_copy(update={"folder": folder})


@pytest.fixture
def start(installed: Installed, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setattr(module, "SERVICE_WORKER", "scripted_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def with_code(code: str) -> Awaitable[Backend]:
        (tmp_path / "scripted_worker.py").write_text(f"import json, os, signal, sys, time\n{code}")
        return Backend.start(installed, settings)

    return with_code


def left(settings: Settings) -> tuple[list[psutil.Process], list[Path]]:
    """Processes and scratch folders."""
    processes = [one for one in psutil.Process().children() if "scripted_worker" in one.cmdline()]
    return processes, list((settings.deployed / "serving" / "bot").glob("*"))


@pytest.mark.parametrize(
    ("code", "raised", "said"),
    [
        (f"print('garbage', flush=True)\n{WAIT}", ServingError, "announces nothing"),
        ("sys.exit('no such library')", ServingError, "The process ended with status 1: no such library"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ServingError, "The process was killed by SIGSEGV: it said nothing"),
        ("sys.exit('OSError: No space left on device')", PrerequisiteError, "The disk is full"),
        ("print('loading', file=sys.stderr, flush=True)\n" + WAIT, ServingError, "did not listen within 1 s: loading"),
        ('print(\'{"error": "PrerequisiteError", "message": "M"}\', flush=True)\n' + WAIT, PrerequisiteError, "M"),
        ('print(\'{"error": "KeyError", "message": "refused"}\', flush=True)\n' + WAIT, ServingError, "refused"),
    ],
)
async def test_a_process_that_does_not_start(
    code: str, raised: type[SlmopsError], said: str, start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LISTEN_S", 0.6 if "did not listen" in said else 60.0)
    with pytest.raises(raised) as caught:
        await start(code)
    assert said in caught.value.message
    assert caught.value.fix
    assert left(settings) == ([], [])


async def test_a_process_from_start_to_stop(
    installed: Installed, settings: Settings, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    code = f"{MAKES}print(json.dumps({{**request, **dict(os.environ)}}), file=sys.stderr)\n{LISTENS}"
    before = os.environ.copy()
    log = settings.logs / "bot" / "serve-1.log"
    backend = await start(code)
    assert (backend.url, backend.installed, backend.in_flight) == ("http://127.0.0.1:9", installed, 0)
    assert backend.alive
    [child], [scratch] = left(settings)
    if hasattr(os, "getpgid"):
        assert os.getpgid(child.pid) == child.pid
    with monkeypatch.context() as patched:
        # Memory is measured in the event loop, for /metrics: the kernel must not walk through all pages meanwhile.
        patched.delattr(psutil.Process, "memory_full_info")
        patched.delattr(psutil.Process, "children")
        assert 1 < backend.memory_mb() < 500
    told = json.loads(log.read_text())
    assert (told["foundry_id"], told["folder"]) == ("bot-int8-generic-cpu:1", str(installed.folder))
    assert (told["scratch"], told["MALLOC_ARENA_MAX"]) == (str(scratch), "1")
    assert told["NO_PROXY"].endswith("127.0.0.1,::1")
    assert os.environ.copy() == before
    await backend.stop()
    assert not backend.alive
    assert backend.memory_mb() == 0
    assert await backend.ended() == f"The process was killed by SIGTERM: {log.read_text().strip()}"
    assert left(settings) == ([], [])
    with pytest.raises(ServingError, match="crashed in its smoke test"):
        await backend.smoke_test()
    await backend.stop()
    # The log of the run before is kept.
    again = await start(code)
    assert json.loads(log.with_name("serve-1.log.1").read_text())["scratch"] == told["scratch"]
    await again.stop()


async def test_a_process_that_does_not_want_to_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS
    backend = await start(ignores)
    await backend.stop()
    assert "killed by SIGKILL" in await backend.ended()
    # Also if the one that stops it is cancelled.
    backend = await start(ignores)
    monkeypatch.setattr(processes, "GRACE_S", 60)
    stopping = asyncio.create_task(backend.stop())
    await asyncio.sleep(0.1)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    assert "killed by SIGKILL" in await backend.ended()


async def test_a_start_that_is_cancelled_leaves_no_process(start: Start, settings: Settings) -> None:
    for pause in (0.0, 0.05, 0.3):
        starting = asyncio.ensure_future(start(MAKES + WAIT))
        await asyncio.sleep(pause)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert left(settings) == ([], [])


async def test_a_log_that_cannot_be_written(installed: Installed, settings: Settings) -> None:
    settings.logs.write_text("a file")
    with pytest.raises(PrerequisiteError, match="bot-int8-generic-cpu:1"):
        await Backend.start(installed, settings)


DONE = b"data: [DONE]\n\n"


def counted(tokens: int, finish: str | None = "stop") -> dict[str, Any]:
    return {"usage": {"completion_tokens": tokens}, "choices": [{"finish_reason": finish}]}


async def smoke(url: str) -> None:
    child: Any = SimpleNamespace(returncode=None, wait=asyncio.Event().wait)
    await Backend(fleets.installed(1), url, child, Path("/nowhere"), Path("/nowhere")).smoke_test()


@pytest.mark.parametrize("delta", [{"content": "a"}, {"content": "", "reasoning_content": "hm"}])
async def test_a_smoke_test_that_passes(delta: dict[str, str]) -> None:
    """The thoughts of a model may take all the tokens that it has."""
    script = streams(event({"choices": [{"delta": delta}]}), DONE)
    upstream = Upstream(lambda to: (script if to.body.get("stream") else answer)(to))
    async with upstream.listening() as url:
        await smoke(url)
    assert [one.get("stream", False) for one in upstream.received] == [False, True]
    assert {one["model"] for one in upstream.received} == {"bot-int8-generic-cpu:1"}
    assert all(one["temperature"] == 0 and one["max_tokens"] > 0 for one in upstream.received)


@pytest.mark.parametrize(
    ("streamed", "script", "said"),
    [
        (False, replies(counted(0)), "'Say hello.'"),
        (False, replies(b"oh", 500), "status 500: oh"),
        (False, replies(counted(3), 400), "status 400, finish reason 'stop'"),
        (False, replies(counted(3, None)), "status 200, finish reason None"),
        (False, replies({"usage": None, "choices": []}), "status 200: {"),
        (True, replies(b"oh", 500), "status 500"),
        (True, streams(event(chunk("Hello"))), "['data: {"),
        (True, streams(event(chunk("")), DONE), "without text"),
        (True, streams(b"data: x\n\n", DONE), "['data: x'"),
        (True, streams(event({"choices": [{"delta": None}]}), DONE), "['data: {"),
    ],
)
async def test_a_smoke_test_that_fails(streamed: bool, script: Script, said: str) -> None:
    upstream = Upstream(lambda to: (script if to.body.get("stream", False) == streamed else answer)(to))
    async with upstream.listening() as url:
        with pytest.raises(ServingError) as caught:
            await smoke(url)
    assert said in caught.value.message
    assert "bot-int8-generic-cpu:1" in caught.value.message


async def test_a_smoke_test_takes_no_more_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMOKE_S", 0.3)
    async with Upstream(held).listening() as url:
        with pytest.raises(ServingError, match="longer than 0 s"):
            await smoke(url)
    with pytest.raises(ServingError, match="ConnectError"):  # where nothing listens
        await smoke("http://127.0.0.1:9")


def test_a_cache_of_its_own_where_there_are_links(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = service_worker.ServiceRequest(
        foundry_id="x:1", folder=installed.folder, scratch=tmp_path / "scratch", logs=tmp_path
    )
    cache = service_worker._cache(request)
    assert cache.parent == request.scratch
    [link] = (cache / "slmops").iterdir()
    assert (link.name, link.resolve()) == (installed.folder.name, installed.folder)
    monkeypatch.setattr(Path, "symlink_to", Mock(side_effect=OSError("Operation not supported")))
    other = request.model_copy(update={"scratch": tmp_path / "other"})
    assert service_worker._cache(other) == installed.folder.parent.parent
