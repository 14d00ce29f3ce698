"""Remeasurement and soak: find what is to be measured, measure it, log and show the result."""

from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from slmops import report
from slmops.core import machine
from slmops.core.values import Comparison, Measurement
from slmops.delivery import remeasurement
from slmops.evaluation import drift, soak
from slmops.evaluation.drift import Recorded, Remeasure, Remeasured
from slmops.evaluation.soak import Soak, SoakResult, Target
from slmops.foundry.versions import ModelVersion
from slmops.tracking.tracker import Tracker
from tasks.stage import artifact_key, stage


@stage("find record of version {version.version}", tracking=True)
def find_record(uri: str, version: ModelVersion, folder: Path) -> Recorded:
    """What its evaluation recorded of it, with copies in ``folder`` of what it was measured with."""
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(uri).recorded(version.run_id, folder)


measure_speed = stage("measure speed again")(remeasurement.measure_speed)
measure_perplexity = stage("measure perplexity again")(remeasurement.measure_perplexity)
ask_questions = stage("ask again")(remeasurement.ask_questions)
soak_variant = stage("soak {target.variant}")(soak.measure)


@stage(tracking=True)
def track_measured(uri: str, version: ModelVersion, figures: dict[str, Measurement]) -> Comparison:
    """Add the figures to the version's run, and to the comparison of its job with its report; returns that."""
    tracker = Tracker(uri)
    comparison = tracker.log_measured(version, figures, machine.hardware())
    note = report.markdown(comparison, tracker.run_url(comparison.run_id))
    tracker.log_comparison(comparison, report.html(comparison), note)
    return comparison


@stage(tracking=True)
def track_remeasurement(
    uri: str, result: Remeasured, request: Remeasure, recorded: Recorded, flow_run: str
) -> Remeasured:
    """Log it as a run of the model's experiment, and publish it on the Prefect page; returns it with the run's id."""
    tracker = Tracker(uri)
    run_id = tracker.log_remeasurement(result, request, machine.hardware(), flow_run)
    links = f"[MLflow run]({tracker.run_url(run_id)}), [what was recorded]({tracker.run_url(recorded.run_id)})"
    about = f"{result.model}: version {result.version} measured again"
    page = f"{drift.text(result, markdown=True)}\n\n{links}"
    create_markdown_artifact(page, artifact_key("remeasure", result.model), about)
    return result.model_copy(update={"run_id": run_id})


@stage(tracking=True)
def find_variant(uri: str, request: Soak) -> Target:
    """The variant of the latest comparison."""
    return soak.find(Tracker(uri).latest(request.name), request.variant)


@stage(tracking=True)
def track_soak(uri: str, result: SoakResult, memory_kb: tuple[float, ...], flow_run: str) -> SoakResult:
    """Log it as a run of the model's experiment, and publish it on the Prefect page; returns it with the run's id."""
    tracker = Tracker(uri)
    version = {} if result.version is None else {"slmops.version": str(result.version)}
    run_id = tracker.log_soak(
        result.model,
        {
            "slmops.variant": result.variant,
            "slmops.foundry_id": result.foundry_id,
            **version,
            "slmops.outcome": result.outcome,
            "slmops.reason": result.detail,
            "slmops.prefect_flow_run": flow_run,
        },
        result.metrics,
        [kb / 1e3 for kb in memory_kb],
    )
    page = f"```\n{result.text}\n```\n\n[MLflow run]({tracker.run_url(run_id)})"
    create_markdown_artifact(page, artifact_key("soak", result.model), f"{result.model}: soak of {result.variant}")
    return result.model_copy(update={"run_id": run_id})
