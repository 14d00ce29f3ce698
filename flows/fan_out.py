"""The variants of a job made and measured by several machines: each recipe is converted, then measured.

The parts of the job are flow runs on the workers of a Prefect work pool. It is a PrerequisiteError if the Prefect
server does not answer for ten minutes, and a TrackingError if MLflow does not answer.
"""

import contextvars
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
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
LIMITS_S = {StateType.RUNNING: 60.0, StateType.CANCELLING: 120.0, StateType.PENDING: 900.0}
"""Seconds of silence after which a part counts as lost. Pending means that it is being started on its machine; a part
that waits for a machine is scheduled, and may wait."""

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
Step = Callable[[], Measured | None]
"""A step of a recipe. It returns the outcome, or None if another machine has to go on."""


class Workers(NamedTuple):
    pool: str  # its name
    deployment: UUID  # of the parts in it


@dataclass
class _Child:
    part: Part
    attempt: int  # from 1 on
    sign: tuple[str, object] = ("", None)  # state and beat, as they were at the last look
    silent_s: float = 0.0  # since one of them changed, without the time in which nobody looked

    def is_lost(self, state: State[Any], beat: object, seconds: float) -> bool:
        """Whether it has been silent for too long, ``seconds`` after the last look."""
        sign = (state.name or "", beat)
        self.silent_s = self.silent_s + seconds if sign == self.sign else 0.0
        self.sign = sign
        limit = LIMITS_S.get(state.type)
        return limit is not None and self.silent_s > limit


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
        looked = time.monotonic()
        while self.children:
            time.sleep(POLL_S)
            # However long it was that we did something else or the server was away: a part may have spoken meanwhile.
            seconds, looked = min(time.monotonic() - looked, 3 * POLL_S), time.monotonic()
            for flow_run, (state, beat) in look(self.children).items():
                child = self.children[flow_run]
                if not state.is_final() and child.is_lost(state, beat, seconds):
                    state = crash(flow_run, f"There was no sign of life for {child.silent_s:.0f} s.")
                if state.is_final():
                    del self.children[flow_run]
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
