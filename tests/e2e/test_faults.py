"""What users and machines do to a running job, on a tiny model, with everything else real."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny

pytestmark = pytest.mark.e2e

ENDS = (
    (signal.SIGKILL, "this run in Prefect"),  # preparing
    (signal.SIGKILL, "Olive runs"),  # converting
    (signal.SIGKILL, "converted in"),  # registering
    (signal.SIGTERM, "measuring speed"),
    (signal.SIGKILL, "measuring quality"),
    (signal.SIGINT, "measuring quality"),
)
"""How a job is ended, and at which line of its log."""


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


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that is converted by the first test, and found converted by the others."""
    return tiny.make("llama-tied", tmp_path_factory.mktemp("faults") / "tiny-model", seed=31)


def _arguments(model: Path, name: str) -> tuple[str, ...]:
    return ("run", "--model", str(model), "--name", name, "--precision", "fp32", "--quick")


def test_killed_or_interrupted_in_each_stage_the_next_run_cleans_up_and_succeeds(slmops: Any, tiny_model: Path) -> None:
    from mlflow import MlflowClient

    arguments = _arguments(tiny_model, "killed")
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
    done = slmops(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    [variant] = json.loads(done.stdout)["variants"]
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


def test_two_runs_of_one_model_at_once(slmops: Any, tiny_model: Path) -> None:
    arguments = _arguments(tiny_model, "twice")
    first = slmops.start(*arguments)
    first.wait_for("measuring speed")
    first.process.send_signal(signal.SIGSTOP)  # it must not be done before the second has looked
    second = slmops.start(*arguments)
    second.wait_for("waiting for the job of 'twice'")
    first.process.send_signal(signal.SIGCONT)
    assert (first.end(), second.end()) == (0, 0)
    assert any(f"process {first.process.pid}" in line for line in second.lines)


def test_prefect_dies_in_the_middle(slmops: Any, tiny_model: Path) -> None:
    """MLflow is waited for instead: see test_retrain.py."""
    arguments = _arguments(tiny_model, "without-prefect")
    assert slmops("up").returncode == 0
    job = slmops.start(*arguments)
    job.wait_for("measuring speed")
    _kill_server(slmops.home, "prefect")
    assert job.end() == 1
    said = "\n".join(job.lines)
    assert "prefect at http://127.0.0.1" in said.lower()
    assert "slmops up" in said
    assert "Traceback" not in said
    assert slmops(*arguments).returncode == 0  # starts the server again


def _kill_server(home: Path, name: str) -> None:
    leader = psutil.Process(json.loads((home / "stack.json").read_text())[name]["pid"])
    for process in [*leader.children(recursive=True), leader]:
        os.kill(process.pid, signal.SIGKILL)
