"""What a retraining leaves in MLflow: a run with its data, its loss curves and its outcome, the job's run below it.

From a deployed version one gets back to the lines that it was trained on: the version's tag ``slmops.retrain_run``
names this run, and the run holds the training items, the validation items and the evaluation set as files.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from slmops.tracking.client import talking, text_of  # first: it sets the environment that MLflow reads at import

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run

from slmops.core.errors import TrackingError
from slmops.core.values import Checkpoint, Comparison
from slmops.tracking.evaluation import CURVES, DIGEST_SHOWN
from slmops.tracking.tracker import KIND, Tracker
from slmops.training.sources import public
from slmops.training.values import Finetuned, LossPoint, Retrain, Retrained, TrainingData

RETRAIN = "retrain"
RUN, DATA = "slmops.retrain_run", "slmops.data_digest"
NUMBER = "slmops.retraining"
INPUT, RESULT = "slmops.input_digest", "retrained.json"
LOSSES = ("train_loss", "validation_loss", "learning_rate")
"""In MLflow with :data:`CURVES` before them: the first section of the run's charts."""


class TrainingTracker:
    """The retrainings of one MLflow server."""

    def __init__(self, uri: str) -> None:
        self._tracker = Tracker(uri)
        self.uri = uri
        self._client = MlflowClient(tracking_uri=uri)

    def last(self, name: str, input_digest: str) -> Retrained | None:
        """The result of the model's last retraining that came to an end, if it had the same input.

        One that failed, or was killed, came to none: it is worth another attempt.
        """
        with self._talking():
            ended = [run for run in self._runs(name) if run.data.tags.get("slmops.outcome")]
            if not ended or ended[0].data.tags.get(INPUT) != input_digest:
                return None
            return Retrained.model_validate_json(text_of(self._client, ended[0].info.run_id, RESULT))

    def last_data(self, name: str) -> str | None:
        """Digest of the training items of the model's last retraining that came to an end."""
        with self._talking():
            ended = [run for run in self._runs(name) if run.data.tags.get("slmops.outcome")]
            return ended[0].data.tags.get(DATA) if ended else None

    def start(self, name: str, request: Retrain, checkpoint: Checkpoint, input_digest: str, flow_run: str) -> str:
        """Open the run of a retraining, or again that of an attempt with the same input that was killed.

        The caller holds the lock of the model's retraining, so a run that is still open has no flow any more.
        """
        with self._talking():
            experiment = self._tracker.experiment(name).experiment_id
            run_id = None
            runs = self._runs(name)
            for stale in (run for run in runs if run.info.status == "RUNNING"):
                if run_id is None and stale.data.tags.get(INPUT) == input_digest:
                    run_id = str(stale.info.run_id)
                else:
                    self._client.set_terminated(stale.info.run_id, "KILLED")
            if run_id is None:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                tags = {
                    KIND: RETRAIN,
                    "slmops.model": name,
                    "slmops.source": checkpoint.source,
                    INPUT: input_digest,
                    NUMBER: str(1 + max((_number(run) for run in runs), default=0)),
                }
                run_id = str(self._client.create_run(experiment, run_name=f"retrain {stamp}", tags=tags).info.run_id)
                asked = request.model_dump(mode="json", exclude_none=True) | {"data": public(request.data)}
                params = {**asked, **{f"training.{key}": value for key, value in asked.pop("training").items()}}
                params |= {"base_digest": checkpoint.digest, "parameters": checkpoint.parameters}
                self._client.log_batch(run_id, params=[Param(key, _short(value)) for key, value in params.items()])
            self._client.set_tag(run_id, "slmops.prefect_flow_run", flow_run)
            return run_id

    def log_data(self, run_id: str, data: TrainingData, report: str) -> None:
        """Log what is trained on and measured with: the items, their digests, and what the checks found."""
        with self._talking():
            params = {"data_digest": data.digest, "evaluation_digest": data.evaluation_digest}
            self._client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
            self._client.set_tag(run_id, DATA, data.digest)
            for path in (data.train, data.validation, data.evaluation):
                self._client.log_artifact(run_id, str(path), "data")
            self._client.log_text(run_id, report, "data/report.md")
            of = (("training data", data.digest, "training"), ("evaluation set", data.evaluation_digest, "evaluation"))
            inputs = [
                DatasetInput(
                    Dataset(
                        name=kind,
                        digest=digest[:DIGEST_SHOWN],
                        source_type="local",
                        source=json.dumps({"uri": data.source}),
                        profile=json.dumps({"sha256": digest}),
                    ),
                    [InputTag("mlflow.data.context", context)],
                )
                for kind, digest, context in of
            ]
            known = {one.dataset.digest for one in self._client.get_run(run_id).inputs.dataset_inputs}
            self._client.log_inputs(run_id, datasets=[one for one in inputs if one.dataset.digest not in known])
            counts = {"training_items": data.report.items, "evaluation_items": data.report.evaluation_items}
            self._figures(run_id, {key: float(value) for key, value in counts.items()})

    def log_losses(self, run_id: str, points: Sequence[LossPoint]) -> None:
        """Log points of the loss curves; those that are there already stay single.

        MLflow tells points apart by name, step, value and time. So the time is that of the run's start plus the seconds
        of training, the same whenever it is sent.
        """
        with self._talking():
            start = self._client.get_run(run_id).info.start_time
            metrics = [
                Metric(f"{CURVES}{name}", value, start + round(point.seconds * 1000), point.step)
                for point in points
                for name in LOSSES
                if (value := getattr(point, name)) is not None
            ]
            for first in range(0, len(metrics), 1000):  # MLflow takes no more at a time
                self._client.log_batch(run_id, metrics=metrics[first : first + 1000])

    def log_training(self, run_id: str, finetuned: Finetuned, log: Path) -> None:
        """Log a finished fine-tuning: all points of its curves, its figures, the adapter, and the worker's log.

        Raises:
            TrackingError: A point is missing afterwards.
        """
        self.log_losses(run_id, finetuned.losses)
        with self._talking():
            figures = {
                "steps": finetuned.steps,
                "epochs": finetuned.epochs,
                "best_step": finetuned.best_step,
                "best_validation_loss": finetuned.validation_loss,
                "training_s": finetuned.seconds,
                "training_memory_peak_mb": finetuned.memory_peak_mb,
                "trained_parameters": finetuned.trained_parameters,
            }
            self._figures(run_id, {key: float(value) for key, value in figures.items()})
            for key in ("stopped", "precision"):
                self._client.set_tag(run_id, f"slmops.{key}", str(getattr(finetuned, key)))
            self._client.log_artifacts(run_id, str(finetuned.adapter), "adapter")
            with tempfile.TemporaryDirectory() as scratch:
                manifest = Path(scratch) / "training.json"
                manifest.write_text(finetuned.model_dump_json(indent=2), encoding="utf-8")
                self._client.log_artifact(run_id, str(manifest))
            if log.exists():
                self._client.log_artifact(run_id, str(log), "logs")
            for name in LOSSES:
                wanted = {point.step for point in finetuned.losses if getattr(point, name) is not None}
                there = (
                    {metric.step for metric in self._client.get_metric_history(run_id, f"{CURVES}{name}")}
                    if wanted
                    else set()
                )
                if wanted - there:
                    raise TrackingError(f"MLflow lost {len(wanted - there)} points of {name} of a fine-tuning.")

    def log_figures(self, run_id: str, figures: dict[str, float]) -> None:
        """Log single figures."""
        with self._talking():
            self._figures(run_id, figures)

    def link(self, run_id: str, comparison: Comparison) -> None:
        """Put the job's run below that of the retraining, and name the latter in all versions that were made."""
        with self._talking():
            data = self._client.get_run(run_id).data.tags.get(DATA, "")
            for key, value in {"mlflow.parentRunId": run_id, RUN: run_id}.items():
                self._client.set_tag(comparison.run_id, key, value)
            for result in comparison.variants:
                if result.version is not None:
                    for key, value in {RUN: run_id, DATA: data}.items():
                        self._client.set_model_version_tag(comparison.model, str(result.version), key, value)

    def finish(self, result: Retrained) -> None:
        """Put the outcome into the run and close it; from now on the same input has been dealt with."""
        with self._talking():
            run_id = result.run_id
            self._figures(run_id, {f"accuracy_{key}": one.value for key, one in result.accuracy.items()})
            self._figures(run_id, {f"seconds/{key.replace(' ', '_')}": one for key, one in result.seconds.items()})
            self._client.log_text(run_id, result.model_dump_json(indent=2), RESULT)
            self._client.set_tag(run_id, "mlflow.note.content", result.detail)
            self._client.set_tag(run_id, "slmops.outcome", result.outcome)
            self._client.set_terminated(run_id, "FINISHED")

    def abort(self, run_id: str, reason: str) -> None:
        """Close the run of a retraining that failed, with the reason."""
        with self._talking():
            self._client.set_tag(run_id, "mlflow.note.content", f"Failed: {reason}"[:5000])
            self._client.set_terminated(run_id, "FAILED")

    def url(self, run_id: str) -> str:
        """The run's page in MLflow's UI."""
        return self._tracker.run_url(run_id)

    def _runs(self, name: str) -> list[Run]:
        """Retrainings of a model, the newest first, by their number: clocks can be set back."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return []
        found: list[Run] = self._client.search_runs([experiment.experiment_id], f"tags.`{KIND}` = '{RETRAIN}'")
        return sorted(found, key=_number, reverse=True)

    def _figures(self, run_id: str, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in figures.items()])

    def _talking(self) -> AbstractContextManager[None]:
        return talking(self.uri)


def _short(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:500]


def _number(run: Run) -> int:
    """Which retraining of its model it is, counted from 1."""
    return int(run.data.tags.get(NUMBER, "0"))
