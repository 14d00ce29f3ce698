"""The last run of a model."""

from datetime import UTC, datetime

from slmops.tracking.client import KIND, PARENT, Connection

from slmops.core.values import Frozen
from slmops.tracking.tracker import CHOICE
from slmops.tracking.training import OUTCOME

LATEST = 100  # runs to look at: a job's own are above those of its variants
OF_MODELS = ("job", "retrain", "remeasurement")


class LastRun(Frozen, use_attribute_docstrings=True):
    """How the newest job, retraining or remeasurement of a model ended, and what was chosen."""

    kind: str
    started: datetime
    state: str
    """Its outcome, such as promoted, refused or drifted; else MLflow's status, such as running, finished or killed."""
    chosen: str | None
    """The precision that the newest finished comparison chose; none: no one passed the gates."""
    url: str


class LastRuns(Connection):
    def of(self, name: str) -> LastRun | None:
        """The newest one of a model; None: there is none."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return None
        runs = self._client.search_runs([experiment.experiment_id], max_results=LATEST)
        last = next((run for run in runs if run.data.tags.get(KIND) in OF_MODELS and PARENT not in run.data.tags), None)
        if last is None:
            return None
        return LastRun(
            kind=last.data.tags[KIND],
            started=datetime.fromtimestamp(last.info.start_time / 1000, UTC),
            state=last.data.tags.get(OUTCOME) or last.info.status.lower(),
            chosen=next((choice for run in runs if (choice := run.data.tags.get(CHOICE))), None),
            url=self._page(last.info.run_id, f"runs/{last.info.run_id}?"),
        )
