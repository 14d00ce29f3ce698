"""Parts of a job as flow runs on the workers of a Prefect work pool: started, watched, ended.

All functions raise PrerequisiteError if the Prefect server does not answer for ten minutes.
"""

import contextvars
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar, cast
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType, WorkPoolStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Crashed, Pending

from slmops.checkpoints import room
from slmops.cluster.parts import Part
from slmops.core.errors import PrerequisiteError
from slmops.core.job import JobContext

log = logging.getLogger("slmops.fan_out")

ENVIRONMENT = {
    "PREFECT_CLIENT_MAX_RETRIES": "6",  # two minutes, in which a server is back that was restarted
    "PREFECT_LOGGING_EXTRA_LOGGERS": "slmops",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""What a part needs of Prefect, on whatever worker."""
AWAY_S = 600.0  # seconds that a job waits for a Prefect server that does not answer
PAUSE_S = 2.0

LABEL = "slmops.beat"
BEAT_S = 10.0
"""Seconds between the signs of life of a part.

Prefect's own heartbeats are events. If the server is restarted while one is on its way, that one is lost; and if it was
the only one of its run, no automation ever learns of the run. A label of the flow run is kept in the database.
"""

T = TypeVar("T")


class Workers(NamedTuple):
    pool: str  # its name
    deployment: UUID  # of the parts in it


def find_workers(context: JobContext) -> Workers:
    """The smallest pool that is large enough, with the deployment of the parts, which is made if it is missing.

    The deployment names the flow as a module, so it is found wherever slmops is installed. It is a PrerequisiteError
    if no pool is large enough, or if Prefect does not have it.
    """
    pool = room.choose_pool(context.settings.pools, context.checkpoint, context.job.device).name

    def deployed(client: SyncPrefectClient) -> UUID:
        try:
            found = client.read_work_pool(pool)
        except ObjectNotFound:
            raise PrerequisiteError(
                f"Prefect has no work pool {pool!r}, which SLMOPS_POOLS names.",
                f"Start a worker for it: prefect worker start --pool {pool} --type process --limit 1",
            ) from None
        if found.status != WorkPoolStatus.READY:
            log.warning("no worker of the pool %s is online: the job waits for one", pool)
        return client.create_deployment(
            flow_id=client.create_flow_from_name("variant"),
            name=pool,
            work_pool_name=pool,
            entrypoint="flows.variant.variant",
            job_variables={"env": ENVIRONMENT},
            tags=["slmops"],
            description="One part of a job that fans out: a conversion or a measurement. Jobs start it.",
            enforce_parameter_schema=False,
        )

    return Workers(pool, _asked(deployed))


def submit(part: Part, workers: Workers) -> UUID:
    """Start a part on a worker, as a subflow of this flow run; returns its id. Twice is once."""

    def started(_: SyncPrefectClient) -> FlowRun:
        run = run_deployment(
            workers.deployment,
            flow_run_name=f"{part.stage} {part.recipe.name} of {part.name}",
            parameters={"part": part.model_dump_json()},
            idempotency_key=f"{part.exchange}-{part.id}",
            tags=["slmops", _tag(part.exchange)],
            timeout=0,  # it is not waited for
        )
        return cast(FlowRun, run)  # and no coroutine, as this flow is a plain function

    return _asked(started).id


def look(flow_runs: Collection[UUID]) -> dict[UUID, tuple[State[Any], object]]:
    """The states of flow runs, and the last sign of life of each: a number that grows, or None before the first."""
    wanted = FlowRunFilter.model_validate({"id": {"any_": list(flow_runs)}})
    found = _asked(lambda client: client.read_flow_runs(flow_run_filter=wanted))
    seen = {run.id: (run.state or Pending(), run.labels.get(LABEL)) for run in found}
    deleted: State[Any] = Crashed(message="The flow run was deleted.")
    return {one: seen.get(one, (deleted, None)) for one in flow_runs}


def crash(flow_run: UUID, message: str) -> State[Any]:
    """Mark a part as lost; returns its new state."""
    state: State[Any] = Crashed(message=message)
    _asked(lambda client: client.set_flow_run_state(flow_run, state, force=True))
    return state


@contextmanager
def beating() -> Iterator[None]:
    """Within the block this flow run gives signs of life."""
    stopped = threading.Event()
    flow_run = UUID(runtime.flow_run.id)

    def beat() -> None:
        # Retries take so long that the part would pass for lost.
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
    """Cancel the parts of a job that still run; ``exchange`` is the MLflow run with the job's files."""
    living = [one for one in StateType if one not in TERMINAL_STATES]
    wanted = FlowRunFilter.model_validate({"tags": {"all_": [_tag(exchange)]}, "state": {"type": {"any_": living}}})

    def cancelled(client: SyncPrefectClient) -> None:
        for run in client.read_flow_runs(flow_run_filter=wanted):
            client.set_flow_run_state(run.id, State(type=StateType.CANCELLING, message="The job has ended."))

    _asked(cancelled)


def _tag(exchange: str) -> str:
    return f"slmops-parts-{exchange}"


def _asked(question: Callable[[SyncPrefectClient], T]) -> T:
    """Ask the server; while it is being restarted, ask again."""
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
