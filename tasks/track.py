"""Choose a variant, log the job to MLflow, and show it on the Prefect page."""

import logging
from dataclasses import replace

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from slmops import report
from slmops.cluster.parts import Measured
from slmops.core import machine
from slmops.core.job import JobContext
from slmops.core.values import Comparison, VariantResult
from slmops.selection import choice
from slmops.selection.policy import Policy
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from tasks.stage import artifact_key, stage

log = logging.getLogger("slmops.track")

WORK = (
    *("convert variant", "register variant", "measure speed", "score checkpoint", "measure quality"),
    *("make gguf files", "score peer"),
)
"""The stages that are conversion or measurement; all else that a job does is orchestration."""

choose_variants = stage()(choice.choose_variants)
get_champion = stage("get champion", tracking=True)(Tracker.champion)
track_variant = stage("track {variant.recipe.name}", tracking=True)(Tracker.log_variant)
track_peer = stage("track {name}", tracking=True)(Tracker.log_peer)
track_failure = stage("track failure of {recipe}", tracking=True)(Tracker.log_failure)


@stage(tracking=True)
def start_tracking(context: JobContext, flow_run: str) -> JobContext:
    """Open the job's run in MLflow; returns the context with its id."""
    run_id = Tracker(context.tracking_uri).start_job(
        context.name, context.job, context.checkpoint, machine.hardware(), flow_run
    )
    return replace(context, run_id=run_id)


@stage("register version of {result.name}", tracking=True)
def register_version(context: JobContext, made: Measured, result: VariantResult) -> VariantResult:
    """Make an accepted variant a version of the registered model; returns the result with its number."""
    registry = Registry(context.tracking_uri)
    version = registry.add(context.name, made.variant, made.registration, result, context.run_id)
    if context.job.upload:
        registry.upload(version, made.registration.path)
    log.info("%s: version %d of %s in the registry", result.name, version.version, context.name)
    return result.model_copy(update={"version": version.version})


@stage(tracking=True)
def finish_tracking(context: JobContext, comparison: Comparison, policy: Policy) -> str:
    """Put comparison, report and choice into the job's run; returns the address of its page."""
    tracker = Tracker(context.tracking_uri)
    url = tracker.run_url(comparison.run_id)
    tracker.finish_job(
        comparison, policy, report.html(comparison), report.markdown(comparison, url), failed=bool(comparison.failed)
    )
    return url


@stage(tracking=True)
def track_seconds(context: JobContext, seconds: dict[str, float], total_s: float) -> None:
    """Put the seconds of each stage into the job's run, those of the whole job, and those that are orchestration."""
    orchestration_s = total_s - sum(seconds.get(name, 0.0) for name in WORK)
    figures = {f"stage_{name.replace(' ', '_')}_s": value for name, value in seconds.items()}
    figures |= {"job_s": total_s, "job_orchestration_s": orchestration_s}
    Tracker(context.tracking_uri).log_figures(context.run_id, figures)
    log.info("the job took %.0f s, of which %.0f s were orchestration", total_s, orchestration_s)


@stage()
def show_comparison(comparison: Comparison, run_url: str) -> None:
    """Publish report, table and link as artifacts of the flow run."""
    name = comparison.model
    page = report.markdown(comparison, run_url)
    results = (*comparison.variants, *comparison.peers)
    rows = [{"variant": result.name, "status": result.status, **_shown(result)} for result in results]
    create_markdown_artifact(page, artifact_key("report", name), f"{name}: comparison and choice")
    create_table_artifact(rows, artifact_key("metrics", name), f"{name}: every metric of every variant")
    create_link_artifact(run_url, f"{name} in MLflow", artifact_key("mlflow", name))


def _shown(result: VariantResult) -> dict[str, float | str]:
    values = {metric: round(value, 4) for metric, value in result.metrics.items()}
    return values | {metric: report.marked(result, metric, str(values[metric])) for metric in result.disturbed}
