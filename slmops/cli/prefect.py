"""Prefect for a command that runs a flow, with the signals and the exit that suit a terminal."""

import json as jsonlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from slmops.cli.terminal import output, say
from slmops.core.settings import Settings
from slmops.foundry.versions import Promotion
from slmops.local.stack import ServerLostError, Stack, session
from slmops.processes import tree
from slmops.training.values import Retrain


@contextmanager
def prefect_running() -> Iterator[Stack]:
    """Start the servers if needed. The block is to import the flow, because Prefect reads its environment then."""
    # As Ctrl-C, so that children are ended and MLflow's runs closed on the way out.
    for number in tree.ASKING:
        signal.signal(number, signal.default_int_handler)
    logging.raiseExceptions = False  # records that a dead Prefect server does not take are lost without noise
    try:
        with session(Settings()) as servers:
            yield servers
    except ServerLostError as error:
        say(f"error: {error}")
        os._exit(error.exit_code)  # a normal exit waits a long time, because Prefect tries to send its last events


def hand_over(flow: str, request: Retrain | Promotion, *, json: bool) -> None:
    """Leave a run that waits for a person to a worker."""
    from flows.promote import hand_over

    url = hand_over(flow, request)
    output(jsonlib.dumps({"url": url}) if json else url)
    say("A worker does this. It stops before the promotion, until somebody decides on that page.")
