"""Retraining as it is operated: killed in each stage and taken up, on a schedule, with a server that is away."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import retraining, shown
from tests.e2e.test_faults import _gone, _kill_server

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return retraining.base(tmp_path_factory.mktemp("retraining") / "model")


def job_file(model: Path, name: str, **changes: Any) -> Path:
    """A retraining as a job file; JSON is YAML, too."""
    data = retraining.write_data(model.parent / "data")
    asked = retraining.request(model, data, name, **changes).model_dump(mode="json", exclude_none=True)
    path = model.parent / "retrain.yaml"
    path.write_text(json.dumps(asked))
    return path


def mlflow(slmops: Any) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(slmops.json("status")["mlflow"]["url"])


def runs(slmops: Any, name: str) -> list[Any]:
    client = mlflow(slmops)
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id], "tags.`slmops.kind` = 'retrain'"))


def test_killed_at_the_end_and_without_mlflow_for_a_while_it_goes_on(slmops: Any, model: Path) -> None:
    """What is killed before and while it measures: see test_faults.py; in the fine-tuning: see test_finetune.py."""
    file = job_file(model, "killed-retraining", serve=True)

    def killed(stage: str, started: Any) -> None:
        started.wait_for(stage)
        assert started.end(signal.SIGKILL) == -signal.SIGKILL
        if stage != "watching":  # the service is meant to
            assert _gone(slmops.home), f"children outlived a retraining killed while {stage!r}"

    started = slmops.start("retrain", "--job", str(file))
    started.wait_for("fine-tuning")
    _kill_server(slmops.home, "mlflow")
    started.wait_for("the loss curve is sent later")
    time.sleep(10)
    assert slmops("up").returncode == 0
    killed("files to fetch", started)  # in the promotion
    killed("watching", slmops.start("retrain", "--job", str(file)))
    done = slmops("retrain", "--job", str(file), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["outcome"] == "promoted"
    assert result["accuracy"]["fp32"]["value"] > 0.5 > result["accuracy"]["base"]["value"]
    [run] = runs(slmops, "killed-retraining")  # each attempt went on with the same one
    assert run.info.status == "FINISHED"
    history = mlflow(slmops).get_metric_history(run.info.run_id, "curves/validation_loss")
    steps = [metric.step for metric in history]
    assert len(steps) == len(set(steps)) >= retraining.TRAINING.epochs
    assert slmops("down").returncode == 0  # the service, too
    assert slmops.json("status")["serving"] is None


@pytest.fixture
def api(slmops: Any) -> Iterator[httpx.Client]:
    assert slmops("up", "--worker").returncode == 0
    with shown.api(f"{slmops.json('status')['prefect']['url']}/api") as client:
        yield client
    assert slmops("down").returncode == 0


def test_a_schedule_fires_by_itself_and_never_twice_at_once(slmops: Any, api: httpx.Client, model: Path) -> None:
    parameters = {"request": json.loads(job_file(model, "scheduled", watch_s=0).read_text())}
    [deployment] = [one for one in api.post("deployments/filter", json={}).json() if one["name"] == "retrain"]
    schedules = f"deployments/{deployment['id']}/schedules"
    assert api.patch(f"deployments/{deployment['id']}", json={"parameters": parameters}).status_code == 204
    every = {"interval": 15, "anchor_date": "2026-01-01T00:00:00Z"}
    [made] = api.post(schedules, json=[{"schedule": every, "active": True}]).json()

    def scheduled() -> dict[str, list[Any]]:
        of_it = {"deployments": {"id": {"any_": [deployment["id"]]}}, "limit": 200}
        found: dict[str, list[Any]] = {}
        for run in api.post("flow_runs/filter", json=of_it).json():
            assert run["auto_scheduled"]
            found.setdefault(run["state_name"], []).append(run)
        return found

    deadline = time.monotonic() + 300
    while len((found := scheduled()).get("Completed", [])) < 2:
        assert len(found.get("Running", [])) <= 1
        assert time.monotonic() < deadline, {name: len(of_it) for name, of_it in found.items()}
        time.sleep(1)
    assert api.delete(f"{schedules}/{made['id']}").status_code == 204
    # While the first one worked the schedule went on firing: those runs waited.
    waiting = {"Scheduled", "AwaitingConcurrencySlot", "Late", "Pending", "Submitting"}
    assert scheduled().keys() <= {"Completed", "Running", *waiting}
    [run] = runs(slmops, "scheduled")  # the second had nothing to do
    assert run.data.tags["slmops.outcome"] == "promoted"
    assert slmops.json("status", "scheduled")["versions"][0]["aliases"][0] == "champion"
