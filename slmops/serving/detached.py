"""A service that goes on when its starter ends: ``slmops serve`` as one of this home's servers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from slmops.core.errors import ServingError
from slmops.core.files import write_atomic
from slmops.core.settings import Settings
from slmops.processes import children, daemon
from slmops.processes.daemon import Daemon
from slmops.serving import status
from slmops.serving.options import Serve
from slmops.serving.status import ServingStatus

STATE = "service.json"
START_S = 180.0


def ensure(name: str, settings: Settings, uri: str) -> str:
    """The address of a service of the model on this machine, started if there is none.

    Args:
        name: The model, which has a champion.
        settings: Where things are, and the token.
        uri: MLflow tracking server.

    Raises:
        ServingError: It does not start, or this home serves another model.
    """
    running = status.status(settings.home)
    if running is None or not running.ok:
        stop(settings)
        running = _start(name, settings, uri)
    if running.model != name:
        raise ServingError(
            f"This home serves {running.model} at {running.url}, and not {name}.",
            "Stop that service, or set SLMOPS_HOME to another folder.",
        )
    return running.url


def stop(settings: Settings) -> bool:
    """Stop the service that :func:`ensure` started; returns whether it was running."""
    try:
        started = Daemon.model_validate_json(_state(settings).read_bytes())
    except (OSError, ValidationError):
        return False
    stopped = daemon.stop(started)
    _state(settings).unlink(missing_ok=True)
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
    write_atomic(_state(settings), started.model_dump_json())
    deadline = time.monotonic() + START_S
    while daemon.leader(started) is not None and time.monotonic() < deadline:
        running = status.status(settings.home)
        if running is not None and running.ok:
            return running
        time.sleep(0.2)
    stop(settings)
    raise ServingError(f"The service did not start: {children.last_words(log)}", f"Its log: {log}")


def _state(settings: Settings) -> Path:
    return settings.home / STATE
