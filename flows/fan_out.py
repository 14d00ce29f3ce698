"""The variants of a job made and measured by several machines: each recipe is converted, then measured.

The parts of the job are flow runs of a deployment on the workers of a Prefect work pool, subflows of the job's run.
Prefect queues them, its heartbeats and automations notice lost ones, its tags find those that a killed job has left.
It is a PrerequisiteError if the Prefect server does not answer for ten minutes, and a TrackingError if MLflow does not
answer. What Prefect has not, or not here, is ours:

- Files and results travel through MLflow. Prefect keeps results where the flow ran, and workers share no disk.
- A lost part is begun anew, under another name. Prefect retries a run that failed, not one whose machine is gone.
- One thread waits for all parts. ``run_deployment`` waits for one, without an end if the job is cancelled meanwhile.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType, WorkPoolStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, Pending

from flows.automations import LOST_RUNS, put
from flows.running import ProgressBar
from slmops.checkpoints import room
from slmops.cluster.parts import Files, Measured, Outcomes, Part, PartResult, SentJob, Stage
from slmops.conversion import convert, store
from slmops.core import machine
from slmops.core.errors import PrerequisiteError, SlmopsError, TrackingError, WorkError
from slmops.core.job import JobContext
from slmops.core.values import Recipe
from slmops.evaluation.quality import Quality
from slmops.tracking.exchange import Exchange
from tasks import variant as steps

log = logging.getLogger("slmops.fan_out")

ATTEMPTS = 3  # how often a part is started in all if its machine is lost
POLL_S = 2.0

ENVIRONMENT = {
    "PREFECT_CLIENT_MAX_RETRIES": "6",  # two minutes, in which a server is back that was restarted
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds
    "PREFECT_LOGGING_EXTRA_LOGGERS": "slmops",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""What a part needs of Prefect, on whatever worker."""
AWAY_S = 600.0  # seconds that a job waits for a Prefect server that does not answer
PAUSE_S = 2.0

T = TypeVar("T")
Step = Callable[[], Measured | None]
"""A step of a recipe. It returns the outcome, or None if another machine has to go on."""


class Workers(NamedTuple):
    pool: str  # its name
    deployment: UUID  # of the parts in it


class _Child(NamedTuple):
    part: Part
    attempt: int  # from 1 on


def fan_out(workers: Workers, recipes: list[Recipe], context: JobContext, progress: ProgressBar) -> Outcomes:
    """Yield each recipe's outcome as it comes, that of the baseline before those that are compared with it."""
    with _exchange(context) as exchange:
        yield from _FanOut(workers, recipes, steps.send_job(context, exchange), exchange, context, progress).run()


@contextmanager
def _exchange(context: JobContext) -> Iterator[Exchange]:
    """The files of the job, and its parts, are there as long as the job is."""
    exchange, stale = steps.open_exchange(context.tracking_uri, context.run_id, context.settings)
    for killed in stale:
        cancel_parts(killed)
    try:
        yield exchange
    finally:
        try:
            cancel_parts(exchange.run_id)
            steps.close_exchange(exchange)
        except (PrerequisiteError, TrackingError) as error:
            log.warning("the next run of this job removes what is left of this one: %s", error.message)


