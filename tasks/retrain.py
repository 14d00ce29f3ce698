"""What surrounds a training: whether there is anything new, what is tracked, and how the service does."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import get_args

from prefect.artifacts import create_markdown_artifact

from slmops.core.errors import ServingError
from slmops.core.job import Precision
from slmops.core.settings import Settings
from slmops.core.values import Measurement, artifact_key
from slmops.evaluation import dataset
from slmops.foundry.versions import ModelVersion
from slmops.serving import home_service, new_champion
from slmops.serving.new_champion import Probation
from slmops.tracking.evaluation import EVALUATION_SET, QUICK, TEXT
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from slmops.tracking.training import TrainingTracker
from slmops.training.values import Retrain, Retrained, TrainingData
from tasks.stage import stage

log = logging.getLogger("slmops.retrain")

find_last = stage("look for news", tracking=True)(TrainingTracker.last)
start_tracking = stage("start tracking", tracking=True)(TrainingTracker.start)
find_waiting = stage("look whether it waited for approval", tracking=True)(TrainingTracker.waiting)
track_data = stage("track data", tracking=True)(TrainingTracker.log_data)
track_training = stage("track training", tracking=True)(TrainingTracker.log_training)
track_accuracy = stage("track accuracy", tracking=True)(TrainingTracker.log_accuracy)
link = stage("link the job with its data", tracking=True)(TrainingTracker.link)
track_waiting = stage("track waiting", tracking=True)(TrainingTracker.wait)
fetch_evaluation_set = stage("fetch evaluation set", tracking=True)(TrainingTracker.evaluation_set)
finish_tracking = stage("finish tracking", tracking=True)(TrainingTracker.finish)
roll_back = stage("roll back version {failed.version}", tracking=True)(Registry.withdraw)


@stage("look at the champion", tracking=True)
def find_outdated_champion(
    uri: str, name: str, data: TrainingData, request: Retrain, settings: Settings
) -> ModelVersion | None:
    """The champion, if it was not measured as its challenger will be, and its checkpoint is still in this home."""
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


@stage("switch the service to version {version.version}")
def switch_service(version: ModelVersion, request: Retrain, settings: Settings, uri: str) -> str | None:
    """Wait until the service serves the new champion; its address, None without one. ServingError: it does not."""
    running = home_service.status(settings.home)
    if request.serve:
        url = home_service.ensure(version.name, settings, uri)
    elif running is not None and running.model == version.name:
        url = running.url
    else:
        return None
    new_champion.await_switch(url, version, partial(Registry(uri).champion, version.name))
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
    log.info("watching %s for %d s", version.label, request.watch_s)
    watched = new_champion.watch(url, version, evaluation, request.matcher, measured, request.watch_s, settings)
    log.log(logging.INFO if watched.held else logging.WARNING, "%s", watched.detail)
    return watched


@stage("switch back to version {version.version}")
def switch_back(url: str, version: ModelVersion, uri: str) -> None:
    """Wait until the service serves what it served before. If it does not, all that is left is to say so."""
    try:
        new_champion.await_switch(url, version, partial(Registry(uri).champion, version.name))
    except ServingError as error:
        log.error("%s", error)


@stage()
def show_result(result: Retrained) -> None:
    page = f"{result.outcome}\n\n```\n{result.text}\n```\n\n[MLflow run]({result.url})"
    create_markdown_artifact(page, artifact_key("retraining", result.model), f"{result.model}: retraining")
