"""What users and machines do to a running job and to a retraining, on a tiny model, with everything else real."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import making, retraining, shown, tiny

pytestmark = pytest.mark.e2e

ENDS = (
    (signal.SIGINT, "this run in Prefect"),  # preparing
    (signal.SIGKILL, "Olive runs"),  # converting
    (signal.SIGKILL, "converted in"),  # registering
    (signal.SIGTERM, "measuring speed"),
    (signal.SIGKILL, "measuring quality"),
)
"""How a job is ended, and at which line of its log."""
RUN_S = 600
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def _gone(home: Path, after: str) -> None:
    """The children that work in this home are."""

    def gone() -> bool:
        return not any(part.startswith("slmops.") for one in making.at_work(home) for part in one.info["cmdline"])

    making.until(gone, f"children outlived what was ended while {after!r}", 30)


def test_after_each_end_the_next_run_cleans_up_and_one_from_the_page_succeeds(slmops: Any, tmp_path: Path) -> None:
    model = tiny.make("llama-tied", tmp_path / "tiny-model", seed=31)
    arguments = ("run", "--model", str(model), "--name", "killed", "--precision", "fp32", "--quick")
    for sig, stage in ENDS:
        job = slmops.start(*arguments)
        job.wait_for(stage)
        status = job.end(sig)
        _gone(slmops.home, stage)
        if sig == signal.SIGKILL:
            assert status == -sig
        else:
            assert status == 130, job.lines
            assert job.lines[-1] == "interrupted"
            assert not any("Traceback" in line for line in job.lines)

    job = slmops.start(*arguments, "--remeasure")
    job.wait_for("measuring speed")
    _kill_server(slmops.home, "prefect")  # MLflow is waited for instead: see the retraining below
    assert job.end() == 1
    said = "\n".join(job.lines)
    assert "prefect at http://127.0.0.1" in said.lower()
    assert "slmops up" in said
    assert "Traceback" not in said

    assert slmops("up", "--worker").returncode == 0  # starts the server again
    _run_from_the_page(slmops, {"model": str(model), "name": "killed", "precision": ["fp32"], "quick": True})
    [variant] = slmops.json("compare", "killed")["variants"]
    assert variant["status"] == "ok"
    assert variant["foundry_id"] == "killed-fp32-generic-cpu:1"
    assert not (slmops.home / "work" / "killed").exists()
    assert not list(slmops.home.glob("*/.*.part"))
    placed = [folder.name for folder in (slmops.home / "foundry" / "models" / "slmops").glob("killed-fp32-*")]
    assert placed == ["killed-fp32-generic-cpu-1"]

    ends = [run.info.status for run in runs(slmops, "killed", "job")]
    assert ends.count("FINISHED") == 1
    assert "KILLED" in ends, "a killed job is closed in MLflow by the next"
    assert "RUNNING" not in ends


def _run_from_the_page(slmops: Any, job: dict[str, Any]) -> None:
    """What the Run button posts."""
    with shown.api(slmops.json("status")["prefect"]["url"] + "/api") as api:
        of_it = {"deployments": {"name": {"any_": ["optimize"]}}}
        [deployment] = api.post("deployments/filter", json=of_it).json()
        run = api.post(f"deployments/{deployment['id']}/create_flow_run", json={"parameters": {"job": job}}).json()

        def ended() -> Any:
            state = api.get(f"flow_runs/{run['id']}").json()["state"]
            return state if state["type"] in ENDED else None

        state = making.until(ended, "the run ends", RUN_S)
    assert state["name"] == "Completed", state["message"]


def _kill_server(home: Path, name: str) -> None:
    leader = psutil.Process(json.loads((home / "stack.json").read_text())[name]["pid"])
    for process in [*leader.children(recursive=True), leader]:
        os.kill(process.pid, signal.SIGKILL)


# --- retraining as it is operated: killed and taken up, on a schedule, with a server that is away


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


def runs(slmops: Any, name: str, kind: str = "retrain") -> list[Any]:
    client = mlflow(slmops)
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id], f"tags.`slmops.kind` = '{kind}'"))


def test_killed_at_the_end_and_without_mlflow_for_a_while_it_goes_on(slmops: Any, model: Path) -> None:
    """What is killed before and while it measures: see above; in the fine-tuning: see test_finetune.py."""
    file = job_file(model, "killed-retraining", serve=True)

    def killed(stage: str, started: Any) -> None:
        started.wait_for(stage)
        assert started.end(signal.SIGKILL) == -signal.SIGKILL
        if stage != "watching":  # the service is meant to
            _gone(slmops.home, stage)

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
