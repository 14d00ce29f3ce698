"""The main job: one checkpoint, converted at each precision, registered, measured, compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect import flow, runtime

from slmops import locks, stack
from slmops.errors import SlmopsError, TrackingError, WorkError
from slmops.evaluation.evaluate import against_baseline
from slmops.files import remove_scratch
from slmops.job import Job
from slmops.models import Checkpoint, Comparison, Evaluation, Recipe, Registration, Variant, VariantResult
from slmops.settings import Settings
from slmops.tracking import Tracker
from tasks.checkpoint import get_checkpoint, plan_recipes
from tasks.choose import choose_variant
from tasks.environment import check_environment
from tasks.show import Progress, show_comparison
from tasks.track import finish_tracking, start_tracking, track_failure, track_variant
from tasks.variant import convert_variant, evaluate_variant, register_variant

log = logging.getLogger("slmops.optimize")

Measured = tuple[Variant, Registration, Evaluation]


@flow(name="optimize", flow_run_name="optimize {job.model}", persist_result=False)
def optimize(job: Job) -> Comparison:
    """Convert, register, measure and compare one checkpoint; choose the variant to deploy.

    Raises:
        SlmopsError: What went wrong. Of single variants that failed the error comes last and carries the comparison
            of the others.
    """
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    checkpoint = get_checkpoint(job, settings, uri)
    name = job.name or checkpoint.name
    with locks.exclusive(settings.locks / f"run-{name}.lock", f"the job of {name!r}", wait=False):
        _clean_up(name, settings)
        recipes = plan_recipes(job, checkpoint, name, settings)
        parent = start_tracking(uri, name, job, checkpoint, runtime.flow_run.id or "")
        with _closed_if_aborted(uri, parent):
            results = _variants(recipes, checkpoint, job, name, settings, uri, parent)
            choice = choose_variant(results, job)
            comparison = Comparison(model=name, run_id=parent, choice=choice, variants=tuple(results))
            failed = [result.name for result in results if result.status == "failed"]
            url = finish_tracking(uri, comparison, failed=bool(failed))
        show_comparison(comparison, url)
        shutil.rmtree(settings.work(name), ignore_errors=True)
    if failed:
        error = WorkError(f"{len(failed)} of {len(results)} variants failed: {', '.join(failed)}.")
        error.comparison = comparison
        raise error
    return comparison


def _variants(
    recipes: list[Recipe], checkpoint: Checkpoint, job: Job, name: str, settings: Settings, uri: str, parent: str
) -> list[VariantResult]:
    """Make and measure each variant; one that fails is tracked with its reason and the others go on."""
    logs = settings.logs / name
    progress = Progress(name, steps=len(recipes))
    results: list[VariantResult] = []
    baseline: Measured | None = None
    for recipe in recipes:
        try:
            variant, registration, evaluation = _measure(recipe, checkpoint, job, name, settings)
            if recipe.baseline:
                baseline = (variant, registration, evaluation)
            if baseline is not None:
                evaluation = against_baseline(evaluation, variant, baseline[2], baseline[0])
        except SlmopsError as error:
            results.append(track_failure(uri, parent, recipe.name, str(error), logs))
        else:
            results.append(track_variant(uri, parent, name, variant, registration, evaluation, logs))
        progress.step()
    return results


def _measure(recipe: Recipe, checkpoint: Checkpoint, job: Job, name: str, settings: Settings) -> Measured:
    variant = convert_variant(recipe, checkpoint, job, name, settings)
    registration = register_variant(variant, name, job, settings)
    return variant, registration, evaluate_variant(variant, registration, name, job, settings)


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
