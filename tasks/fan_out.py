"""Parts of a job on other machines: as flow runs in Prefect, and their files in MLflow."""

from __future__ import annotations

import contextvars
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import Task, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, State, StateType, WorkPoolStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Crashed, Pending
from pydantic import ValidationError

from slmops.cluster import parts
from slmops.cluster.exchange import Exchange
from slmops.cluster.parts import Files, Part, Result, Workplace
from slmops.core.errors import PrerequisiteError, WorkError
from slmops.core.job import Job
from slmops.core.pools import Pool
from slmops.core.settings import Settings
from slmops.core.validation import problems
from slmops.core.values import Checkpoint, Variant, VariantFile
from slmops.tracking import exchange as tracking_exchange
from tasks.stage import stage

log = logging.getLogger("slmops.fan_out")

FLOW, ENTRYPOINT = "variant", "flows.variant.variant"
ENVIRONMENT = {
    "PREFECT_CLIENT_MAX_RETRIES": "6",  # two minutes, in which a server is back that was restarted
    "PREFECT_LOGGING_EXTRA_LOGGERS": "slmops",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""What a part needs of Prefect, on whatever worker."""
AWAY_S = 600.0
"""Seconds that a job waits for a Prefect server that does not answer."""
PAUSE_S = 2.0

LABEL = "slmops.beat"
BEAT_S = 10.0
"""Seconds between the signs of life of a part.

Prefect's own heartbeats are events: one that is on its way when the server is restarted is lost, and of a run whose
first and only one that was, no automation ever learns. A label of the flow run is state, which its database keeps.
"""

Answer = TypeVar("Answer")


# --- files: on the machine of the job


@stage(tracking=True)
def open_exchange(uri: str, parent: str) -> str:
    """A place for the files of the job; the MLflow run's id. What killed jobs left there goes, their parts included."""
    run_id, stale = tracking_exchange.open_run(uri, parent)
    for one in stale:
        cancel_parts(one)
    return run_id


@stage(tracking=True)
def close_exchange(uri: str, run_id: str) -> None:
    """Delete the place with all its files."""
    tracking_exchange.close_run(uri, run_id)


@stage(tracking=True)
def send_inputs(job: Job, checkpoint: Checkpoint, exchange: Exchange) -> tuple[Files, dict[str, VariantFile]]:
    """The checkpoint and the user's files, for all parts."""
    return parts.send_inputs(job, checkpoint, exchange)


@stage("fetch result of {part.id}", tracking=True)
def fetch_result(part: Part, exchange: Exchange, logs: Path) -> Result | None:
    """What a part has left, with its logs; None: it was lost before it left anything."""
    text = exchange.result(part.id)
    if text is None:
        return None
    try:
        result = Result.model_validate_json(text)
    except ValidationError as error:
        raise WorkError(
            f"What {part.id} left cannot be read: {'; '.join(problems(error))}.",
            "Do all workers have the same version of slmops?",
        ) from None
    exchange.bring(result.logs, logs)
    return result


# --- files: on either side


@stage("send {variant.recipe.name}", tracking=True)
def send_variant(variant: Variant, exchange: Exchange) -> Files:
    """A converted variant, for whoever measures or deploys it."""
    return parts.send_variant(variant, exchange)


@stage("fetch {key}", tracking=True)
def fetch_variant(key: str, files: Files, exchange: Exchange, settings: Settings) -> Variant:
    """A variant that was converted elsewhere."""
    return parts.bring_variant(key, files, exchange, settings)


# --- files: on the machine of a part


@stage(tracking=True)
def prepare_part(part: Part, exchange: Exchange, settings: Settings) -> Workplace:
    """All that the part needs, fetched and checked."""
    return parts.prepare(part, exchange, settings)


@stage(tracking=True)
def send_references(place: Workplace, exchange: Exchange, settings: Settings) -> Files:
    """The logits that the others are compared with."""
    return parts.send_references(place, exchange, settings)


@stage(tracking=True)
def leave_result(result: Result, part: Part, place: Workplace, exchange: Exchange, settings: Settings) -> None:
    """Logs and result, the result last."""
    logs = parts.send_logs(part, place, exchange, settings)
    exchange.leave(part.id, result.model_copy(update={"logs": logs}))


# --- flow runs


def deploy(pool: Pool) -> UUID:
    """Have the parts as a deployment in the pool; returns its id.

    The flow is named as a module, so that it is found wherever slmops is installed.

    Raises:
        PrerequisiteError: There is no such pool, or the server does not answer.
    """

    def made(client: SyncPrefectClient) -> UUID:
        try:
            found = client.read_work_pool(pool.name)
        except ObjectNotFound:
            raise PrerequisiteError(
                f"Prefect has no work pool {pool.name!r}, which SLMOPS_POOLS names.",
                f"Start a worker for it: prefect worker start --pool {pool.name} --type process --limit 1",
            ) from None
        if found.status != WorkPoolStatus.READY:
            log.warning("no worker of the pool %s is online: the job waits for one", pool.name)
        return client.create_deployment(
            flow_id=client.create_flow_from_name(FLOW),
            name=pool.name,
            work_pool_name=pool.name,
            entrypoint=ENTRYPOINT,
            job_variables={"env": ENVIRONMENT},
            tags=["slmops"],
            description="One part of a job that fans out: a conversion or a measurement. Jobs start it.",
            enforce_parameter_schema=False,
        )

    return _asked(made)


def submit(part: Part, deployment: UUID) -> UUID:
    """Have a part run on a worker, as a subflow of this flow run; returns its id. Twice is once.

    Raises:
        PrerequisiteError: The server does not answer.
    """
    title = f"{part.stage} {part.recipe.name}"
    stand_in = Task(fn=lambda: None, name=title)  # the page shows the subflow at the place of this task run

    def started(client: SyncPrefectClient) -> UUID:
        above = client.create_task_run(
            task=stand_in, flow_run_id=UUID(runtime.flow_run.id), dynamic_key=part.id, state=Pending()
        )
        return client.create_flow_run_from_deployment(
            deployment,
            name=f"{title} of {part.name}",
            parameters={"part": part.model_dump_json()},
            idempotency_key=f"{part.exchange}-{part.id}",
            parent_task_run_id=above.id,
            tags=["slmops", _tag(part.exchange)],
        ).id

    return _asked(started)


@dataclass(frozen=True)
class Seen:
    """A flow run as it was at a look.

    Attributes:
        state: Its state.
        beat: Its last sign of life, a number that grows; None: none yet.
    """

    state: State[Any]
    beat: object


def look(flow_runs: Collection[UUID]) -> dict[UUID, Seen]:
    """The flow runs as they are now.

    Raises:
        PrerequisiteError: The server does not answer.
    """
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(flow_runs)))
    found = _asked(lambda client: client.read_flow_runs(flow_run_filter=wanted))
    seen = {run.id: Seen(run.state or Pending(), run.labels.get(LABEL)) for run in found}
    return {one: seen.get(one) or Seen(Crashed(message="The flow run was deleted."), None) for one in flow_runs}


