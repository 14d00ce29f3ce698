"""Jobs and variants for the tests of MLflow."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from slmops.core.job import Job
from slmops.core.values import Measurement, Registration, Variant
from slmops.tracking.tracker import Tracker
from tests import values

HARDWARE = values.variant(Path("/nowhere")).hardware
JOB = Job(model="org/tiny", precision=["int4"], temperature=0.7)


class Made:
    """A variant, registered and measured, as files and values."""

    def __init__(self, folder: Path, name: str = "int4", **metrics: float) -> None:
        self.variant: Variant = values.write_variant(folder / "variants" / name, name)
        deployed = folder / "foundry" / name
        deployed.mkdir(parents=True)
        (deployed / "genai_config.json").write_text('{"search": {"temperature": 0.7}}')
        (deployed / "inference_model.json").write_text('{"Name": "n:1"}')
        self.registration = Registration(
            foundry_id=f"tiny-{name}-generic-cpu:1", path=deployed, prompt_template_exact=True, answer="Paris."
        )
        self.evaluation = values.evaluation({k: Measurement(value=v, unit="x") for k, v in metrics.items()})
        self.logs = folder / "logs"
        self.logs.mkdir(exist_ok=True)
        for part in ("olive", "evaluate"):
            (self.logs / f"{name}.{part}.log").write_text(f"{part} of {name}")
        (self.logs / "fp32.olive.log").write_text("of another variant")

    def log(self, tracker: Tracker, parent: str, name: str) -> str:
        return tracker.log_variant(parent, name, self.variant, self.registration, self.evaluation, self.logs)


def start(tracker: Tracker, name: str) -> str:
    return tracker.start_job(name, JOB, values.checkpoint(), HARDWARE, "flow-run-1")


def children(client: MlflowClient, parent: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    experiment = client.get_run(parent).info.experiment_id
    found: list[Run] = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", view)
    return found


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> set[str]:
    found: set[str] = set()
    for entry in client.list_artifacts(run_id, folder):
        found |= artifacts(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def read(client: MlflowClient, run_id: str, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, path, str(folder))).read_text(encoding="utf-8")
