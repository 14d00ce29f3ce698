"""``slmops catalog``: the promoted models as a private catalog, for any Foundry Local application on this device.

It holds names, versions and sizes, all read from the registry, and no files: a model is shown as cached where it was
pulled, and can be loaded only there. Foundry's runtime sends no token, so the catalog asks for none.
"""

import contextlib
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
from slmops.processes import tree

if TYPE_CHECKING:
    from slmops.tracking.registry import Registry

log = logging.getLogger(__name__)

KEEP_S = 5.0
"""Seconds before the registry is asked again, whether it answered or failed. The runtime tries four times in 4 s and
then goes on with what it knew; a registry that is down takes longer than that to fail."""
CLOSE_S = 5  # seconds that requests have to end when the catalog is stopped


def entries(registry: "Registry") -> list[Entry]:
    """What the catalog offers: the champion of each model and, to be looked up by its id, the version before it; both
    for each target of their releases, of which the runtime sees what its device can run.

    The runtime takes the highest cached version behind an alias. After a rollback that would still be the version
    before, so it then has an alias of its own, ``<name>.previous``.
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
        before = [previous] if previous is not None and previous.version != champion.version else []
        releases = [(released, version) for released in (champion, *before) for version in registry.release(released)]
        for released, version in releases:
            offered.append(
                Entry(
                    alias=name if released.version <= champion.version else f"{name}.previous",
                    name=layout.model_name(version.name, version.variant),
                    version=version.version,
                    display_name=f"{version.name} {version.variant}",
                    device=version.device,
                    provider=version.provider,
                    size_bytes=round(version.size_mb * 1e6),
                    created=version.created,
                    abilities=version.abilities,
                    latest=released is champion,
                )
            )
    return offered


class Kept:
    """Entries, or a failure to read them, kept for ``keep_s`` seconds; many threads may ask, and one of them reads."""

    def __init__(self, read: Callable[[], Sequence[Entry]], keep_s: float = KEEP_S) -> None:
        self._read, self._keep_s = read, keep_s
        self._lock = threading.Lock()
        self._until = float("-inf")
        self._answer: Sequence[Entry] | SlmopsError = ()

    def __call__(self) -> Sequence[Entry]:
        """The entries, or the error that reading them raised."""
        with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._answer = self._read()
                except SlmopsError as error:
                    self._answer = error
                self._until = time.monotonic() + self._keep_s  # from the end: a registry that is down fails slowly
            if isinstance(self._answer, SlmopsError):
                raise type(self._answer)(self._answer.message, self._answer.fix)
            return self._answer


def serve(uri: str, host: str, port: int) -> None:
    """Answer at an address and port (0: a free one) until SIGTERM (returns) or Ctrl-C (KeyboardInterrupt)."""
    with web.listen(host, port) as listener:  # before anything that takes a while
        import uvicorn

        from slmops.tracking.registry import Registry

        registry = Registry(uri)
        app = private_catalog.app(Kept(lambda: entries(registry)))
        config = uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=CLOSE_S)
        address, bound = listener.getsockname()[:2]
        shown = socket.gethostname() if ipaddress.ip_address(address).is_unspecified else host
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}{private_catalog.PATH}"
        if not ipaddress.ip_address(address).is_loopback:
            log.warning("Anybody who reaches %s can read the names and sizes of the promoted models.", host)
        log.info("The catalog answers. In Foundry Local's Configuration: catalog_urls=[(%r, None)]", url)
        server = uvicorn.Server(config)
        # When uvicorn has stopped at a signal, it sends it to this process again, which would be killed by default.
        with contextlib.ExitStack() as signals:
            for number in tree.ASKING:
                signals.callback(signal.signal, number, signal.signal(number, server.handle_exit))
            server.run(sockets=[listener])
