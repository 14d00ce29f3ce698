"""Log to MLflow. The one stage where a retry helps: a server that restarts is back in seconds."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from slmops.core import machine
from slmops.core.errors import TrackingError
from slmops.core.job import Job
from slmops.core.values import Checkpoint, Comparison, Evaluation, Measurement, Registration, Variant, VariantResult
from slmops.report import render as report
from slmops.selection.policy import Policy
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker, as_result

log = logging.getLogger("slmops.track")

PAUSES_S = [2.0, 5.0, 15.0, 30.0, 60.0]
"""A server may be away for a minute or two: restarted, or moved to another machine."""


def _may_pass(_task: object, _run: object, state: State) -> bool:
    """What the server did not take may be taken a moment later; a question that makes no sense stays so."""
    return isinstance(state.result(raise_on_failure=False), TrackingError)


tracking_task = partial(
    task, cache_policy=NO_CACHE, retries=len(PAUSES_S), retry_delay_seconds=PAUSES_S, retry_condition_fn=_may_pass
)


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
def get_champion(uri: str, name: str, like: str | None) -> dict[str, Measurement] | None:
    """What was measured of the version that is deployed now, as far as it compares with the run ``like``."""
    return Tracker(uri).champion(name, like)


@tracking_task(name="register version", task_run_name="register version of {variant.name}")
def register_version(
    uri: str, name: str, variant: Variant, registration: Registration, result: VariantResult, parent: str
) -> VariantResult:
    """Make an accepted variant a version of the registered model; returns the result with its number."""
    version = Registry(uri).add(name, variant, registration, result, parent)
    log.info("%s: version %d of %s in the registry", variant.name, version.version, name)
    return result.model_copy(update={"version": version.version})


@tracking_task(name="finish tracking", task_run_name="finish tracking")
def finish_tracking(uri: str, comparison: Comparison, policy: Policy, *, failed: bool) -> str:
    """Put comparison, report and choice into the parent run; returns the address of its page."""
    tracker = Tracker(uri)
    url = tracker.run_url(comparison.run_id)
    tracker.finish_job(comparison, policy, report.html(comparison), report.markdown(comparison, url), failed=failed)
    return url
