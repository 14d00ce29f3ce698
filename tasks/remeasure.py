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
def track_remeasurement(uri: str, result: Remeasured, request: Remeasure, flow_run: str) -> tuple[Remeasured, str]:
    """Log it as a run of the model's experiment; returns the result with the run's id, and the address of its page."""
    tracker = Tracker(uri)
    run_id = tracker.log_remeasurement(result, request, machine.hardware(), flow_run)
    return result.model_copy(update={"run_id": run_id}), tracker.run_url(run_id)


@stage()
def show_remeasurement(result: Remeasured, run_url: str, recorded_url: str) -> None:
    """Publish the comparison as an artifact of the flow run."""
    page = f"{drift.text(result, markdown=True)}\n\n[MLflow run]({run_url}), [what was recorded]({recorded_url})"
    about = f"{result.model}: version {result.version} measured again"
    create_markdown_artifact(page, artifact_key("remeasure", result.model), about)
