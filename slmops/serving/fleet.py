"""The processes behind one model name: the champion's, and those of other versions on demand.

A new champion takes over in steps: install, start, smoke test, switch, drain, stop. The old one answers until the
switch, which is one assignment. A request holds the process that it got until it ends, and the drain waits for it. What
is served is known to the registry and written down on this device, so a restarted service finds it again.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from slmops.core.errors import ServingError, UsageError
from slmops.core.settings import Settings
from slmops.foundry.versions import Installed, ModelVersion
from slmops.serving.backend import Backend
from slmops.serving.limits import Serve
from slmops.serving.registry_watch import AT_FAULT, RegistryWatch, VersionSource, in_thread, said
from slmops.serving.requests import Refused, not_now

log = logging.getLogger(__name__)

STEADY_S = 60.0  # a process that lived so long and dies is restarted at once; another, after growing pauses
RESTART_PAUSE_MOST_S = 60.0
RESTART_S = 3.0  # after which a client should ask again while the champion is restarted
BROKEN_S = 60.0  # for which a version that failed is not started again, however many ask for it
IN_USE_RETRY_S = 5.0


class Fleet:
    """The champion of a model under its name, and each version under ``NAME:VERSION``."""

    def __init__(
        self,
        source: VersionSource,
        options: Serve,
        start_process: Callable[[Installed, Settings], Awaitable[Backend]] = Backend.start,
    ) -> None:
        self.name = source.name
        self._source = source
        self._options = options
        self._start_process = start_process
        self.champion: Backend | None = None  # it is served, or being restarted
        self.last_failure = ""  # in a sentence
        self.switches = self.restarts = 0  # to another version; of the champion's process, after it died
        self.watch = RegistryWatch(source, self._deploy, self._note, options.poll_s)
        self._spares = Spares(options.spare, self._install, self._launch)
        self._draining: list[Backend] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tending: asyncio.Task[None] | None = None

    @property
    def version(self) -> int | None:
        return self.champion.installed.version if self.champion else None

    @property
    def ready(self) -> bool:
        return self.champion is not None and self.champion.alive

    @property
    def running(self) -> list[Backend]:
        """All processes; while one is replaced, two may have the same version."""
        return [one for one in (self.champion, *self._spares.loaded, *self._draining) if one is not None and one.alive]

    async def start(self) -> None:
        """Serve the champion, or if that is not possible, the version that was served here last; else an error."""
        wanted: ModelVersion | None = None
        try:
            wanted = await self.watch.ask()
            if wanted is None:
                raise UsageError(f"Nothing of {self.name} is promoted.", f"Run `slmops promote {self.name}` first.")
            await self._deploy(wanted)
            return
        except UsageError:
            raise
        except Exception as error:
            failure = error
        last = await in_thread(self._source.current)
        if last is None and wanted is None:
            lost = f"The registry cannot be reached, and no version of {self.name} is on this device. {said(failure)}"
            raise ServingError(lost, getattr(failure, "fix", None)) from failure
        if last is None or (wanted is not None and wanted.version == last.version and isinstance(failure, AT_FAULT)):
            raise failure
        log.warning("version %d, the last one here, is served: %s", last.version, said(failure))
        self._take_over(await self._launch(last))
        # Only now: if nothing can be served on this device, that is not the champion's fault.
        if wanted is not None and wanted.version != last.version:
            await self.watch.failed(wanted, failure)

    async def run(self) -> None:
        """Watch the registry, until cancelled or stopped."""
        self._tasks |= {task for task in [asyncio.current_task()] if task is not None}
        while True:
            try:
                await self.watch.look(self.version)
            except Exception as error:
                log.exception("a look at the registry failed")
                self._note(f"A look at the registry failed: {said(error)}")
            await asyncio.sleep(self._options.poll_s)

    async def stop(self) -> None:
        """End :meth:`run` and all processes; requests in flight break off."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._spares.stop()
        await asyncio.gather(*(one.stop() for one in (self.champion, *self._draining) if one is not None))
        self.champion = None

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Backend]:
        """A process to send one request for ``model`` to; it is not stopped before the request has ended.

        The model is NAME for the champion, NAME:VERSION, or a version's Foundry id; anything else is Refused.
        """
        backend = await self._acquire(model)
        try:
            yield backend
        finally:
            backend.in_flight -= 1
            backend.used = time.monotonic()

    def models(self) -> list[dict[str, Any]]:
        """What can be asked for, as OpenAI's list of models."""
        champion = self.champion
        if champion is None:
            return []
        created = {one.version: int(one.created.timestamp()) for one in self._offered()}
        created.setdefault(champion.installed.version, int(champion.started))
        rows = [(self.name, created[champion.installed.version])]
        rows += [(f"{self.name}:{number}", created[number]) for number in sorted(created, reverse=True)]
        return [{"id": name, "object": "model", "created": when, "owned_by": "slmops"} for name, when in rows]

    async def _acquire(self, model: str) -> Backend:
        champion = self.champion
        if champion is None:
            raise not_now(f"{self.name} is being loaded.", RESTART_S)
        served = champion.installed
        if model in (self.name, f"{self.name}:{served.version}", served.foundry_id):
            if not champion.alive:
                raise not_now(f"{self.name} is being restarted.", RESTART_S)
            champion.in_flight += 1
            return champion
        for version in self._offered():
            if model in (f"{self.name}:{version.version}", version.foundry_id):
                return await self._spares.acquire(version)
        self.watch.renew_at = 0.0
        raise Refused(404, f"There is no model {model[:100]!r} here.", "model_not_found", "model")

    def _offered(self) -> list[ModelVersion]:
        return [one for one in self.watch.versions if self._options.spare > 0 or one.version == self.version]

    async def _deploy(self, version: ModelVersion) -> None:
        """Make ``version`` the one that is served; if anything raises, nothing has changed."""
        installed = await self._install(version)
        spare = await self._spares.take(version.version)
        self._take_over(await (self._launch(installed) if spare is None else _tested(spare)))
        try:
            await in_thread(lambda: self._source.make_current(installed))
        except Exception as error:
            self._note(f"{version.label} is served, but that could not be written down: {said(error)}")

    async def _install(self, version: ModelVersion) -> Installed:
        return await in_thread(lambda: self._source.install(version))

    async def _launch(self, installed: Installed) -> Backend:
        return await _tested(await self._start_process(installed, self._source.settings))

    def _take_over(self, backend: Backend) -> None:
        old, self.champion = self.champion, backend
        if self._tending is not None:
            self._tending.cancel()
        self._tending = self._spawn(self._tend(backend))
        if old is not None:
            self.switches += 1
            self._draining.append(old)
            self._spawn(self._drain(old))
        log.info("%s is served at %s", backend.installed.foundry_id, backend.url)

    async def _drain(self, old: Backend) -> None:
        """Stop a replaced process as soon as it has answered all its requests."""
        until = time.monotonic() + self._options.request_timeout_s
        try:
            while old.alive and old.in_flight and time.monotonic() < until:
                await asyncio.sleep(0.05)
            if old.alive and old.in_flight:
                self._note(f"{old.installed.foundry_id} was stopped with {old.in_flight} requests unanswered.")
        finally:
            await old.stop()
            self._draining.remove(old)

    async def _tend(self, backend: Backend) -> None:
        """Restart the champion's process whenever it dies; cancelled when another version takes over."""
        deaths = 0
        while True:
            up = time.monotonic()
            ended = await backend.ended()
            self._note(f"{backend.installed.foundry_id} died and is restarted. {ended}")
            await backend.stop()
            deaths = 0 if time.monotonic() - up > STEADY_S else deaths
            while not backend.alive:
                await asyncio.sleep(min(2 ** (deaths - 1), RESTART_PAUSE_MOST_S) if deaths else 0)
                deaths += 1
                try:
                    backend = await self._launch(backend.installed)
                except Exception as error:
                    self._note(f"{backend.installed.foundry_id} cannot be restarted: {said(error)}")
                    for version in self.watch.versions:  # its files may be gone or damaged
                        if version.version == backend.installed.version:
                            try:
                                await self._install(version)
                            except Exception as wrong:
                                log.warning("%s cannot be installed again: %s", version.label, said(wrong))
            self.champion = backend
            self.restarts += 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _note(self, failure: str) -> None:
        if self.last_failure != failure:  # otherwise every look would log it again
            log.warning("%s", failure)
        self.last_failure = failure


