"""What users and machines do to a running job, on a tiny model, with everything else real."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import shown, tiny

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


def _workers(home: Path) -> list[psutil.Process]:
    """Child processes that work in this home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(part.startswith("slmops.") for part in command) and any(str(home) in part for part in command):
            found.append(process)
    return found


def _gone(home: Path) -> bool:
    deadline = time.monotonic() + 30
    while _workers(home):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_after_each_end_the_next_run_cleans_up_and_one_from_the_page_succeeds(slmops: Any, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    model = tiny.make("llama-tied", tmp_path / "tiny-model", seed=31)
    arguments = ("run", "--model", str(model), "--name", "killed", "--precision", "fp32", "--quick")
    for sig, stage in ENDS:
        job = slmops.start(*arguments)
        job.wait_for(stage)
        status = job.end(sig)
        assert _gone(slmops.home), f"children outlived a job ended by {sig.name} while {stage!r}"
        if sig == signal.SIGKILL:
            assert status == -sig
        else:
            assert status == 130, job.lines
            assert job.lines[-1] == "interrupted"
            assert not any("Traceback" in line for line in job.lines)

    job = slmops.start(*arguments)
    job.wait_for("measuring speed")
    _kill_server(slmops.home, "prefect")  # MLflow is waited for instead: see test_retrain.py
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

    client = MlflowClient(slmops.json("status")["mlflow"]["url"])
    experiment = client.get_experiment_by_name("killed")
    runs = client.search_runs([experiment.experiment_id], "tags.`slmops.kind` = 'job'")
    ends = [run.info.status for run in runs]
    assert ends.count("FINISHED") == 1
    assert "KILLED" in ends, "a killed job is closed in MLflow by the next"
    assert "RUNNING" not in ends


def _run_from_the_page(slmops: Any, job: dict[str, Any]) -> None:
    """What the Run button posts."""
    with shown.api(slmops.json("status")["prefect"]["url"] + "/api") as api:
        of_it = {"deployments": {"name": {"any_": ["optimize"]}}}
        [deployment] = api.post("deployments/filter", json=of_it).json()
        run = api.post(f"deployments/{deployment['id']}/create_flow_run", json={"parameters": {"job": job}}).json()
        deadline = time.monotonic() + RUN_S
        while (state := api.get(f"flow_runs/{run['id']}").json()["state"])["type"] not in ENDED:
            assert time.monotonic() < deadline, state
            time.sleep(1)
    assert state["name"] == "Completed", state["message"]


def _kill_server(home: Path, name: str) -> None:
    leader = psutil.Process(json.loads((home / "stack.json").read_text())[name]["pid"])
    for process in [*leader.children(recursive=True), leader]:
        os.kill(process.pid, signal.SIGKILL)