def crash(flow_run: UUID, message: str) -> State[Any]:
    """Say of a part that it is lost; returns its new state.

    Raises:
        PrerequisiteError: The server does not answer.
    """
    state: State[Any] = Crashed(message=message)
    _asked(lambda client: client.set_flow_run_state(flow_run, state, force=True))
    return state


@contextmanager
def beating() -> Iterator[None]:
    """Within the block this flow run gives signs of life."""
    stopped = threading.Event()
    flow_run = UUID(runtime.flow_run.id)

    def beat() -> None:
        # A retry would wait for so long that the part would pass for lost.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            for number in itertools.count(1):
                with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
                    client.update_flow_run_labels(flow_run, {LABEL: number})
                if stopped.wait(BEAT_S):
                    return

    # Prefect keeps its settings in context variables.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(beat,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()


def cancel_parts(exchange: str) -> None:
    """Cancel what still runs of a job's parts.

    Raises:
        PrerequisiteError: The server does not answer.
    """
    living = [one for one in StateType if one not in TERMINAL_STATES]
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[_tag(exchange)]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=living)),
    )

    def cancelled(client: SyncPrefectClient) -> None:
        for run in client.read_flow_runs(flow_run_filter=wanted):
            client.set_flow_run_state(run.id, State(type=StateType.CANCELLING, message="The job has ended."))

    _asked(cancelled)


def _tag(exchange: str) -> str:
    return f"slmops-parts-{exchange}"


def _asked(question: Callable[[SyncPrefectClient], Answer]) -> Answer:
    """Ask the server, and if it is being restarted again and again."""
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            with get_client(sync_client=True) as client:
                return question(client)
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if refused or time.monotonic() > deadline:
                raise PrerequisiteError(f"The Prefect server does not answer: {error}", "Is it running?") from error
            time.sleep(PAUSE_S)
