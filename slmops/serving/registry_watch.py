"""The registry as the service of one model sees it: what is to be served, and what became of it.

A champion other than the version that is served is deployed. If it is at fault (it does not load, or fails its smoke
test), its promotion is withdrawn, and not tried again until there is a new one. If it did not get here (network, disk,
a file that is gone), it is tried again, after pauses. Whatever fails, the version that is served stays.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from slmops.core.errors import RegistrationError, ServingError, SlmopsError, TrackingError
from slmops.core.settings import Settings
from slmops.delivery import installed, pull, trouble
from slmops.foundry.versions import Installed, ModelVersion

if TYPE_CHECKING:
    from slmops.tracking.registry import Registry

Returned = TypeVar("Returned")
log = logging.getLogger(__name__)

AT_FAULT = (RegistrationError, ServingError)  # the version got here, and the runtime cannot serve it
DEPLOY_PAUSE_MOST_S = 300.0
VERSIONS_S = 30.0  # how old the list of versions may become


@dataclass
class VersionSource:
    """The versions of one model: in MLflow's Model Registry, and installed in the Foundry home of this device.

    All of it blocks, and is called in threads, where MLflow is imported too: that takes seconds.
    """

    name: str
    settings: Settings
    uri: str
    _fitting: tuple[tuple[int, list[str]], ModelVersion] | None = None  # by the champion and its others, what fits here

    @cached_property
    def registry(self) -> "Registry":
        from slmops.tracking.registry import Registry

        return Registry(self.uri)

    def fitting(self, champion: ModelVersion) -> ModelVersion:
        """What this device serves of a champion's release; it is looked for only when there is another one."""
        release = (champion.version, champion.others)
        if self._fitting is None or self._fitting[0] != release:
            found = pull.of_release(self.registry.release(champion), self.settings)
            self._fitting = release, found or champion
        best = self._fitting[1]
        promoted = {"slmops.promoted": champion.tags.get("slmops.promoted", "")}
        return best.model_copy(update={"tags": {**best.tags, **promoted}})

    def install(self, version: ModelVersion) -> Installed:
        """Put a version on this device, verified; RegistrationError is its own fault, other errors are not."""
        return pull.install(version, self.settings, self.uri)

    def make_current(self, version: Installed) -> None:
        with installed.locked(version.name, self.settings):
            installed.make_current(version, self.settings)

    def tell(self, failure: str) -> None:
        trouble.tell(self.name, failure, self.settings)

    def current(self) -> Installed | None:
        """What was served last, if it is still here."""
        return installed.current(self.name, self.settings)


@dataclass(eq=False)
class RegistryWatch:
    source: VersionSource
    deploy: Callable[[ModelVersion], Awaitable[None]]  # serves a version instead of the one before, or raises
    note: Callable[[str], None]  # is told each failure, in a sentence
    poll_s: float
    versions: list[ModelVersion] = field(default_factory=list)  # all that the registry had, the newest first
    renew_at: float = 0.0  # when they are to be read again: at the next look, if somebody wants one not in the list
    reachable: bool = True  # the registry answered when it was last asked
    _refused: tuple[int, str] | None = None
    _to_withdraw: tuple[ModelVersion, str] | None = None
    _undelivered: tuple[int, str] | None = None
    _attempts: int = 0
    _retry_at: float = 0.0

    async def ask(self) -> ModelVersion | None:
        """The registry's champion, or what this device is to serve of its release.

        It is a TrackingError if the registry cannot be reached.
        """
        with self._asking():
            champion = await in_thread(lambda: self.source.registry.champion(self.source.name))
            known = {version.version for version in self.versions}
            if time.monotonic() >= self.renew_at or (champion is not None and champion.version not in known):
                self.versions = await in_thread(lambda: self.source.registry.versions(self.source.name))
                self.renew_at = time.monotonic() + VERSIONS_S
            if champion is not None and champion.others:
                return await in_thread(lambda: self.source.fitting(champion))
        return champion

    async def look(self, served: int | None) -> None:
        """Ask the registry, and deploy what it wants if that is another version than ``served``."""
        try:
            await self._withdraw()
            wanted = await self.ask()
        except TrackingError:
            return
        if wanted is None:
            self.note(f"Nothing is promoted any more; version {served} is still served.")
            return
        if wanted.version == served:
            self._refused = self._undelivered = None
            return
        promotion = _promotion(wanted)
        if promotion == self._refused or (promotion == self._undelivered and time.monotonic() < self._retry_at):
            return
        log.info("%s is promoted", wanted.label)
        try:
            await self.deploy(wanted)
        except Exception as error:
            await self.failed(wanted, error)

    async def failed(self, version: ModelVersion, error: Exception) -> None:
        """Withdraw a version that could not be deployed if that is its own fault; otherwise try again later."""
        promotion = _promotion(version)
        if isinstance(error, AT_FAULT):
            self._refused = promotion
            self._to_withdraw = (version, said(error))
            await self._tell(f"{version.label} cannot be served, and its promotion is withdrawn: {said(error)}")
            try:
                await self._withdraw()
            except TrackingError:
                return  # at the next look
        else:
            self._attempts = self._attempts + 1 if promotion == self._undelivered else 1
            self._undelivered = promotion
            pause = min(self.poll_s * 2 ** min(self._attempts, 20), DEPLOY_PAUSE_MOST_S)  # 2.0**1024 overflows
            self._retry_at = time.monotonic() + pause
            await self._tell(f"{version.label} is not here yet, next attempt in {pause:.0f} s: {said(error)}")

    async def _tell(self, failure: str) -> None:
        self.note(failure)
        await in_thread(lambda: self.source.tell(failure))

    async def _withdraw(self) -> None:
        if self._to_withdraw is None:
            return
        version, reason = self._to_withdraw
        try:
            with self._asking():
                champion = await in_thread(lambda: self.source.registry.withdraw(version, reason))
        except TrackingError:
            raise
        except Exception as error:
            self.note(f"The promotion of {version.label} could not be withdrawn: {said(error)}")
        else:
            now = champion.label if champion else "as before"
            log.warning("%s is withdrawn; the champion is %s", version.label, now)
        self._to_withdraw = None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Note whether the registry can be reached, and log when that changes."""
        try:
            yield
        except TrackingError as error:
            if self.reachable:
                log.warning("the registry cannot be reached, what is served stays: %s", error.message)
            self.reachable = False
            raise
        if not self.reachable:
            log.warning("the registry answers again")
        self.reachable = True


def said(error: Exception) -> str:
    return error.message if isinstance(error, SlmopsError) else f"{type(error).__name__}: {error}"


def _promotion(version: ModelVersion) -> tuple[int, str]:
    """What tells one promotion from another, also of the same version."""
    return version.version, version.tags.get("slmops.promoted", "")


async def in_thread(function: Callable[[], Returned]) -> Returned:
    """Call a blocking function in a thread of its own.

    Unlike with the loop's executor, nothing waits for the thread at the end: a registry that does not answer, or a
    download of gigabytes, must not keep the service from stopping.
    """
    done: Future[Returned] = Future()
    done.set_running_or_notify_cancel()  # who leaves does not cancel it

    def work() -> None:
        try:
            done.set_result(function())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(done)
