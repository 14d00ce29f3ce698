"""A device tells Prefect's server, if it knows one, that it could not get a version, or could not serve it.

It is an event there, and `slmops deploy --notify` says whom it is sent to. Devices have no Prefect, so its REST API is
asked.
"""

import socket
from contextlib import suppress
from datetime import UTC, datetime
from uuid import uuid4

from slmops.core.settings import Settings

FAILED_DEVICE, ROLLED_BACK = "slmops.device.failed", "slmops.champion.rolled-back"
"""Events; the other one is emitted where Prefect is at hand."""

SECONDS = 5.0


def tell(name: str, reason: str, settings: Settings) -> None:
    """Report it of the model ``name``. Where no server answers, the device's log is all that says it."""
    if settings.prefect_api_url is None:
        return
    import httpx

    host = socket.gethostname()
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": FAILED_DEVICE,
        "resource": {"prefect.resource.id": f"slmops.device.{name}.{host}", "prefect.resource.name": host},
        "payload": {"model": name, "device": host, "reason": reason},
    }
    with suppress(httpx.HTTPError, httpx.InvalidURL):
        httpx.post(f"{settings.prefect_api_url.rstrip('/')}/events", json=[event], timeout=SECONDS)
