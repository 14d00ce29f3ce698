"""The stages of a retraining: from data to a fine-tuned checkpoint, what is tracked of it, and how the service does."""

import contextvars
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Queue
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate

from slmops.conversion import recipe_files
from slmops.core.errors import ServingError, TrackingError
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Measurement
from slmops.evaluation import dataset
from slmops.foundry.versions import ModelVersion
from slmops.serving import home_service, new_champion
from slmops.serving.new_champion import Probation
from slmops.tracking.evaluation import EVALUATION_SET, QUICK, TEXT
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from slmops.tracking.training import TrainingTracker
from slmops.training import data, finetune, sources
from slmops.training.sources import Fetched
from slmops.training.values import Finetuned, LossPoint, Retrain, Retrained, TrainingData
from tasks.stage import artifact_key, stage

log = logging.getLogger("slmops.retrain")

LAST_S = 30.0  # how long the end of a training waits for its last points to be sent

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


@stage()
def fetch_data(request: Retrain, settings: Settings, uri: str) -> Fetched:
    """The training items and the evaluation set, wherever they are."""
    return sources.fetch(request, settings, download=Tracker(uri).download, dataset=TrainingTracker(uri).records)


@stage()
def check_data(
    fetched: Fetched, request: Retrain, checkpoint: Checkpoint, name: str, settings: Settings
) -> TrainingData:
    """Every check, and the split into training and validation."""
    prepared = data.prepare(fetched, request, checkpoint, settings, name)
    create_markdown_artifact(data.markdown(prepared), artifact_key("data", name), f"{name}: training data")
    log.info("%s", data.summary(prepared))
    return prepared


@stage("fine-tune")
def finetune_model(
    checkpoint: Checkpoint,
    prepared: TrainingData,
    request: Retrain,
    name: str,
    settings: Settings,
    tracker: TrainingTracker,
    run_id: str,
) -> Finetuned:
    """Train the adapter and merge it; an attempt that was killed is resumed."""
    key = artifact_key("training", name)
    bar = UUID(str(create_progress_artifact(0.0, key=key, description=f"{name}: fine-tuning")))
    with _losses_sent(tracker, run_id, bar, request) as send:
        made = finetune.finetune(checkpoint, prepared, request.training, settings, name, send)
    loss = f"validation loss {made.validation_loss:.3f} at step {made.best_step}"
    log.info("%d steps in %.0f s, %s, ended by %s", made.steps, made.seconds, loss, made.stopped)
    return made


@stage("answers of the {label} model")
def answer(
    folder: Checkpoint | Finetuned, prepared: TrainingData, request: Retrain, label: str, name: str, settings: Settings
) -> Measurement:
    """The accuracy of a checkpoint on the evaluation set, before anything is converted."""
    path = folder.merged if isinstance(folder, Finetuned) else folder.path
    accuracy, _ = finetune.answer_with_checkpoint(path, prepared.evaluation, request.matcher, name, label, settings)
    log.info("the %s model: accuracy %.2f of %d", label, accuracy.value, accuracy.samples)
    return accuracy


@contextmanager
def _losses_sent(
    tracker: TrainingTracker, run_id: str, bar: UUID, request: Retrain
) -> Iterator[Callable[[LossPoint], None]]:
    """Yield what sends a point of the loss curve to MLflow, and moves the bar on the Prefect page.

    A thread of its own does that, so that the training waits for neither. What MLflow does not take is sent again with
    the next point. The task that logs the training sends what is missing at the end.
    """
    minutes, epochs = request.training.minutes, request.training.epochs
    points: Queue[LossPoint | None] = Queue()

    def add(point: LossPoint) -> None:
        if point.validation_loss is not None:
            log.info("step %d: validation loss %.3f", point.step, point.validation_loss)
        points.put(point)

    def send() -> None:
        waiting: list[LossPoint] = []
        with get_client(sync_client=True) as client:
            while (point := points.get()) is not None:
                waiting.append(point)
                if not points.empty():
                    continue  # the rest first: one request for all
                share = point.seconds / (60 * minutes) if minutes else point.epoch / epochs
                _move(client, bar, min(1.0, share))
                try:
                    tracker.log_losses(run_id, waiting)
                    waiting.clear()
                except TrackingError as error:
                    log.warning("the loss curve is sent later: %s", error.message)
            _move(client, bar, 1.0)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(send,), daemon=True)
    thread.start()
    try:
        yield add
    finally:
        points.put(None)
        thread.join(LAST_S)


def _move(client: SyncPrefectClient, bar: UUID, share: float) -> None:
    with suppress(httpx.HTTPError):  # the next one moves it
        client.update_artifact(bar, ArtifactUpdate(data=100 * share))


@stage("look at the champion", tracking=True)
def find_outdated_champion(
    uri: str, name: str, prepared: TrainingData, request: Retrain, settings: Settings
) -> ModelVersion | None:
    """The champion, if it was not measured as its challenger will be, and its checkpoint is still in this home."""
    champion = Registry(uri).champion(name)
    if champion is None or champion.variant not in recipe_files.find(settings):
        return None
    checkpoint = Path(champion.tags.get("slmops.source", ""))
    if settings.trainings not in checkpoint.parents or not checkpoint.is_dir():
        return None
    conditions = {
        EVALUATION_SET: prepared.evaluation_digest,
        TEXT: dataset.perplexity_text(None)[1],
        QUICK: json.dumps(request.quick),
    }
    return champion if Tracker(uri).conditions(champion.run_id) != conditions else None


@stage("switch the service to version {version.version}")
def switch_service(
    version: ModelVersion, request: Retrain, settings: Settings, uri: str
) -> tuple[str, ModelVersion] | None:
    """Wait until the service serves the new champion, or of its release what its device has; None without a service.

    Returns its address and the version that it serves. A ServingError says that it does not get there.
    """
    running = home_service.status(settings.home)
    if request.serve:
        url = home_service.ensure(version.name, settings, uri)
    elif running is not None and running.model == version.name:
        url = running.url
    else:
        return None
    registry = Registry(uri)
    number = new_champion.await_switch(url, version, partial(registry.champion, version.name))
    served = registry.find(version.name, str(number))
    log.info("%s is served at %s", served.label, url)
    return url, served


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
