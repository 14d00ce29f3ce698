"""A sweep in MLflow: a run with the front and its knee, and below it a run for each trial, with its options."""

from pathlib import Path

from slmops.tracking.client import FLOW_RUN, KIND, NOTE, PARENT, REASON, TEXT_LIMIT, stamp

from slmops.core.values import Checkpoint
from slmops.selection.sweep import Sweep, Swept, Trial
from slmops.tracking.tracker import Tracker

SEARCH, TRIAL, FRONT = "slmops.search", "slmops.trial", "slmops.front"


class SweepTracker(Tracker):
    def start(self, name: str, request: Sweep, checkpoint: Checkpoint, search: str, flow_run: str) -> str:
        """Open the run of a sweep, or again that of an earlier call of the same search."""
        experiment = self._experiment(name)
        for known in self._client.runs_of(experiment, "sweep", f"tags.`{SEARCH}` = '{search}'"):
            self._client.update_run(known.info.run_id, "RUNNING")
            return str(known.info.run_id)
        tags = {KIND: "sweep", "slmops.model": name, SEARCH: search, FLOW_RUN: flow_run}
        run_id = self._client.open_run(experiment, f"{name} sweep {stamp()}", tags)
        asked = {f"sweep.{key}": value for key, value in request.model_dump(mode="json", exclude_none=True).items()}
        self._client.log_params(run_id, {**asked, "checkpoint.digest": checkpoint.digest})
        return run_id

    def log_trial(self, parent: str, trial: Trial, logs: Path) -> None:
        """Log what came of a trial as a child run."""
        run_id = self._child(parent, trial.variant, "trial", f"{trial.number} {trial.variant}")
        tags = {TRIAL: str(trial.number), "slmops.outcome": trial.outcome}
        self._client.set_tags(run_id, tags | ({REASON: trial.detail[:TEXT_LIMIT]} if trial.detail else {}))
        self._client.log_params(run_id, {"recipe": trial.recipe, **trial.options})
        self._client.log_figures(run_id, trial.metrics)
        if trial.outcome == "failed":
            self._fail(run_id, trial.variant, logs)
        else:
            self._client.set_terminated(run_id, "FINISHED")

    def finish(self, result: Swept) -> None:
        """Put the result into the parent run and close it, and mark the trials of the front."""
        experiment = self._client.get_run(result.run_id).info.experiment_id
        for run in self._client.runs_of(experiment, "trial", f"tags.`{PARENT}` = '{result.run_id}'"):
            number = int(run.data.tags[TRIAL])
            of_front = "knee" if number == result.knee else str(number in result.front).lower()
            self._client.set_tags(run.info.run_id, {FRONT: of_front})
        self._client.log_text(result.run_id, result.model_dump_json(indent=2), "sweep.json")
        self._client.set_tags(result.run_id, {NOTE: f"```\n{result.text}\n```"})
        self._client.set_terminated(result.run_id, "FINISHED")
