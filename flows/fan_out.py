"""The variants of a job made and measured by several machines: each recipe is converted, then measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State, StateType

from flows.running import ProgressBar
from flows.workers import PartState, Workers, cancel_parts, crash, look, submit
from slmops.cluster.parts import Files, Measured, Outcomes, Part, PartResult, SentJob, Stage
from slmops.conversion import convert, store
from slmops.core import machine
from slmops.core.context import JobContext
from slmops.core.errors import PrerequisiteError, SlmopsError, TrackingError, WorkError
from slmops.core.values import Recipe
from slmops.tracking.exchange import Exchange
from tasks.fan_out import close_exchange, fetch_result, fetch_variant, open_exchange, send_job, send_variant
from tasks.variant import convert_variant, register_variant

log = logging.getLogger("slmops.fan_out")

ATTEMPTS = 3
"""How often a part is started in all if its machine is lost."""
POLL_S = 2.0
LIMITS_S = {StateType.RUNNING: 60.0, StateType.CANCELLING: 120.0, StateType.PENDING: 900.0}
"""Seconds of silence after which a part counts as lost. Pending means that it is being started on its machine; a part
that waits for a machine is scheduled, and may wait."""


@dataclass
class _Child:
    """A part on its way.

    Attributes:
        part: What it does.
        attempt: From 1 on.
        sign: State and beat, as they were at the last look.
        silent_s: Seconds since one of them changed, without the time in which nobody looked.
    """

    part: Part
    attempt: int
    sign: tuple[str, object] = ("", None)
    silent_s: float = 0.0

    def is_lost(self, seen: PartState, seconds: float) -> bool:
        """Whether it has been silent for too long, ``seconds`` after the last look."""
        sign = (seen.state.name or "", seen.beat)
        self.silent_s = self.silent_s + seconds if sign == self.sign else 0.0
        self.sign = sign
        limit = LIMITS_S.get(seen.state.type)
        return limit is not None and self.silent_s > limit


def fan_out(workers: Workers, recipes: list[Recipe], context: JobContext, progress: ProgressBar) -> Outcomes:
    """Yield each recipe's outcome as it comes, that of the baseline before those that are compared with it.

    Raises:
        PrerequisiteError: The Prefect server is away.
        TrackingError: MLflow is away.
    """
    with _exchange(context) as exchange:
        sent = send_job(context, exchange)
        yield from _FanOut(workers, recipes, sent, exchange, context, progress).run()


@contextmanager
def _exchange(context: JobContext) -> Iterator[Exchange]:
    """The files of the job, and its parts, are there as long as the job is."""
    exchange, stale = open_exchange(context.tracking_uri, context.run_id, context.settings)
    for killed in stale:
        cancel_parts(killed)
    try:
        yield exchange
    finally:
        try:
            cancel_parts(exchange.run_id)
            close_exchange(exchange)
        except (PrerequisiteError, TrackingError) as error:
            log.warning("the next run of this job removes what is left of this one: %s", error.message)


class _FanOut:
    """Waits for all parts at once, in one thread, and begins the next ones."""

    def __init__(
        self,
        workers: Workers,
        recipes: list[Recipe],
        sent: SentJob,
        exchange: Exchange,
        context: JobContext,
        progress: ProgressBar,
    ) -> None:
        self._workers = workers
        self._recipes = recipes
        self._sent = sent
        self._exchange = exchange
        self._context = context
        self._progress = progress
        self._children: dict[UUID, _Child] = {}
        self._converted: dict[str, tuple[str, Files]] = {}
        self._waiting: list[Recipe] = []
        self._references: Files | None = None  # None: the baseline is on its way
        self._scored: tuple[float, ...] | None = None

    def run(self) -> Outcomes:
        """Begin everything, and go on until nothing is left."""
        for recipe in self._recipes:
            yield from self._begin(recipe)
        looked = time.monotonic()
        while self._children:
            time.sleep(POLL_S)
            # However long it was that we did something else or the server was away: a part may have spoken meanwhile.
            seconds, looked = min(time.monotonic() - looked, 3 * POLL_S), time.monotonic()
            for flow_run, seen in look(self._children).items():
                state = seen.state
                if not state.is_final() and self._children[flow_run].is_lost(seen, seconds):
                    state = crash(flow_run, f"There was no sign of life for {self._children[flow_run].silent_s:.0f} s.")
                if state.is_final():
                    yield from self._take(self._children.pop(flow_run), state)

    def _begin(self, recipe: Recipe) -> Outcomes:
        """Convert, unless an earlier run has: what is deployed here and what is measured are to be the same files."""
        context = self._context
        found = store.load(context.settings.variants / store.key(recipe, context.checkpoint, machine.versions()))
        if found is None:
            self._submit(recipe, "convert")
            return
        try:
            variant = convert_variant(recipe, context)
        except SlmopsError as error:
            yield from self._fail(recipe, error)
        else:
            self._measure(recipe, variant.key, send_variant(variant, self._exchange))

    def _submit(self, recipe: Recipe, stage: Stage, attempt: int = 1) -> None:
        of_stage: dict[str, Any] = {}
        if stage == "measure":
            key, files = self._converted[recipe.name]
            of_stage = {"key": key, "variant": files, "references": self._references or ()}
        part = Part(id=f"{recipe.name}-{stage}-{attempt}", stage=stage, recipe=recipe, **dict(self._sent), **of_stage)
        self._children[submit(part, self._workers)] = _Child(part, attempt)

    def _measure(self, recipe: Recipe, key: str, files: Files) -> None:
        """Measure what is converted, as soon as the baseline has been."""
        self._progress.step()
        self._converted[recipe.name] = (key, files)
        if recipe.baseline or self._references is not None:
            self._submit(recipe, "measure")
        else:
            self._waiting.append(recipe)

    def _go_on(self, references: Files) -> None:
        """The baseline has been measured, or never will be."""
        self._references = references
        while self._waiting:
            self._submit(self._waiting.pop(0), "measure")

    def _take(self, child: _Child, state: State[Any]) -> Outcomes:
        """Look at what a part that has ended left behind."""
        part = child.part
        what = f"{part.stage} {part.recipe.name}"
        said = state.message or state.name
        try:
            result = fetch_result(part, self._exchange, self._context.logs)
        except TrackingError:
            raise
        except SlmopsError as error:
            yield from self._fail(part.recipe, error)
            return
        if result is None and not state.is_cancelled() and child.attempt < ATTEMPTS:
            log.warning("%s was lost, again on the pool %s: %s", what, self._workers.pool, said)
            self._submit(part.recipe, part.stage, child.attempt + 1)
        elif result is None:
            how = "was cancelled" if state.is_cancelled() else f"was lost {child.attempt} times"
            yield from self._fail(part.recipe, WorkError(f"{what} on the pool {self._workers.pool} {how}: {said}"))
        elif result.failure is not None:
            yield from self._fail(part.recipe, result.failure.error)
        elif part.stage == "convert":
            self._measure(part.recipe, result.key or "", result.variant)
        else:
            yield from self._finish(part, result)

    def _finish(self, part: Part, result: PartResult) -> Outcomes:
        """Have a measured variant here, as if it had been made here."""
        if part.recipe.baseline:
            self._scored = result.figures.scored if result.figures else None
            self._go_on(result.references)
        try:
            variant = fetch_variant(part.key or "", part.variant, self._exchange, self._context.settings)
            if self._context.job.output_path is not None:
                convert.export(variant, self._context.job.output_path)
            registration = register_variant(variant, self._context)
            if result.figures is None:
                raise WorkError(f"{part.id} left no figures.", "Do all workers have the same version of slmops?")
        except TrackingError:
            raise
        except SlmopsError as error:
            yield from self._fail(part.recipe, error)
            return
        self._progress.step()
        figures = dict(result.figures) | {"scored": self._scored}
        yield part.recipe.name, Measured(variant=variant, registration=registration, **figures)

    def _fail(self, recipe: Recipe, error: SlmopsError) -> Outcomes:
        self._progress.step(1 if recipe.name in self._converted else 2)
        if recipe.baseline and self._references is None:
            self._go_on(())
        yield recipe.name, error
