"""From data to a fine-tuned checkpoint."""

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Queue
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate

from slmops.core.errors import TrackingError
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Measurement, artifact_key
from slmops.tracking.tracker import Tracker
from slmops.tracking.training import TrainingTracker
from slmops.training import data, finetune, sources
from slmops.training.sources import Fetched
from slmops.training.values import Finetuned, LossPoint, Retrain, TrainingData
from tasks.stage import stage

log = logging.getLogger("slmops.train")

LAST_S = 30.0  # how long the end of a training waits for its last points to be sent


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
