"""A fleet of real processes: two versions of a tiny model under load while the champion switches, and broken ones."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from slmops.core.settings import Settings
from slmops.serving.backend import Backend
from slmops.serving.fleet import Fleet
from tests import fleets, making
from tests.fleets import Device, until

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

WAIT_S = 60.0


@pytest.fixture(scope="module")
def device(talkative: Path, stock: Settings, home: Settings) -> Device:
    """Two good versions, and three broken ones beside them."""
    variant = making.variant("fp32", making.job(talkative), stock)
    versions = [fleets.place(variant, talkative, home.deployed, top_p=n / 10) for n in range(1, 6)]
    folders = [one.folder for one in versions]
    # Other weights of the same shapes: the model says something else.
    weights = np.fromfile(folders[1] / "model.onnx.data", np.float32) * np.float32(1.3)
    # What an interrupted download leaves, and what other models may be like: the runtime reads everything it finds.
    unfinished = folders[0].parent / ".aaa.0.part"
    shutil.copytree(folders[0], unfinished, ignore=shutil.ignore_patterns("model.onnx*"))
    garbage = folders[0].parent / "garbage-1"
    garbage.mkdir()
    for path, content in (
        (folders[1] / "model.onnx.data", weights.tobytes()),
        (folders[2] / "model.onnx.data", b""),
        (folders[3] / "genai_config.json", b"{garbage"),
        (garbage / "inference_model.json", b"{"),
    ):
        path.unlink(missing_ok=True)  # it is a link to the one in the stock
        path.write_bytes(content)
    shutil.rmtree(folders[4])
    return Device(home, *versions)


@asynccontextmanager
async def serving(device: Device) -> AsyncIterator[Fleet]:
    """A fleet that serves version 1 and watches."""
    device.now = fleets.version(1)
    async with fleets.serving(device, poll_s=0.2, request_timeout_s=30) as fleet:
        yield fleet
    assert fleets.workers() == []
    assert list((device.settings.deployed / "serving" / "bot").iterdir()) == []


async def answer(backend: Backend, *, stream: bool = False) -> str:
    """The greedy answer."""
    question = {"role": "user", "content": "What is the capital of France?"}
    asked: Any = {"model": backend.installed.foundry_id, "messages": [question], "temperature": 0, "max_tokens": 24}
    async with openai.AsyncOpenAI(base_url=f"{backend.url}/v1", api_key="none", max_retries=0) as client:
        if not stream:
            return (await client.chat.completions.create(**asked)).choices[0].message.content or ""
        pieces: Any = await client.chat.completions.create(**asked, stream=True)
        return "".join([piece.choices[0].delta.content or "" async for piece in pieces if piece.choices])


async def test_no_request_fails_while_the_champion_switches(device: Device) -> None:
    async with serving(device) as fleet:
        expected = {}
        for number in (1, 2):
            async with fleet.lease(f"bot:{number}") as backend:
                expected[number] = await answer(backend)
        assert expected[1] != expected[2]
        assert all(expected.values())
        assert [one.installed.version for one in fleet.running] == [1, 2]
        answers: list[tuple[int, str]] = []
        done = asyncio.Event()

        async def load(stream: bool) -> None:
            while not done.is_set():
                async with fleet.lease("bot") as backend:
                    answers.append((backend.installed.version, await answer(backend, stream=stream)))

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


async def test_a_broken_version_leaves_the_old_one(device: Device) -> None:
    async with serving(device) as fleet:
        [before] = fleet.running
        for number, fault in ((3, "refuses"), (4, "refuses"), (5, "does not find")):
            device.now = fleets.version(number)
            await until(lambda number=number: number in dict(device.withdrawn), WAIT_S)  # type: ignore[misc]
            said = f"Foundry Local {fault} bot-fp32-generic-cpu:{number}"
            assert said in dict(device.withdrawn)[number]
            assert said in fleet.last_failure
            assert fleet.running == [before]
            assert len(fleets.workers()) == 1
        assert await answer(before)
