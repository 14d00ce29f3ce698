"""Prefect and MLflow for a flow that runs in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from slmops.core.errors import WorkError
from slmops.core.settings import Settings
from slmops.local import stack
from slmops.local.stack import Stack


class ServerLostError(WorkError):
    """Prefect's server stopped answering in the middle of a run."""


@contextmanager
def session(settings: Settings) -> Iterator[Stack]:
    """Start the local servers if needed; within the block, import Prefect and run the flow.

    Prefect reads its environment when it is imported, so the block has to import it.

    Raises:
        PrerequisiteError: A server that the settings name does not answer, or one of ours does not start.
        ServerLostError: Prefect's server stopped answering.
    """
    import httpx

    servers = stack.up(settings)
    os.environ.update(stack.prefect_environment(settings, servers))
    try:
        yield servers
    except httpx.TransportError as error:  # MLflow's client has errors of its own: this is Prefect's
        raise ServerLostError(
            f"Prefect at {servers.prefect_url} stopped answering, and the run with it.",
            "`slmops up` starts it again; then repeat the command: what was converted is kept.",
        ) from error
