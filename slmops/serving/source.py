"""Where a fleet gets its versions from: the registry, and what is on this device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from slmops.core.settings import Settings
from slmops.foundry.versions import Installed, ModelVersion

if TYPE_CHECKING:
    from slmops.tracking.registry import Registry

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Source(Protocol):
    """The versions of one model. All methods block, and are called in threads.

    Those that ask the registry raise TrackingError when it cannot be reached.
    """

    def champion(self) -> ModelVersion | None:
        """The version that shall be served; None: none is promoted."""

    def versions(self) -> list[ModelVersion]:
        """All versions in the registry, the newest first."""

    def install(self, version: ModelVersion) -> Installed:
        """Have a version on this device, verified; twice is harmless.

        Raises:
            RegistrationError: The runtime on this device refuses it.
            SlmopsError: It did not get here, which says nothing about the version.
        """

    def make_current(self, installed: Installed) -> None:
        """Remember what is served."""

    def current(self) -> Installed | None:
        """What was served last, if it is still here."""

    def withdraw(self, version: ModelVersion, reason: str) -> ModelVersion | None:
        """Undo the promotion of a version that cannot be served, and return the champion now, if there is one."""


class RegistrySource:
    """The model ``name`` in MLflow's Model Registry, installed in the Foundry home of this device."""

    def __init__(self, name: str, settings: Settings, uri: str) -> None:
        self.name = name
        self.settings = settings
        self.uri = uri
        self._registry: Registry | None = None

    def champion(self) -> ModelVersion | None:
        """See :class:`Source`."""
        return self._connected().champion(self.name)

    def versions(self) -> list[ModelVersion]:
        """See :class:`Source`."""
        return self._connected().versions(self.name)

    def install(self, version: ModelVersion) -> Installed:
        """See :class:`Source`."""
        from slmops.delivery import pull

        return pull.install(version, self.settings, self.uri)

    def make_current(self, installed: Installed) -> None:
        """See :class:`Source`."""
        from slmops.delivery.installed import make_current

        make_current(installed, self.settings)

    def current(self) -> Installed | None:
        """See :class:`Source`."""
        from slmops.delivery import installed

        return installed.current(self.name, self.settings)

    def withdraw(self, version: ModelVersion, reason: str) -> ModelVersion | None:
        """See :class:`Source`."""
        return self._connected().withdraw(version, reason)

    def _connected(self) -> Registry:
        if self._registry is None:
            from slmops.tracking.registry import (
                Registry,  # MLflow takes seconds to import: in a thread, not at the start
            )

            self._registry = Registry(self.uri)
        return self._registry


async def in_thread(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call a blocking function in a thread of its own.

    Unlike the loop's executor nobody waits for the thread at the end: a registry that does not answer, or a download of
    gigabytes, must not keep the service from stopping.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def work() -> None:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            tell(future.set_exception, error)
        else:
            tell(future.set_result, result)

    def tell(settle: Callable[..., None], value: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is interested any more
            loop.call_soon_threadsafe(lambda: None if future.done() else settle(value))

    threading.Thread(target=work, daemon=True).start()
    return await future
