"""What a service writes down, and what ``slmops status`` makes of it."""

from __future__ import annotations

from pathlib import Path

import psutil
from pydantic import ValidationError

from slmops.core.values import Frozen
from slmops.processes.daemon import HEALTH_S

SERVING = "serving.json"


class ServingStatus(Frozen):
    """What is served here, as ``slmops status --json`` prints it."""

    url: str
    model: str
    ok: bool


class Running(Frozen):
    """A service that runs, or was killed."""

    pid: int
    created: float
    url: str
    model: str


def status(home: Path) -> ServingStatus | None:
    """The service of this home and whether it answers; None if there is none."""
    try:
        running = Running.model_validate_json((home / SERVING).read_bytes())
        process = psutil.Process(running.pid)
        # Seconds, not equality: the creation time moves with the system clock when that is set.
        if abs(process.create_time() - running.created) > 2 or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except (OSError, ValidationError, psutil.Error):
        return None
    return ServingStatus(url=running.url, model=running.model, ok=_answers(f"{running.url}/health"))


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, timeout=HEALTH_S, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
