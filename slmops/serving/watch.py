"""What the registry wants served, and what became of it.

The registry's champion is compared with the version that is served. While they are the same there is nothing to do::

    another version -> deploy it -> done
                          |
                          +-- the version is at fault (it does not load, or fails its smoke test):
                          |       its promotion is withdrawn, and not tried again until there is a new one
                          +-- it did not get here (network, disk, a file that is gone): tried again, after pauses

Whatever fails, the version that is served stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from slmops.core.errors import RegistrationError, ServingError, SlmopsError, TrackingError
from slmops.foundry.versions import ModelVersion
from slmops.serving.source import Source, in_thread

log = logging.getLogger(__name__)

PAUSE_MOST_S = 300.0
VERSIONS_S = 30.0
"""How old the list of versions may become."""


class Watch:
    """The registry as one model's service sees it.

    Args:
        source: The registry.
        deploy: Serves a version instead of the one before; raises if that does not work.
        note: Told of each failure, in a sentence.
        poll_s: Seconds between looks.

    Attributes:
        versions: All versions that the registry had when it was last asked for them, the newest first.
        unreachable_since: Since when the registry has not answered; None if it did.
    """

    def __init__(
        self,
        source: Source,
        deploy: Callable[[ModelVersion], Awaitable[None]],
        note: Callable[[str], None],
        poll_s: float,
    ) -> None:
        self._source = source
        self._deploy = deploy
        self._note = note
        self._poll_s = poll_s
        self.versions: list[ModelVersion] = []
        self.unreachable_since: datetime | None = None
        self._renew_at = 0.0
        self._refused: tuple[int, str] | None = None
        self._to_withdraw: tuple[ModelVersion, str] | None = None
        self._undelivered: tuple[int, str] | None = None
        self._attempts = 0
        self._retry_at = 0.0

    def renew(self) -> None:
        """Ask for the list of versions at the next look: somebody wants one that it does not have."""
        self._renew_at = 0.0

    async def ask(self) -> ModelVersion | None:
        """The registry's champion.

        Raises:
            TrackingError: The registry cannot be reached.
        """
        try:
            champion = await in_thread(self._source.champion)
            known = {version.version for version in self.versions}
            if time.monotonic() >= self._renew_at or (champion is not None and champion.version not in known):
                self.versions = await in_thread(self._source.versions)
                self._renew_at = time.monotonic() + VERSIONS_S
        except TrackingError as error:
            self._lost(error)
            raise
        if self.unreachable_since is not None:
            log.warning("the registry answers again")
            self.unreachable_since = None
        return champion

    async def look(self, served: int | None) -> None:
        """Ask the registry, and deploy what it wants if that is another version than ``served``."""
        try:
            await self._withdraw()
            wanted = await self.ask()
        except TrackingError:
            return
        if wanted is None:
            self._note(f"Nothing is promoted any more; version {served} is served on.")
            return
        if wanted.version == served:
            self._refused = self._undelivered = None
            return
        promotion = _promotion(wanted)
        waits = promotion == self._undelivered and time.monotonic() < self._retry_at
        if promotion == self._refused or waits:
            return
        log.info("%s is promoted", wanted.label)
        try:
            await self._deploy(wanted)
        except Exception as error:
            await self.failed(wanted, error)

    async def failed(self, version: ModelVersion, error: Exception) -> None:
        """Draw the consequences of a version that could not be deployed."""
        promotion = _promotion(version)
        if at_fault(error):
            self._refused = promotion
            self._to_withdraw = (version, said(error))
            self._note(f"{version.label} cannot be served, and its promotion is withdrawn: {said(error)}")
            try:
                await self._withdraw()
            except TrackingError:
                return  # at the next look
        else:
            self._attempts = self._attempts + 1 if promotion == self._undelivered else 1
            self._undelivered = promotion
            pause = min(self._poll_s * 2 ** min(self._attempts, 20), PAUSE_MOST_S)  # 2**1024 is no float
            self._retry_at = time.monotonic() + pause
            self._note(f"{version.label} is not here yet, next attempt in {pause:.0f} s: {said(error)}")

    async def _withdraw(self) -> None:
        """Tell the registry of a version that failed, if it has not been told yet."""
        if self._to_withdraw is None:
            return
        version, reason = self._to_withdraw
        try:
            champion = await in_thread(self._source.withdraw, version, reason)
        except TrackingError as error:
            self._lost(error)
            raise
        except Exception as error:
            self._note(f"The promotion of {version.label} could not be withdrawn: {said(error)}")
        else:
            log.warning(
                "%s is withdrawn; the champion is %s", version.label, champion.label if champion else "as before"
            )
        self._to_withdraw = None

    def _lost(self, error: TrackingError) -> None:
        if self.unreachable_since is None:
            self.unreachable_since = datetime.now(UTC)
            log.warning("the registry cannot be reached, what is served stays: %s", error.message)


def at_fault(error: Exception) -> bool:
    """Whether a failure is the version's own: it got here, and the runtime cannot serve it."""
    return isinstance(error, RegistrationError | ServingError)


def said(error: Exception) -> str:
    """An error in a sentence."""
    return error.message if isinstance(error, SlmopsError) else f"{type(error).__name__}: {error}"


def _promotion(version: ModelVersion) -> tuple[int, str]:
    """What tells one promotion from another, also of the same version."""
    return version.version, version.tags.get("slmops.promoted", "")
