"""Jobs and variants for the tests of MLflow."""

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run, Trace

from slmops.core.job import Job
from slmops.core.values import Comparison, Measurement, Registration, Variant, VariantResult
from slmops.foundry.versions import ModelVersion
from slmops.selection.policy import Policy
from slmops.tracking.registry import Registry
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
        self.registration = Registration(foundry_id=f"tiny-{name}-generic-cpu:1", path=deployed, answer="Paris.")
        self.evaluation = values.evaluation({k: Measurement(value=v, unit="x") for k, v in metrics.items()})
        self.logs = folder / "logs"
        self.logs.mkdir(exist_ok=True)
        for part in ("olive", "evaluate"):
            (self.logs / f"{name}.{part}.log").write_text(f"{part} of {name}")
        (self.logs / "fp32.olive.log").write_text("of another variant")

    def log(self, tracker: Tracker, parent: str, name: str) -> VariantResult:
        return tracker.log_variant(parent, name, self.variant, self.registration, self.evaluation, self.logs)


class Book:
    """One model in an MLflow database: its jobs, and looks at what they left there."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        self.tracker, self.registry, self.client = Tracker(uri), Registry(uri), MlflowClient(uri)
        self.name, self.folder = name, folder

    def start(self, **changes: Any) -> str:
        """Open a job; returns its run."""
        job = JOB.model_copy(update=changes)
        return self.tracker.start_job(self.name, job, values.checkpoint(), HARDWARE, "flow-run-1")

    def log(self, made: Made | None = None, parent: str | None = None) -> str:
        """Log a variant, of a job of its own by default; returns its run."""
        return str((made or Made(self.folder)).log(self.tracker, parent or self.start(), self.name).run_id)

    def add(self, made: Made, parent: str | None = None, *, promote: bool = False) -> ModelVersion:
        """Log a variant and make it a version."""
        parent = parent or self.start()
        result = made.log(self.tracker, parent, self.name)
        version = self.registry.add(self.name, made.variant, made.registration, result, parent)
        if promote:
            version = self.registry.upload(version, made.registration.path)
            self.registry.promote(version, self.registry.champion(self.name), {})
        return version

    def finish(self, parent: str, *results: VariantResult, chosen: str | None = None, **other: Any) -> Comparison:
        done = values.comparison(*results, chosen=chosen).model_copy(update={"model": self.name, "run_id": parent})
        self.tracker.finish_job(done, **{"policy": Policy(), "report": "", "note": "", "failed": False, **other})
        return done

    def run(self, run_id: str) -> Run:
        return self.client.get_run(run_id)

    def status(self, *runs: str) -> list[str]:
        return [self.run(run).info.status for run in runs]

    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.run(run_id).data.tags)

    def experiment(self) -> str:
        return str(self.client.get_experiment_by_name(self.name).experiment_id)

    def children(self, parent: str) -> list[str]:
        found = self.client.search_runs([self.experiment()], f"tags.`mlflow.parentRunId` = '{parent}'")
        return [run.info.run_id for run in found]

    def download(self, run_id: str, path: str) -> Path:
        return Path(self.client.download_artifacts(run_id, path, str(self.folder)))

    @property
    def stored(self) -> Path:
        """Where MLflow has the files of version 1."""
        return Path(self.client.get_model_version_download_uri(self.name, "1").removeprefix("file://"))

    def models(self) -> list[Any]:
        return list(self.client.search_logged_models([self.experiment()]))

    def traces(self, run_id: str | None = None) -> list[Trace]:
        """Those of a run, as MLflow lists them; None: all."""
        order: dict[str, Any] = {"order_by": ["timestamp_ms DESC"], "max_results": 500}
        return list(self.client.search_traces(locations=[self.experiment()], run_id=run_id, **order))

    def artifacts(self, run_id: str) -> set[str]:
        return artifacts(self.client, run_id)

    def json(self, run_id: str, path: str) -> Any:
        return json.loads(read(self.client, run_id, path, self.folder))

    def table(self, run_id: str, path: str) -> list[dict[str, Any]]:
        table = self.json(run_id, path)
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> set[str]:
    found: set[str] = set()
    for entry in client.list_artifacts(run_id, folder):
        found |= artifacts(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def read(client: MlflowClient, run_id: str, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, path, str(folder))).read_text(encoding="utf-8")