async def _tested(backend: Backend) -> Backend:
    """The process, if it passes its smoke test; else it is stopped."""
    try:
        await backend.smoke_test()
    except BaseException:
        await backend.stop()
        raise
    return backend


@dataclass(eq=False)
class Spares:
    """Versions beside the champion, at most ``most``, started on demand; the idle one longest unused makes room."""

    most: int
    install: Callable[[ModelVersion], Awaitable[Installed]]  # puts one on this device
    launch: Callable[[Installed], Awaitable[Backend]]  # starts and tests it
    _room: asyncio.Lock = field(default_factory=asyncio.Lock)
    _loaded: dict[int, Backend] = field(default_factory=dict)
    _starting: dict[int, asyncio.Task[Backend]] = field(default_factory=dict)
    _waiting: Counter[int] = field(default_factory=Counter)
    _broken: dict[int, tuple[float, str]] = field(default_factory=dict)

    @property
    def loaded(self) -> list[Backend]:
        return [backend for backend in self._loaded.values() if backend.alive]

    async def acquire(self, version: ModelVersion) -> Backend:
        """A running process of ``version``, started if there is none, with one more request counted as in flight."""
        backend = self._loaded.get(version.version)
        if backend is None or not backend.alive:
            backend = await self._started(version)
        backend.in_flight += 1
        return backend

    async def take(self, number: int) -> Backend | None:
        """Give a running version away, to be the champion."""
        if number in self._starting:
            await asyncio.wait([self._starting[number]])
        backend = self._loaded.pop(number, None)
        return backend if backend is not None and backend.alive else None

    async def stop(self) -> None:
        for task in list(self._starting.values()):
            task.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        await asyncio.gather(*(backend.stop() for backend in self._loaded.values()))
        self._loaded.clear()

    async def _started(self, version: ModelVersion) -> Backend:
        number = version.version
        until, reason = self._broken.get(number, (0.0, ""))
        if time.monotonic() < until:
            raise not_now(reason, until - time.monotonic())
        if number not in self._starting:
            self._starting[number] = asyncio.create_task(self._start(version))
            self._starting[number].add_done_callback(lambda _: self._starting.pop(number))
        # Those who wait are counted: what was just started must not be stopped before the first of them has it.
        self._waiting[number] += 1
        try:
            # Shielded: a client that goes away does not end what others wait for.
            return await asyncio.shield(self._starting[number])
        finally:
            self._waiting[number] -= 1

    async def _start(self, version: ModelVersion) -> Backend:
        try:
            installed = await self.install(version)
            async with self._room:
                await self._make_room()
                backend = await self.launch(installed)
                self._loaded[version.version] = backend
                return backend
        except Refused:
            raise
        except Exception as error:
            reason = f"{version.label} cannot be served: {said(error)}"
            log.warning("%s", reason)
            self._broken[version.version] = (time.monotonic() + BROKEN_S, reason)
            raise not_now(reason, BROKEN_S) from error

    async def _make_room(self) -> None:
        for number, backend in list(self._loaded.items()):
            if not backend.alive:
                await self._loaded.pop(number).stop()
        while len(self._loaded) >= self.most:
            idle = [number for number, one in self._loaded.items() if not one.in_flight and not self._waiting[number]]
            if not idle:
                full = f"No more than {self.most} versions beside the champion can be loaded, and all are in use."
                raise not_now(full, IN_USE_RETRY_S)
            oldest = min(idle, key=lambda number: self._loaded[number].used)
            log.info("%s makes room", self._loaded[oldest].installed.foundry_id)
            await self._loaded.pop(oldest).stop()
