"""Log a job to MLflow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from prefect import Task

from slmops.core import machine
from slmops.core.job import Job
from slmops.core.values import Checkpoint, Comparison, Evaluation, Measurement, Registration, Variant, VariantResult
from slmops.report import render as report
from slmops.selection.policy import Policy
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker, as_result
from tasks.stage import P, R, stage

log = logging.getLogger("slmops.track")


def tracking_task(*, name: str, task_run_name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """The old name of ``stage(tracking=True)``; goes when nothing uses it."""
    del name
    return stage(task_run_name, tracking=True)


@stage(tracking=True)
def start_tracking(uri: str, name: str, job: Job, checkpoint: Checkpoint, flow_run: str) -> str:
    """Open the MLflow parent run; returns its id."""
    return Tracker(uri).start_job(name, job, checkpoint, machine.hardware(), flow_run)


@stage("track {variant.recipe.name}", tracking=True)
def track_variant(
    uri: str,
    parent: str,
    name: str,
    variant: Variant,
    registration: Registration,
    evaluation: Evaluation,
    logs: Path,
) -> VariantResult:
    """Log a measured variant as a child run."""
    run_id = Tracker(uri).log_variant(parent, name, variant, registration, evaluation, logs)
    return as_result(variant, registration, evaluation, run_id)


@stage("track failure of {recipe}", tracking=True)
def track_failure(uri: str, parent: str, recipe: str, reason: str, logs: Path) -> VariantResult:
    """Log a failed variant as a child run with the reason."""
    run_id = Tracker(uri).log_failure(parent, recipe, reason, logs)
    return VariantResult(name=recipe, status="failed", reason=reason, run_id=run_id)


@stage(tracking=True)
def get_champion(uri: str, name: str, like: str | None) -> dict[str, Measurement] | None:
    """What was measured of the version that is deployed now, as far as it compares with the run ``like``."""
    return Tracker(uri).champion(name, like)


@stage("register version of {variant.name}", tracking=True)
def register_version(
    uri: str, name: str, variant: Variant, registration: Registration, result: VariantResult, parent: str
) -> VariantResult:
    """Make an accepted variant a version of the registered model; returns the result with its number."""
    version = Registry(uri).add(name, variant, registration, result, parent)
    log.info("%s: version %d of %s in the registry", variant.name, version.version, name)
    return result.model_copy(update={"version": version.version})


@stage(tracking=True)
def finish_tracking(uri: str, comparison: Comparison, policy: Policy, *, failed: bool) -> str:
    """Put comparison, report and choice into the parent run; returns the address of its page."""
    tracker = Tracker(uri)
    url = tracker.run_url(comparison.run_id)
    tracker.finish_job(comparison, policy, report.html(comparison), report.markdown(comparison, url), failed=failed)
    return url
