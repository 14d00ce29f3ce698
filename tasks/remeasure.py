"""Find what was recorded of a version, measure it again, log and show how the two compare."""

from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from slmops.core import machine
from slmops.core.values import artifact_key
from slmops.delivery import remeasurement
from slmops.evaluation import drift
from slmops.evaluation.drift import Recorded, Remeasure, Remeasured
from slmops.foundry.versions import ModelVersion
from slmops.tracking.tracker import Tracker
from tasks.stage import stage


@stage("find record of version {version.version}", tracking=True)
def find_record(uri: str, version: ModelVersion, folder: Path) -> Recorded:
    """What its evaluation recorded of it, with copies in ``folder`` of what it was measured with."""
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(uri).recorded(version.run_id, folder)


measure_speed = stage("measure speed again")(remeasurement.measure_speed)
measure_perplexity = stage("measure perplexity again")(remeasurement.measure_perplexity)
ask_questions = stage("ask again")(remeasurement.ask_questions)


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
