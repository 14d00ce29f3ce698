"""Prefect for a command that runs a flow, with the signals and the exit that suit a terminal."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slmops.cli.terminal import say
from slmops.core.settings import Settings
from slmops.local.session import ServerLostError, session
from slmops.local.stack import Stack


@contextmanager
def prefect_running() -> Iterator[Stack]:
    """Start the servers if needed. The block is to import the flow, because Prefect reads its environment then."""
    signal.signal(signal.SIGTERM, _interrupt)
    logging.raiseExceptions = False  # records that a dead Prefect server does not take are lost without noise
    try:
        with session(Settings()) as servers:
            yield servers
    except ServerLostError as error:
        say(f"error: {error}")
        os._exit(error.exit_code)  # a normal exit waits a long time, because Prefect tries to send its last events


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt  # so that children are ended and MLflow's runs closed on the way out
