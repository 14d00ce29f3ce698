"""The service of a home as other processes see it: whether one runs, and starting and stopping it in the background."""

import os
import sys
import time
from pathlib import Path

from slmops.core.errors import ServingError
from slmops.core.files import write_atomic
from slmops.core.settings import Settings
from slmops.core.values import Frozen
from slmops.processes import children, daemon
from slmops.processes.daemon import Daemon
from slmops.serving.limits import Serve

SERVING = "serving.json"  # what a service writes down about itself
BACKGROUND = "service.json"  # the process of the service that `ensure` started
READY_S = 180.0


class ServingStatus(Frozen):
    """What is served here, as ``slmops status --json`` prints it."""

    url: str
    model: str
    ok: bool


class Running(Daemon):
    """A service that runs, or was killed."""

    model: str


def status(home: Path) -> ServingStatus | None:
    """The service of this home and whether it answers; None if there is none."""
    import httpx

    running = Running.from_file(home / SERVING)
    if running is None or daemon.leader(running) is None:
        return None
    try:
        ok = httpx.get(f"{running.url}/health", timeout=daemon.HEALTH_S, trust_env=False).status_code == 200
    except httpx.HTTPError:
        ok = False
    return ServingStatus(url=running.url, model=running.model, ok=ok)


def ensure(name: str, settings: Settings, uri: str) -> str:
    """The address of a service of the model on this machine, started if there is none; else a ServingError."""
    running = status(settings.home)
    if running is None or not running.ok:
        stop(settings)
        running = _start(name, settings, uri)
    if running.model != name:
        wrong = f"This home serves {running.model} at {running.url}, and not {name}."
        raise ServingError(wrong, "Stop that service, or set SLMOPS_HOME to another folder.")
    return running.url


def stop(settings: Settings) -> bool:
    """Stop the service that :func:`ensure` started; returns whether it was running."""
    path = settings.home / BACKGROUND
    started = Daemon.from_file(path)
    stopped = started is not None and daemon.stop(started)
    path.unlink(missing_ok=True)
    return stopped


def _start(name: str, settings: Settings, uri: str) -> ServingStatus:
    port = daemon.free_port(Serve().port, ())
    log = settings.logs / "service.log"
    # The settings may come from a .env file, which the service does not see.
    env = {**os.environ, "SLMOPS_HOME": str(settings.home), "SLMOPS_TRACKING_URI": uri}
    if settings.serve_token is not None:
        env["SLMOPS_SERVE_TOKEN"] = settings.serve_token.get_secret_value()
    command = [sys.executable, "-m", "slmops.cli", "serve", name, "--port", str(port)]
    started = daemon.spawn(command, port=port, mark=f"{settings.home}:service", env=env, log=log)
    write_atomic(settings.home / BACKGROUND, started.model_dump_json())
    deadline = time.monotonic() + READY_S
    while daemon.leader(started) is not None and time.monotonic() < deadline:
        running = status(settings.home)
        if running is not None and running.ok:
            return running
        time.sleep(0.2)
    stop(settings)
    raise ServingError(f"The service did not start: {children.last_words(log)}", f"Its log: {log}")