@dataclass
class _FanOut:
    """Waits for all parts at once, in one thread, and begins the next ones."""

    workers: Workers
    recipes: list[Recipe]
    sent: SentJob
    exchange: Exchange
    context: JobContext
    progress: ProgressBar
    children: dict[UUID, _Child] = field(default_factory=dict)  # by their flow runs
    converted: dict[str, tuple[str, Files]] = field(default_factory=dict)  # key and files, by the recipe's name
    due: list[tuple[Recipe, Stage, int]] = field(default_factory=list)  # not begun yet; the number is the attempt
    references: Files | None = None  # the baseline's, for the others to be compared with; None: it is on its way
    scored: Quality | None = None  # the checkpoint's own, which come with the baseline

    def run(self) -> Outcomes:
        """Begin everything, and go on until nothing is left."""
        for recipe in self.recipes:
            yield from self._go_on(recipe, partial(self._begin, recipe))
        while self.children:
            time.sleep(POLL_S)
            for flow_run, state in look(self.children).items():
                if state.is_final():
                    child = self.children.pop(flow_run)
                    yield from self._go_on(child.part.recipe, partial(self._take, child, state))

    def _submit(self) -> None:
        """Have the parts begun that are due; what is compared with the baseline is measured after it."""
        for due in tuple(self.due):
            recipe, stage, attempt = due
            of_stage: dict[str, Any] = {}
            if stage == "measure":
                if self.references is None and not recipe.baseline:
                    continue
                key, files = self.converted[recipe.name]
                of_stage = {"key": key, "variant": files, "references": self.references or ()}
            name = f"{recipe.name}-{stage}-{attempt}"
            part = Part(id=name, stage=stage, recipe=recipe, **dict(self.sent), **of_stage)
            self.children[submit(part, self.workers)] = _Child(part, attempt)
            self.due.remove(due)

    def _go_on(self, recipe: Recipe, step: Step) -> Outcomes:
        """Do what is next for a recipe; yield what has become of it if that was all."""
        try:
            outcome: Measured | SlmopsError | None = step()
        except TrackingError:
            raise
        except SlmopsError as error:
            outcome = error
            self.progress.step(1 if recipe.name in self.converted else 2)
            if recipe.baseline and self.references is None:
                self.references = ()  # it never will be measured
        self._submit()
        if outcome is not None:
            yield recipe.name, outcome

    def _begin(self, recipe: Recipe) -> None:
        """Convert, unless an earlier run has: what is deployed here and what is measured are to be the same files."""
        context = self.context
        if store.load(context.settings.variants / store.key(recipe, context.checkpoint, machine.versions())) is None:
            self.due.append((recipe, "convert", 1))
        else:
            variant = steps.convert_variant(recipe, context)
            self._measure(recipe, variant.key, steps.send_variant(variant, self.exchange))

    def _measure(self, recipe: Recipe, key: str, files: Files) -> None:
        self.progress.step()
        self.converted[recipe.name] = (key, files)
        self.due.append((recipe, "measure", 1))

    def _take(self, child: _Child, state: State[Any]) -> Measured | None:
        """Look at what a part that has ended left behind."""
        part, pool = child.part, self.workers.pool
        what = f"{part.stage} {part.recipe.name}"
        said = state.message or state.name
        result = steps.fetch_result(part, self.exchange, self.context.logs)
        if result is None and not state.is_cancelled() and child.attempt < ATTEMPTS:
            log.warning("%s was lost, again on the pool %s: %s", what, pool, said)
            self.due.append((part.recipe, part.stage, child.attempt + 1))
            return None
        if result is None:
            how = "was cancelled" if state.is_cancelled() else f"was lost {child.attempt} times"
            raise WorkError(f"{what} on the pool {pool} {how}: {said}")
        if result.failure is not None:
            raise result.failure.error
        if part.stage == "convert":
            self._measure(part.recipe, result.key or "", result.variant)
            return None
        if part.recipe.baseline:
            self.scored = result.figures.scored if result.figures else None
            self.references = result.references
            self._submit()  # before the files are fetched, which takes a while
        return self._finish(part, result)

    def _finish(self, part: Part, result: PartResult) -> Measured:
        """Have a measured variant here, as if it had been made here."""
        variant = steps.fetch_variant(part.key or "", part.variant, self.exchange, self.context.settings)
        if self.context.job.output_path is not None:
            convert.export(variant, self.context.job.output_path)
        registration = steps.register_variant(variant, self.context)
        if result.figures is None:
            raise WorkError(f"{part.id} left no figures.", "Do all workers have the same version of slmops?")
        self.progress.step()
        return Measured(variant=variant, registration=registration, **dict(result.figures) | {"scored": self.scored})


# --- Prefect's side of the parts


def find_workers(context: JobContext) -> Workers:
    """The smallest pool that is large enough, with the deployment of the parts, which is made if it is missing.

    So are the automations that notice lost parts. The deployment names the flow as a module, so it is found wherever
    slmops is installed. It is a PrerequisiteError if no pool is large enough, or if Prefect does not have it.
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

    _asked(lambda client: put(client, LOST_RUNS))
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


def look(flow_runs: Collection[UUID]) -> dict[UUID, State[Any]]:
    """The states of flow runs."""
    wanted = FlowRunFilter.model_validate({"id": {"any_": list(flow_runs)}})
    found = _asked(lambda client: client.read_flow_runs(flow_run_filter=wanted))
    seen: dict[UUID, State[Any]] = {run.id: run.state or Pending() for run in found}
    return {one: seen.get(one) or Crashed(message="The flow run was deleted.") for one in flow_runs}


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
