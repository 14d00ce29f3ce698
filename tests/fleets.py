"""A fleet of fake processes, with a fake registry and device; and real versions for the tests that need them."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from slmops.checkpoints import chat_template
from slmops.core import web
from slmops.core.errors import ServingError, TrackingError
from slmops.core.settings import Settings
from slmops.core.values import Variant
from slmops.foundry import layout, prompt_template
from slmops.foundry.versions import Installed, ModelVersion
from slmops.serving import service
from slmops.serving.backend import Backend
from slmops.serving.fleet import Fleet
from slmops.serving.limits import Serve
from tests import making, values

DOWN = TrackingError("MLflow at http://x does not answer.", "Start it.")
BAD = ServingError("bot-int8-generic-cpu:2 failed its smoke test: asked 'Say hello.', it gave status 500.")


def version(number: int, promoted: str = "first") -> ModelVersion:
    return values.model_version(number, tags={"slmops.promoted": promoted})


def installed(number: int) -> Installed:
    foundry_id, folder = f"bot-int8-generic-cpu:{number}", Path(f"/nowhere/bot-int8-generic-cpu-{number}")
    return Installed(name="bot", version=number, variant="int8", foundry_id=foundry_id, folder=folder)


class FakeBackend(Backend):
    def __init__(self, of: Installed, bad: Exception | None = None) -> None:
        super().__init__(of, "http://127.0.0.1:9", None, Path(), Path())  # type: ignore[arg-type]
        self.stopped = False
        self._bad = bad
        self._dead = asyncio.Event()
        self.die = self._dead.set

    @property
    def alive(self) -> bool:
        return not self._dead.is_set()

    async def ended(self) -> str:
        await self._dead.wait()
        return "The process was killed by SIGKILL: it said nothing"

    def memory_mb(self) -> float:
        return 100.0

    async def smoke_test(self) -> None:
        await asyncio.sleep(0)
        if self._bad is not None:
            raise self._bad

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.stopped = True
        self._dead.set()


class World:
    """Processes that are started, and how those of a version fail; a registry and a device, asked in threads."""

    def __init__(self, champion: int | None = 1, count: int = 5) -> None:
        self.registry = self
        self.now = None if champion is None else version(champion)
        self.all = [version(number) for number in range(count, 0, -1)]
        self.last: Installed | None = None
        self.down: Exception | None = None
        self.undeliverable: dict[int, Exception] = {}
        self.unwithdrawable: Exception | None = None
        self.goes_back_to: ModelVersion | None = version(1)
        self.unwritable: Exception | None = None
        self.installs: list[int] = []
        self.withdrawn: list[tuple[int, str]] = []
        self.told: list[str] = []
        self.asked: Counter[str] = Counter()
        self.backends: list[FakeBackend] = []
        self.bad: dict[int, Exception] = {}
        self.unstartable: dict[int, Exception] = {}
        self.held: dict[int, asyncio.Event] = {}

    name = "bot"
    settings = Settings(home=Path("/nowhere"))

    def champion(self, _: str) -> ModelVersion | None:
        self.asked["champion"] += 1
        if self.down:
            raise self.down
        return self.now

    def versions(self, _: str) -> list[ModelVersion]:
        self.asked["versions"] += 1
        return self.all

    def fitting(self, champion: ModelVersion) -> ModelVersion:
        assert champion.others
        return version(int(champion.others[0]))

    def install(self, wanted: ModelVersion) -> Installed:
        self.installs.append(wanted.version)
        if error := self.undeliverable.get(wanted.version):
            raise error
        return installed(wanted.version)

    def tell(self, failure: str) -> None:
        self.told.append(failure)

    def make_current(self, done: Installed) -> None:
        if self.unwritable:
            raise self.unwritable
        self.last = done

    def current(self) -> Installed | None:
        return self.last

    def withdraw(self, failed: ModelVersion, reason: str) -> ModelVersion | None:
        if self.unwithdrawable:
            raise self.unwithdrawable
        self.withdrawn.append((failed.version, reason))
        if self.goes_back_to is not None:
            self.now = self.goes_back_to
        return self.goes_back_to

    async def start(self, of: Installed, _: Settings) -> FakeBackend:
        if of.version in self.held:
            await self.held[of.version].wait()
        if error := self.unstartable.get(of.version):
            raise error
        self.backends.append(FakeBackend(of, self.bad.get(of.version)))
        return self.backends[-1]

    @property
    def running(self) -> list[int]:
        return [one.installed.version for one in self.backends if one.alive]


def fleet(world: World, **options: Any) -> Fleet:
    limits = Serve(**{"poll_s": 0.01, "request_timeout_s": 5, **options})
    return Fleet(world, limits, world.start)  # type: ignore[arg-type]


@asynccontextmanager
async def serving(world: World, **options: Any) -> AsyncIterator[Fleet]:
    """A fleet that watches; nothing may run when it has stopped."""
    made = fleet(world, **options)
    await made.start()
    task = asyncio.create_task(made.run())
    try:
        yield made
        assert not task.done()  # no failure ends the watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.stop()
    assert world.running == []


async def until(true: Callable[[], bool], seconds: float = 3.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def promote(world: World, made: Fleet, number: int, promoted: str = "first", seconds: float = 3) -> None:
    world.now = version(number, promoted)
    await until(lambda: made.version == number, seconds)


async def rounds(world: World, count: int = 4) -> None:
    wanted = world.asked["champion"] + count
    await until(lambda: world.asked["champion"] >= wanted)


async def asked(made: Fleet, model: str = "bot") -> int:
    async with made.lease(model) as backend:
        assert backend.in_flight > 0
        assert backend.alive
        return backend.installed.version


class Device(World):
    def __init__(self, settings: Settings, *versions: Installed) -> None:
        super().__init__(count=len(versions))
        self.settings = settings
        self.here = {one.version: one for one in versions}

    start = Backend.start

    def install(self, wanted: ModelVersion) -> Installed:
        return self.here[wanted.version]


def serve(home: str, version: str, options: str) -> None:
    """Serve a version until SIGTERM: a process of its own, with what it is told as JSON."""
    logging.basicConfig(level=logging.INFO)
    device = Device(Settings(home=Path(home)), Installed.model_validate_json(version))
    limits = Serve.model_validate_json(options)
    token = device.settings.serve_token
    with web.listen("127.0.0.1", 0) as listening:
        made = Fleet(device, limits)  # type: ignore[arg-type]
        asyncio.run(service.serve(made, limits, device.settings.home, listening, token.get_secret_value()))


def place(variant: Variant, model: Path, deployed: Path, **job: Any) -> Installed:
    """Lay a variant out as the next version, as a pull does; with other options of the job it is another version."""
    strings = prompt_template.derive(chat_template.load(variant.path))
    folder, number, _ = layout.place(variant, "bot", making.job(model, **job), strings, deployed)
    foundry_id = f"{layout.model_name('bot', variant.name)}:{number}"
    return Installed(name="bot", version=number, variant=variant.name, foundry_id=foundry_id, folder=folder)


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The runtime processes that a process, or this one, has started."""
    found = []
    for child in psutil.Process(parent).children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # a dead one of another test
            if "slmops.foundry.service_worker" in child.cmdline():
                found.append(child)
    return found
