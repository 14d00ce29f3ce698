"""A fleet of real processes: two versions of a tiny model, under load while the champion switches."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from slmops.core.errors import ServingError
from slmops.core.settings import Settings
from slmops.core.values import Variant
from slmops.foundry.versions import Installed, ModelVersion
from slmops.serving.backend import CHAT, Backend
from slmops.serving.fleet import Fleet
from slmops.serving.limits import Serve
from tests import fleets, making
from tests.fleets import until

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 24
WAIT_S = 60.0
# A service that starts one process, tells its number and is killed then.
SERVICE = """
import asyncio, sys
from slmops.foundry.versions import Installed
from slmops.serving.backend import Backend
from slmops.core.settings import Settings

async def main():
    backend = await Backend.start(Installed.model_validate_json(sys.argv[1]), Settings(home=sys.argv[2]))
    print(backend._child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


class Device(fleets.World):
    """What is installed on a device, and a registry that names one of it."""

    def __init__(self, settings: Settings, here: dict[int, Installed]) -> None:
        super().__init__(count=len(here))
        self.settings = settings
        self.here = here

    def install(self, wanted: ModelVersion) -> Installed:
        return self.here[wanted.version]

    def current(self) -> Installed:
        return self.here[1]


def own(path: Path) -> Path:
    """A file that is no longer a link to the one in the stock."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def change(weights: Path) -> None:
    """Other weights of the same shapes: the model says something else."""
    values = np.fromfile(own(weights), np.float32)
    (values * np.float32(1.3)).tofile(weights)


def no_weights(folder: Path) -> None:
    own(folder / "model.onnx.data").write_bytes(b"")


def no_config(folder: Path) -> None:
    own(folder / "genai_config.json").write_text("{garbage")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def variant(talkative: Path, stock: Settings) -> Variant:
    return making.variant("fp32", making.job(talkative), stock)


@pytest.fixture(scope="module")
def device(variant: Variant, talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """Two good versions, and a broken one beside them; nothing but the champion is altered."""
    settings = Settings(home=tmp_path_factory.mktemp("device"))
    versions = [fleets.place(variant, talkative, settings.deployed, max_length=512 * number) for number in (1, 2, 3)]
    change(versions[1].folder / "model.onnx.data")
    # What an interrupted download leaves, and what other models may be like: the runtime reads everything it finds.
    models = versions[0].folder.parent
    unfinished = models / ".aaa.0.part"
    unfinished.mkdir()
    for file in ("inference_model.json", "genai_config.json"):
        shutil.copy(versions[0].folder / file, unfinished / file)
    (models / "garbage-1").mkdir()
    (models / "garbage-1" / "inference_model.json").write_text("{")
    return Device(settings, {one.version: one for one in versions})


async def ask(backend: Backend, client: httpx.AsyncClient, *, stream: bool = False) -> str:
    """The greedy answer."""
    question = {"model": backend.installed.foundry_id, "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    if not stream:
        response = await client.post(backend.url + CHAT, json=question)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])
    pieces = []
    async with client.stream("POST", backend.url + CHAT, json={**question, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]  # and comments
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            pieces.append(choice["delta"].get("content") or "")
    return "".join(pieces)


@asynccontextmanager
async def serving(device: Device) -> AsyncIterator[tuple[Fleet, httpx.AsyncClient]]:
    """A fleet that serves version 1 and watches, and a client."""
    device.now = fleets.version(1)
    device.withdrawn.clear()
    made = Fleet(device, Serve(poll_s=0.2, request_timeout_s=30))  # type: ignore[arg-type]
    async with fleets.watching(made) as fleet, httpx.AsyncClient(timeout=60, trust_env=False) as client:
        yield fleet, client
    assert fleets.workers() == []
    assert list((device.settings.deployed / "serving" / "bot").iterdir()) == []


async def one_answer(fleet: Fleet, client: httpx.AsyncClient, model: str = "bot", *, stream: bool = False) -> str:
    async with fleet.lease(model) as backend:
        return await ask(backend, client, stream=stream)


async def test_no_request_fails_while_the_champion_switches(device: Device) -> None:
    async with serving(device) as (fleet, client):
        expected = {number: await one_answer(fleet, client, f"bot:{number}") for number in (1, 2)}
        assert expected[1] != expected[2]
        assert all(expected.values())
        assert [one.installed.version for one in fleet.running] == [1, 2]
        answers: list[tuple[int, str]] = []
        done = asyncio.Event()

        async def load(stream: bool) -> None:
            while not done.is_set():
                async with fleet.lease("bot") as backend:
                    number = backend.installed.version
                    answers.append((number, await ask(backend, client, stream=stream)))

        loads = [asyncio.create_task(load(stream)) for stream in (True, False, True, False)]
        for number in (2, 1, 2, 1):
            count = len(answers)
            await fleets.promote(device, fleet, number, seconds=WAIT_S)
            await until(lambda count=count: len(answers) > count + 10, WAIT_S)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*loads)  # raises what any of them raised
        assert {number for number, _ in answers} == {1, 2}
        assert [(number, text) for number, text in answers if text != expected[number]] == []
        assert (fleet.switches, fleet.restarts, fleet.last_failure) == (4, 0, "")
        await until(lambda: len(fleet.running) == 1, WAIT_S)
        assert len(fleets.workers()) == 1
        assert 10 < fleet.running[0].memory_mb() < 1000


async def test_a_killed_process_comes_back(device: Device) -> None:
    async with serving(device) as (fleet, client):
        before = await one_answer(fleet, client)
        [worker] = fleets.workers()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises((httpx.HTTPError, ServingError)):
            await one_answer(fleet, client)
        await until(lambda: fleet.restarts == 1, WAIT_S)
        assert await one_answer(fleet, client) == before
        assert "was killed by SIGKILL" in fleet.last_failure


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_weights, "Foundry Local refuses bot-fp32-generic-cpu:3"),
        (no_config, "Foundry Local refuses bot-fp32-generic-cpu:3"),
        (gone, "Foundry Local does not find bot-fp32-generic-cpu:3"),
    ],
)
async def test_a_broken_version_leaves_the_old_one(
    device: Device, damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = device.here[3].folder
    shutil.copytree(folder, tmp_path / "kept")

    try:
        async with serving(device) as (fleet, client):
            before = await one_answer(fleet, client)
            damage(folder)
            device.now = fleets.version(3)
            await until(lambda: bool(device.withdrawn), WAIT_S)
            assert await one_answer(fleet, client) == before
            assert fleet.version == 1
            [(number, reason)] = device.withdrawn
            assert number == 3
            assert said in reason
            assert said in fleet.last_failure
            assert len(fleets.workers()) == 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(tmp_path / "kept", folder)


async def test_processes_end_with_the_service(device: Device) -> None:
    argv = [sys.executable, "-c", SERVICE, device.here[1].model_dump_json(), str(device.settings.home)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        worker = psutil.Process(int(service.stdout.readline()))
        assert worker.is_running()
        service.kill()
    deadline = time.monotonic() + 5
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    # Its scratch folder is left, and removed when the next one starts.
    scratch = device.settings.deployed / "serving" / "bot"
    assert len(list(scratch.iterdir())) == 1

    backend = await Backend.start(device.here[1], device.settings)
    assert len(list(scratch.iterdir())) == 1
    await backend.smoke_test()
    await backend.stop()
    await backend.stop()
    assert not backend.alive
    with pytest.raises(ServingError, match="SIGTERM"):
        await backend.smoke_test()
    assert list(scratch.iterdir()) == []


async def test_a_start_that_is_cancelled_leaves_no_process(device: Device) -> None:
    for pause in (0.0, 0.05, 0.1):  # a start takes 0.3 s and more
        start = asyncio.create_task(Backend.start(device.here[1], device.settings))
        await asyncio.sleep(pause)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert fleets.workers() == []
    assert list((device.settings.deployed / "serving" / "bot").iterdir()) == []
