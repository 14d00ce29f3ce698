"""Versions beside the champion: started when somebody asks for one; the idle one longest unused makes room."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from slmops.foundry.versions import Installed, ModelVersion
from slmops.serving.backend import Backend
from slmops.serving.registry_watch import said
from slmops.serving.requests import Refused, not_now

log = logging.getLogger(__name__)

BROKEN_S = 60.0  # for which a version that failed is not started again, however many ask for it
IN_USE_RETRY_S = 5.0


@dataclass(eq=False)
class Spares:
    """At most ``most`` running versions; ``install`` puts one on this device, ``launch`` starts and tests it."""

    most: int
    install: Callable[[ModelVersion], Awaitable[Installed]]
    launch: Callable[[Installed], Awaitable[Backend]]
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
