"""Prefect for a command that runs a flow: the servers are up, and its environment is set before it is imported."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from slmops.cli.terminal import say
from slmops.core.errors import WorkError
from slmops.core.settings import Settings
from slmops.local import stack
from slmops.local.stack import Stack


@contextmanager
def prefect_running() -> Iterator[Stack]:
    """Start the servers if needed. The block is to import the flow, because Prefect reads its environment then."""
    settings = Settings()
    servers = stack.up(settings)
    os.environ.update(stack.prefect_environment(settings, servers))
    signal.signal(signal.SIGTERM, _interrupt)
    logging.raiseExceptions = False  # records that a dead Prefect server does not take are lost without noise
    try:
        yield servers
    except httpx.TransportError:  # MLflow's client has errors of its own: this is Prefect's
        say(
            f"error: Prefect at {servers.prefect_url} stopped answering, and the run with it.\n"
            "  `slmops up` starts it again; then repeat the command: what was converted is kept."
        )
        os._exit(WorkError.exit_code)  # a normal exit waits a long time, because Prefect tries to send its last events


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt  # so that children are ended and MLflow's runs closed on the way out
