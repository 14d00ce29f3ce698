"""What surrounds a training: whether there is anything new, what is tracked, and how the service does."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import get_args

from prefect.artifacts import create_markdown_artifact

from slmops.core.errors import ServingError
from slmops.core.job import Precision
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Comparison, Measurement, artifact_key
from slmops.evaluation import dataset
from slmops.foundry.versions import ModelVersion, Promotion
from slmops.serving import home_service, new_champion
from slmops.serving.new_champion import Probation
from slmops.tracking.evaluation import EVALUATION_SET, QUICK, TEXT
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from slmops.tracking.training import TrainingTracker
from slmops.training import outcome, report
from slmops.training.values import Finetuned, Retrain, Retrained, TrainingData
from tasks.stage import stage

log = logging.getLogger("slmops.retrain")


@stage("look for news", tracking=True)
def find_last(uri: str, name: str, input_digest: str) -> Retrained | None:
    """The last retraining, if it had the same input."""
    return TrainingTracker(uri).last(name, input_digest)


@stage(tracking=True)
def start_tracking(
    uri: str, name: str, request: Retrain, checkpoint: Checkpoint, input_digest: str, flow_run: str
) -> Retrained:
    """Open the MLflow run, or that of an attempt that was killed; returns the result as far as it is known."""
    tracker = TrainingTracker(uri)
    run_id = tracker.start(name, request, checkpoint, input_digest, flow_run)
    url = tracker.run_url(run_id)
    return Retrained(model=name, outcome="refused", detail="", input_digest=input_digest, run_id=run_id, url=url)


@stage("look at the champion", tracking=True)
def find_outdated_champion(
    uri: str, name: str, data: TrainingData, request: Retrain, settings: Settings
) -> ModelVersion | None:
    """The champion, if it has to be measured again and can be.

    It has to if it was measured with something else than its challenger will be. It can if it came of a retraining in
    this home, and the checkpoint is still here.
    """
    champion = Registry(uri).champion(name)
    if champion is None or champion.variant not in get_args(Precision):
        return None
    checkpoint = Path(champion.tags.get("slmops.source", ""))
    if settings.trainings not in checkpoint.parents or not checkpoint.is_dir():
        return None
    conditions = {
        EVALUATION_SET: data.evaluation_digest,
        TEXT: dataset.perplexity_text(None)[1],
        QUICK: json.dumps(request.quick),
    }
    return champion if Tracker(uri).conditions(champion.run_id) != conditions else None


@stage(tracking=True)
def track_data(uri: str, run_id: str, data: TrainingData) -> None:
    """Log what is trained on."""
    TrainingTracker(uri).log_data(run_id, data, report.markdown(data))


@stage(tracking=True)
def track_training(uri: str, run_id: str, finetuned: Finetuned, worker_log: Path) -> None:
    """Log curves, figures and adapter."""
    TrainingTracker(uri).log_training(run_id, finetuned, worker_log)


@stage(tracking=True)
def track_accuracy(uri: str, run_id: str, accuracy: dict[str, Measurement]) -> None:
    """Log what the checkpoints answered, before anything is decided."""
    TrainingTracker(uri).log_figures(run_id, {f"accuracy_{label}": one.value for label, one in accuracy.items()})


@stage("link the job with its data", tracking=True)
def link(uri: str, run_id: str, comparison: Comparison) -> None:
    """Let the job and its versions name this retraining."""
    TrainingTracker(uri).link(run_id, comparison)


@stage("look whether it waited for approval", tracking=True)
def find_waiting(uri: str, name: str, flow_run: str) -> Retrained | None:
    """What this flow run had done when it was suspended; None if it was not."""
    return TrainingTracker(uri).waiting(name, flow_run)


@stage(tracking=True)
def track_waiting(uri: str, so_far: Retrained) -> None:
    """Keep what was done so far: the run is about to wait for approval."""
    TrainingTracker(uri).wait(so_far, time.time() + Promotion(name=so_far.model).approval_timeout_s)


@stage(tracking=True)
def fetch_evaluation_set(uri: str, run_id: str, folder: Path) -> Path:
    """The evaluation set of the retraining, which may have been prepared on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingTracker(uri).evaluation_set(run_id, folder)


@stage(tracking=True)
def finish_tracking(uri: str, result: Retrained) -> None:
    """Close the run with its outcome."""
    TrainingTracker(uri).finish(result)


@stage("switch the service to version {version.version}")
def switch_service(version: ModelVersion, request: Retrain, settings: Settings, uri: str) -> str | None:
    """Wait until the service of this machine serves the new champion; returns its address, None without a service.

    Raises:
        ServingError: It goes on with the old one.
    """
    running = home_service.status(settings.home)
    if request.serve:
        url = home_service.ensure(version.name, settings, uri)
    elif running is not None and running.model == version.name:
        url = running.url
    else:
        return None
    registry = Registry(uri)
    new_champion.await_switch(url, version, lambda: registry.champion(version.name))
    log.info("%s is served at %s", version.label, url)
    return url


@stage("watch version {version.version}")
def watch_service(
    url: str,
    version: ModelVersion,
    request: Retrain,
    evaluation: Path,
    measured: Measurement | None,
    settings: Settings,
) -> Probation:
    """Ask the new version while it serves."""
    log.info("watching %s for %d s", version.label, request.watch_s)
    watched = new_champion.watch(url, version, evaluation, request.matcher, measured, request.watch_s, settings)
    log.log(logging.INFO if watched.held else logging.WARNING, "%s", watched.detail)
    return watched


@stage("roll back version {version.version}", tracking=True)
def roll_back(uri: str, version: ModelVersion, reason: str) -> ModelVersion | None:
    """Take the promotion back; returns the champion now, None if there was none before."""
    return Registry(uri).withdraw(version, reason)


@stage("switch back to version {version.version}")
def switch_back(url: str, version: ModelVersion, uri: str) -> None:
    """Wait until the service serves what it served before. If it does not, all that is left is to say so."""
    registry = Registry(uri)
    try:
        new_champion.await_switch(url, version, lambda: registry.champion(version.name))
    except ServingError as error:
        log.error("%s", error)


@stage()
def show_result(result: Retrained) -> None:
    """Publish the outcome as an artifact of the flow run."""
    create_markdown_artifact(
        f"{result.outcome}\n\n```\n{outcome.text(result)}\n```\n\n[MLflow run]({result.url})",
        key=artifact_key("retraining", result.model),
        description=f"{result.model}: retraining",
    )
