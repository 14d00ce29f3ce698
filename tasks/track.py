"""Log to MLflow. The one stage where a retry helps: a server that restarts is back in seconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from slmops import machine, report
from slmops.job import Job
from slmops.models import Checkpoint, Comparison, Evaluation, Measurement, Registration, Variant, VariantResult
from slmops.tracking import Tracker, as_result

tracking_task = partial(task, cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2.0, 5.0, 15.0])


@tracking_task(name="start tracking", task_run_name="start tracking")
def start_tracking(uri: str, name: str, job: Job, checkpoint: Checkpoint, flow_run: str) -> str:
    """Open the MLflow parent run; returns its id."""
    return Tracker(uri).start_job(name, job, checkpoint, machine.hardware(), flow_run)


@tracking_task(name="track", task_run_name="track {variant.recipe.name}")
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


@tracking_task(name="track failure", task_run_name="track failure of {recipe}")
def track_failure(uri: str, parent: str, recipe: str, reason: str, logs: Path) -> VariantResult:
    """Log a failed variant as a child run with the reason."""
    run_id = Tracker(uri).log_failure(parent, recipe, reason, logs)
    return VariantResult(name=recipe, status="failed", reason=reason, run_id=run_id)


@tracking_task(name="get champion", task_run_name="get champion")
def get_champion(uri: str, name: str) -> dict[str, Measurement] | None:
    """What was measured of the version that is deployed now, if any."""
    return Tracker(uri).champion(name)


@tracking_task(name="finish tracking", task_run_name="finish tracking")
def finish_tracking(uri: str, comparison: Comparison, *, failed: bool) -> str:
    """Put comparison, report and choice into the parent run; returns the address of its page."""
    tracker = Tracker(uri)
    url = tracker.run_url(comparison.run_id)
    tracker.finish_job(comparison, report.html(comparison), report.markdown(comparison, url), failed=failed)
    return url
