"""Runs of a deployment without a worker: each process that a worker would start is a call here."""

import contextlib
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from pydantic import BaseModel


def start(flow: Flow[..., Any], request: BaseModel, name: str | None = None) -> UUID:
    """A run that waits for a worker, as the Run button makes one."""
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(flow), name=flow.name)
        parameters = {"request": request.model_dump(mode="json", exclude_unset=True)}
        return client.create_flow_run_from_deployment(deployment, parameters=parameters, name=name).id


def work(flow: Flow[..., Any], run: UUID) -> Any:
    """What a worker's process does with a run, until it ends or is suspended; returns the flow's result."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run)
    with contextlib.suppress(Pause):
        return run_flow(flow, flow_run=found)
    return None


def state(run: UUID) -> State[Any]:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state
