"""The main job: one checkpoint, converted at each precision, registered, measured, compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from prefect import flow, runtime

from flows.fan_out import Outcomes, Workers, fan_out, find_workers
from slmops.cluster.parts import Measured, comparable
from slmops.core import locks, machine
from slmops.core.errors import GateError, SlmopsError, TrackingError, WorkError
from slmops.core.files import remove_scratch
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Comparison, Recipe, Registration, Variant, VariantResult
from slmops.evaluation.summary import evaluation
from slmops.local import stack
from slmops.tracking.tracker import Tracker
from tasks.checkpoint import get_checkpoint, plan_job
from tasks.choose import choose_variant
from tasks.environment import check_environment
from tasks.show import Progress, show_comparison
from tasks.track import (
    finish_tracking,
    get_champion,
    register_version,
    start_tracking,
    track_failure,
    track_variant,
)
from tasks.variant import convert_variant, measure_quality, measure_speed, register_variant, score_checkpoint

log = logging.getLogger("slmops.optimize")

Made = tuple[Variant, Registration]


@flow(name="optimize", flow_run_name="optimize {job.label}", persist_result=False)
def optimize(job: Job) -> Comparison:
    """Convert, register, measure and compare one checkpoint; choose the variant to deploy.

    Raises:
        SlmopsError: What went wrong. Of single variants that failed, and of gates that none passes, the error comes
            last and carries the comparison.
    """
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    checkpoint = get_checkpoint(job, settings, uri)
    name = job.name or checkpoint.name
    with locks.exclusive(settings.locks / f"run-{name}.lock", f"the job of {name!r}", wait=False):
        _clean_up(name, settings)
        recipes, policy = plan_job(job, checkpoint, name, settings)
        workers = find_workers(checkpoint, job, settings) if settings.pools else None
        parent = start_tracking(uri, name, job, checkpoint, runtime.flow_run.id or "")
        with _closed_if_aborted(uri, parent):
            made, tracked = _variants(workers, recipes, checkpoint, job, name, settings, uri, parent)
            measured = next((result.run_id for result in tracked if result.status == "ok"), None)
            choice, judged = choose_variant(tracked, policy, get_champion(uri, name, measured))
            results = [  # without a choice there was nothing to judge by, or nothing that passed
                register_version(uri, name, *made[result.name], result, parent)
                if choice.variant is not None and _accepted(result)
                else result
                for result in judged
            ]
            comparison = Comparison(model=name, run_id=parent, choice=choice, variants=tuple(results))
            failed = [result.name for result in results if result.status == "failed"]
            url = finish_tracking(uri, comparison, policy, failed=bool(failed))
        show_comparison(comparison, url)
        shutil.rmtree(settings.work(name), ignore_errors=True)
    error: SlmopsError | None = None
    if failed:
        error = WorkError(f"{len(failed)} of {len(results)} variants failed: {', '.join(failed)}.")
    elif choice.variant is None:
        error = GateError("No variant passes the policy's gates.", "The comparison says which gate refused which.")
    if error is not None:
        error.comparison = comparison
        raise error
    return comparison


def _variants(
    workers: Workers | None,
    recipes: list[Recipe],
    checkpoint: Checkpoint,
    job: Job,
    name: str,
    settings: Settings,
    uri: str,
    parent: str,
) -> tuple[dict[str, Made], list[VariantResult]]:
    """Make and measure all variants; one that fails is tracked with its reason and the others go on.

    Returns:
        What was made, by its name, and all results.
    """
    progress = Progress(name, steps=2 * len(recipes))
    logs = settings.logs / name
    made: dict[str, Made] = {}
    results: dict[str, VariantResult] = {}
    baseline: Measured | None = None
    outcomes = (
        fan_out(workers, recipes, checkpoint, job, name, settings, uri, parent, progress)
        if workers is not None
        else _here(recipes, checkpoint, job, name, settings, progress)
    )
    with closing(outcomes):
        for variant, outcome in outcomes:
            if isinstance(outcome, SlmopsError):
                results[variant] = track_failure(uri, parent, variant, str(outcome), logs)
                continue
            if outcome.variant.recipe.baseline:
                baseline = outcome
            made[variant] = (outcome.variant, outcome.registration)
            results[variant] = _tracked(outcome, baseline, name, uri, parent, logs)
    return made, [results[recipe.name] for recipe in recipes]


def _tracked(one: Measured, baseline: Measured | None, name: str, uri: str, parent: str, logs: Path) -> VariantResult:
    """Make metrics of what was measured, and log them."""
    against = (baseline.variant, baseline.quality) if baseline else None
    figures = evaluation(one.variant, one.speed, one.quality, against, one.scored)
    figures, left_out = comparable(figures, one.hardware, (baseline or one).hardware)
    if left_out is not None:
        log.warning("%s: %s", one.variant.name, left_out)
    # A run's hardware says what its figures compare with: the machine that measured, whichever converted.
    variant = one.variant.model_copy(update={"hardware": one.hardware})
    result = track_variant(uri, parent, name, variant, one.registration, figures, logs)
    return result.model_copy(update={"reason": left_out})


def _here(
    recipes: list[Recipe], checkpoint: Checkpoint, job: Job, name: str, settings: Settings, progress: Progress
) -> Outcomes:
    """Convert all in this process, then measure them side by side; yield each recipe's outcome as it comes."""
    made: dict[str, Made] = {}
    for recipe in recipes:
        try:
            variant = convert_variant(recipe, checkpoint, job, name, settings)
            made[recipe.name] = (variant, register_variant(variant, name, job, settings))
        except SlmopsError as error:
            progress.step(2)  # one that is not made is not measured
            yield recipe.name, error
        else:
            progress.step()
    if not made:
        return
    speeds = measure_speed(list(made.values()), name, job, settings)
    scored = score_checkpoint(checkpoint, name, job, settings)
    hardware = machine.hardware()
    for variant, registration in made.values():
        outcome: Measured | SlmopsError
        try:
            speed = speeds[variant.name]
            if isinstance(speed, SlmopsError):
                raise speed
            outcome = Measured(
                variant=variant,
                registration=registration,
                speed=speed,
                quality=measure_quality(variant, registration, name, job, settings),
                scored=scored,
                hardware=hardware,
            )
        except SlmopsError as error:
            outcome = error
        progress.step()
        yield variant.name, outcome


def _accepted(result: VariantResult) -> bool:
    """No gate has anything against it."""
    return result.status == "ok" and not any(gate.refuses for gate in result.gates)


def _clean_up(name: str, settings: Settings) -> None:
    """Remove what a killed run of this model left behind; the job lock says that it is dead."""
    shutil.rmtree(settings.work(name), ignore_errors=True)
    remove_scratch(settings.variants)


@contextmanager
def _closed_if_aborted(uri: str, parent: str) -> Iterator[None]:
    """A job that is interrupted or breaks leaves no run open in MLflow, if MLflow still listens."""
    try:
        yield
    except BaseException:
        with suppress(TrackingError):
            Tracker(uri).abort_job(parent)
        raise
