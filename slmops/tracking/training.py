"""What a retraining leaves in MLflow: a run with its data, its loss curves and its outcome, the job's run below it.

From a deployed version one gets back to the lines that it was trained on: the version's tag ``slmops.retrain_run``
names this run, and the run holds the training items, the validation items and the evaluation set as files.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.tracking.client import FLOW_RUN, KIND, NOTE, OF_CURVES, PARENT, Connection, dataset_input, stamp

import mlflow
from mlflow.entities import Metric, Run

from slmops.core.errors import DataError
from slmops.core.values import Checkpoint, Comparison, Measurement
from slmops.training.sources import public
from slmops.training.values import WAITING, Finetuned, LossPoint, Retrain, Retrained, TrainingData

OF_RETRAINING = "retrain"
RETRAIN_RUN, DATA_DIGEST, INPUT_DIGEST = "slmops.retrain_run", "slmops.data_digest", "slmops.input_digest"
NUMBER, OUTCOME, UNTIL = "slmops.retraining", "slmops.outcome", "slmops.approval_until"
RESULT_FILE = "retrained.json"
SERIES = ("train_loss", "validation_loss", "learning_rate")
"""In MLflow with :data:`OF_CURVES` before them: the first section of the run's charts."""


class TrainingTracker(Connection):
    def last(self, name: str, input_digest: str) -> Retrained | None:
        """The result of the model's last retraining that came to an end and did not fail, if it had the same input."""
        ended = self._ended(name)
        if not ended or ended[0].data.tags.get(INPUT_DIGEST) != input_digest:
            return None
        result = self._result(ended[0])
        if result.outcome == WAITING and time.time() > float(ended[0].data.tags[UNTIL]):
            late = "Nobody decided about it in time. The champion stays."
            result = result.model_copy(update={"outcome": "refused", "detail": late})
            self.finish(result)
        return result

    def last_data(self, name: str) -> str | None:
        """Digest of the training items of the model's last retraining that came to an end."""
        ended = self._ended(name)
        return ended[0].data.tags.get(DATA_DIGEST) if ended else None

    def waiting(self, name: str, flow_run: str) -> Retrained | None:
        """What a flow run had done when it was suspended to wait for approval; None if it was not."""
        found = [run for run in self._ended(name) if run.data.tags.get(FLOW_RUN) == flow_run]
        return next((self._result(run) for run in found if run.data.tags[OUTCOME] == WAITING), None)

    def evaluation_set(self, run_id: str, folder: Path) -> Path:
        """Fetch the evaluation set of a retraining, which may be from another machine, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        [name] = [name for name in self._client.files_in(run_id, "data") if Path(name).stem == "evaluation"]
        return Path(self._client.download_artifacts(run_id, name, str(folder)))

    def records(self, name: str) -> list[dict[str, Any]]:
        """Every record of one of MLflow's managed datasets: ``dataset_record_id``, ``inputs`` and ``expectations``.

        They are in MLflow's order: by time, and by chance among the records that were added together. DataError is
        raised if there is no dataset with this name, or more than one: MLflow allows that.
        """
        quote, before = "'" if '"' in name else '"', os.environ.get("MLFLOW_TRACKING_URI")
        # MLflow's filters cannot spell a name with both quotes.
        query = f"name = {quote}{name}{quote}"
        same = [] if quote in name else self._client.search_datasets(filter_string=query)
        if len(same) != 1:
            many, fix = "no", "Its page 'Datasets' lists them, each with its experiment."
            if same:
                many, fix = "more than one", "Delete all but one."
            raise DataError(f"MLflow at {self.shown} has {many} dataset of the name {name!r}.", fix)
        mlflow.set_tracking_uri(self.uri)  # a dataset loads its records from the address of the whole process
        try:
            loaded = same[0].records
        finally:
            mlflow.set_tracking_uri(before)
        return [
            {"dataset_record_id": one.dataset_record_id, "inputs": one.inputs, "expectations": one.expectations or {}}
            for one in loaded
        ]

    def start(self, name: str, request: Retrain, checkpoint: Checkpoint, input_digest: str, flow_run: str) -> Retrained:
        """Open the run of a retraining, or again that of an attempt with the same input that was killed.

        The caller holds the lock of the model's retraining, so a run that is still open has no flow any more. Returns
        the result as far as it is known.
        """
        experiment = self._experiment(name)
        run_id = None
        runs = self._runs(name)
        for stale in (run for run in runs if run.info.status == "RUNNING"):
            if run_id is None and stale.data.tags.get(INPUT_DIGEST) == input_digest:
                run_id = str(stale.info.run_id)
            else:
                self._client.set_terminated(stale.info.run_id, "KILLED")
        if run_id is None:
            tags = {
                KIND: OF_RETRAINING,
                "slmops.model": name,
                "slmops.source": checkpoint.source,
                INPUT_DIGEST: input_digest,
                NUMBER: str(1 + max((_number(run) for run in runs), default=0)),
            }
            run_id = self._client.open_run(experiment, f"retrain {stamp()}", tags)
            asked = request.model_dump(mode="json", exclude_none=True) | {"data": public(request.data)}
            params = {**asked, **{f"training.{key}": value for key, value in asked.pop("training").items()}}
            params |= {"base_digest": checkpoint.digest, "parameters": checkpoint.parameters}
            self._client.log_params(run_id, params)
        self._client.set_tags(run_id, {FLOW_RUN: flow_run})
        known = {"model": name, "input_digest": input_digest, "run_id": run_id, "url": self.run_url(run_id)}
        return Retrained(outcome="refused", detail="", **known)

    def log_data(self, run_id: str, data: TrainingData, report: str) -> None:
        """Log what is trained on and measured with: the items, their digests, and what the checks found."""
        self._client.log_params(run_id, {"data_digest": data.digest, "evaluation_digest": data.evaluation_digest})
        self._client.set_tags(run_id, {DATA_DIGEST: data.digest})
        for path in (data.train, data.validation, data.evaluation):
            self._client.log_artifact(run_id, str(path), "data")
        self._client.log_text(run_id, report, "data/report.md")
        inputs = [
            dataset_input("training data", data.digest, data.source, "training"),
            dataset_input("evaluation set", data.evaluation_digest, data.source, "evaluation"),
        ]
        known = {one.dataset.digest for one in self._client.get_run(run_id).inputs.dataset_inputs}
        self._client.log_inputs(run_id, datasets=[one for one in inputs if one.dataset.digest not in known])
        counts = {"training_items": data.report.items, "evaluation_items": data.report.evaluation_items}
        self._client.log_figures(run_id, counts)

    def log_losses(self, run_id: str, points: Sequence[LossPoint]) -> None:
        """Log points of the loss curves; those that are there already stay single.

        MLflow tells points apart by name, step, value and time. So the time is that of the run's start plus the seconds
        of training, the same whenever it is sent.
        """
        start = self._client.get_run(run_id).info.start_time
        metrics = [
            Metric(f"{OF_CURVES}{name}", value, start + round(point.seconds * 1000), point.step)
            for point in points
            for name in SERIES
            if (value := getattr(point, name)) is not None
        ]
        self._client.log_batch(run_id, metrics)

    def log_training(self, run_id: str, finetuned: Finetuned, log: Path) -> None:
        """Log a finished fine-tuning: all points of its curves, its figures, the adapter, and the worker's log."""
        self.log_losses(run_id, finetuned.losses)
        figures = finetuned.model_dump(include={"steps", "epochs", "best_step", "trained_parameters"})
        figures |= {"best_validation_loss": finetuned.validation_loss, "training_s": finetuned.seconds}
        figures["training_memory_peak_mb"] = finetuned.memory_peak_mb
        self._client.log_figures(run_id, figures)
        tags = {"slmops.stopped": str(finetuned.stopped), "slmops.precision": str(finetuned.precision)}
        self._client.set_tags(run_id, tags)
        self._client.log_artifacts(run_id, str(finetuned.adapter), "adapter")
        self._client.log_text(run_id, finetuned.model_dump_json(indent=2), "training.json")
        if log.exists():
            self._client.log_artifact(run_id, str(log), "logs")

    def log_accuracy(self, run_id: str, accuracy: dict[str, Measurement]) -> None:
        """Log what the checkpoints answered, before anything is decided."""
        self._client.log_figures(run_id, {f"accuracy_{label}": one.value for label, one in accuracy.items()})

    def link(self, run_id: str, comparison: Comparison) -> None:
        """Put the job's run below that of the retraining, and name the latter in all versions that were made."""
        retraining = self._client.get_run(run_id).data
        origin = {
            RETRAIN_RUN: run_id,
            DATA_DIGEST: retraining.tags.get(DATA_DIGEST, ""),
            "slmops.data": retraining.params.get("data", ""),
            "slmops.base_model": retraining.tags.get("slmops.source", ""),
        }
        self._client.set_tags(comparison.run_id, {PARENT: run_id, RETRAIN_RUN: run_id})
        for number in (result.version for result in comparison.variants if result.version is not None):
            self._client.set_version_tags(comparison.model, str(number), origin)

    def finish(self, result: Retrained) -> None:
        """Put the outcome into the run and close it; from now on the same input has been dealt with."""
        self._record(result)
        self._client.set_terminated(result.run_id, "FINISHED")

    def wait(self, result: Retrained, until: float) -> None:
        """Keep what was done so far in a run that waits for approval until a time, in seconds since 1970."""
        self._record(result)
        self._client.set_tags(result.run_id, {UNTIL: str(until)})
        # Not an open run, which would be taken for that of a flow that was killed.
        self._client.update_run(result.run_id, "SCHEDULED")

    def abort(self, run_id: str, reason: str) -> None:
        """Close the run of a retraining that failed, with the reason."""
        self._client.set_tags(run_id, {NOTE: f"Failed: {reason}"[:5000], OUTCOME: ""})
        self._client.set_terminated(run_id, "FAILED")

    def _record(self, result: Retrained) -> None:
        figures = {f"accuracy_{key}": one.value for key, one in result.accuracy.items()}
        figures |= {f"seconds/{key.replace(' ', '_')}": one for key, one in result.seconds.items()}
        self._client.log_figures(result.run_id, figures)
        self._client.log_text(result.run_id, result.model_dump_json(indent=2), RESULT_FILE)
        self._client.set_tags(result.run_id, {NOTE: result.detail, OUTCOME: result.outcome})

    def _result(self, run: Run) -> Retrained:
        return Retrained.model_validate_json(self._client.text_of(run.info.run_id, RESULT_FILE))

    def _ended(self, name: str) -> list[Run]:
        return [run for run in self._runs(name) if run.data.tags.get(OUTCOME)]

    def _runs(self, name: str) -> list[Run]:
        """Retrainings of a model, the newest first, by their number: clocks can be set back."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return []
        return sorted(self._client.runs_of(experiment.experiment_id, OF_RETRAINING), key=_number, reverse=True)


def _number(run: Run) -> int:
    """Which retraining of its model it is, counted from 1."""
    return int(run.data.tags.get(NUMBER, "0"))
