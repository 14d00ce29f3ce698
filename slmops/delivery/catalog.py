"""``slmops catalog``: the promoted models as a private catalog, for any Foundry Local application on this device.

It holds names, versions and sizes, all read from the registry, and no files: a model shows as cached where it was
pulled, and only there can it be loaded. Foundry's runtime sends no token, so the catalog has none.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from slmops.core import web
from slmops.core.errors import SlmopsError, UsageError
from slmops.foundry import layout, private_catalog
from slmops.foundry.private_catalog import Entry

if TYPE_CHECKING:
    from slmops.foundry.versions import ModelVersion
    from slmops.tracking.registry import Registry

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
KEEP_S = 5.0
"""Seconds for which the registry is not asked again, whether it answered or failed. The runtime tries four times in 4 s
before it goes on with what it knew, and a dead registry takes longer than that to fail each time."""
CLOSE_S = 5
"""Seconds that requests have to end when the catalog is stopped."""


def entries(registry: Registry) -> list[Entry]:
    """What the catalog offers: of each model the champion, and to look up by its id the version before.

    The runtime takes the highest cached version behind an alias. So after a rollback, when the version before is the
    higher one, that has an alias of its own, ``<name>.previous``: else an application would still get it.

    Raises:
        TrackingError: The registry cannot be reached.
    """
    offered = []
    for name in registry.models():
        try:
            champion, previous = registry.champion(name), registry.previous(name)
        except UsageError as error:
            log.warning("%s is not in the catalog: %s", name, error.message)
            continue
        if champion is None:
            continue
        offered.append(_entry(champion, alias=name, latest=True))
        if previous is not None and previous.version != champion.version:
            alias = name if previous.version < champion.version else f"{name}.previous"
            offered.append(_entry(previous, alias=alias, latest=False))
    return offered


def _entry(version: ModelVersion, *, alias: str, latest: bool) -> Entry:
    return Entry(
        alias=alias,
        name=layout.model_name(version.name, version.variant),
        version=version.version,
        display_name=f"{version.name} {version.variant}",
        device=version.device,
        provider=version.provider,
        size_bytes=round(version.size_mb * 1e6),
        created=version.created,
        latest=latest,
    )


class Kept:
    """Entries, read again when they are older than some seconds; many threads may ask, and one of them reads.

    Args:
        read: Reads them.
        keep_s: Seconds for which an answer, or a failure, is kept.
    """

    def __init__(self, read: Callable[[], Sequence[Entry]], keep_s: float = KEEP_S) -> None:
        self._read, self._keep_s = read, keep_s
        self._lock = threading.Lock()
        self._until = float("-inf")
        self._entries: Sequence[Entry] = ()
        self._failure: SlmopsError | None = None

    def __call__(self) -> Sequence[Entry]:
        """The entries.

        Raises:
            SlmopsError: What reading them raised.
        """
        with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._entries, self._failure = self._read(), None
                except SlmopsError as error:
                    self._failure = error
                self._until = time.monotonic() + self._keep_s  # a dead registry takes long to fail: count from its end
            if self._failure is not None:
                raise type(self._failure)(self._failure.message, self._failure.fix)
            return self._entries


def serve(uri: str, host: str, port: int) -> None:
    """Answer until SIGTERM (returns) or Ctrl-C (KeyboardInterrupt).

    Args:
        uri: MLflow's tracking and registry URI.
        host: Address to listen at; beyond loopback anybody who reaches it can read the catalog.
        port: Port; 0 takes a free one.

    Raises:
        UsageError: There is no such address or port.
        PrerequisiteError: The address cannot be listened at.
    """
    with web.listen(host, port) as listener:  # before anything that takes a while, and never let go of
        import uvicorn

        from slmops.tracking.registry import Registry

        registry = Registry(uri)
        app = private_catalog.app(Kept(lambda: entries(registry)))
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSE_S
        )
        address, bound = listener.getsockname()[:2]
        shown = socket.gethostname() if ipaddress.ip_address(address).is_unspecified else host
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}{private_catalog.PATH}"
        if not ipaddress.ip_address(address).is_loopback:
            log.warning("Anybody who reaches %s can read the names and sizes of the promoted models.", host)
        log.info("The catalog answers. In Foundry Local's Configuration: catalog_urls=[(%r, None)]", url)
        server = uvicorn.Server(config)
        # Having ended at a signal, uvicorn sends it to this process again, which by default would be killed.
        before = signal.signal(signal.SIGTERM, server.handle_exit)
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)
