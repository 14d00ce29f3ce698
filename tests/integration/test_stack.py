"""The local servers: real ones, on free ports, in a home of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from slmops.core.errors import PrerequisiteError, WorkError
from slmops.core.settings import Settings
from slmops.local import stack
from slmops.local.stack import Stack
from slmops.processes import daemon
from tests import prefect_api, surroundings

pytestmark = pytest.mark.integration

FLOW = """
import logging
import sys
import time

from prefect import flow, task


@task
def fail():
    raise ValueError("this is meant to fail")


@flow
def tiny(seconds: float = 0, failing: bool = False) -> None:
    logging.getLogger("slmops").setLevel(logging.INFO)
    logging.getLogger("slmops.x").info("hello from slmops")
    time.sleep(seconds)
    if failing:
        fail()


if __name__ == "__main__":
    state = tiny(failing="fail" in sys.argv, return_state=True)
    raise SystemExit(0 if state.is_failed() == ("fail" in sys.argv) else 1)
"""

DEPLOYMENT = """
name: slmops
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: {folder}
deployments:
  - name: tiny
    entrypoint: tiny.py:tiny
    work_pool:
      name: slmops
"""

TRACK = """
import sys
from pathlib import Path

import mlflow

mlflow.set_tracking_uri(sys.argv[1])
Path("note.txt").write_text("kept")
with mlflow.start_run() as run:
    mlflow.log_metric("size_mb", 1.5)
    mlflow.log_artifact("note.txt")
mlflow.MlflowClient().create_registered_model("tiny")
print(run.info.run_id, run.info.artifact_uri)
"""


class Taken:
    """A listening socket: somebody else's server."""

    def __init__(self) -> None:
        self.socket = socket.create_server((daemon.HOST, 0))
        self.port: int = self.socket.getsockname()[1]

    def asked(self) -> list[bytes]:
        """What those said who connected; who looks for a free port, or for somebody else's server, says nothing."""
        self.socket.setblocking(False)
        said = []
        while True:
            try:
                visitor = self.socket.accept()[0]
            except BlockingIOError:
                return [request for request in said if request]
            with visitor, contextlib.suppress(OSError):
                visitor.settimeout(1)
                said.append(visitor.recv(200))


@pytest.fixture(scope="module")
def taken() -> Iterator[Taken]:
    other = Taken()
    with other.socket:
        yield other


@pytest.fixture(scope="module")
def proxy() -> Iterator[Taken]:
    """Whatever wants to leave this machine comes by here."""
    other = Taken()
    with other.socket:
        yield other


def clean_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    surroundings.clear(patch, folder)
    for name in ("CI", "DO_NOT_TRACK", "PYTEST_CURRENT_TEST"):
        patch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, taken: Taken) -> Settings:
    home = tmp_path_factory.mktemp("stack") / "home with a space"
    return Settings(home=home, prefect_port=taken.port, mlflow_port=taken.port)


@pytest.fixture(scope="module")
def servers(
    settings: Settings, proxy: Taken, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, Stack]]:
    """What two calls at once gave."""
    with pytest.MonkeyPatch.context() as patch:
        clean_environment(patch, tmp_path_factory.mktemp("elsewhere"))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, f"http://{daemon.HOST}:{proxy.port}")
        patch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////nowhere/somebody-elses.db")
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: stack.up(settings), range(2))
    yield first, second
    stack.down(settings)


@pytest.fixture
def running(servers: tuple[Stack, Stack], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stack:
    clean_environment(monkeypatch, tmp_path)
    return servers[0]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Settings]:
    """A home of its own in which nothing runs; MLflow is a file, so that only Prefect would be started."""
    clean_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("SLMOPS_TRACKING_URI", "sqlite:///nothing.db")
    settings = Settings(home=tmp_path / "home", prefect_port=free_port())
    yield settings
    stack.down(settings)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((daemon.HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def pids(settings: Settings) -> dict[str, int]:
    return {name: server.pid for name, server in stack._read(settings).items()}


def ours(settings: Settings) -> list[psutil.Process]:
    """All processes that carry the mark of this home."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(daemon.MARK, "").startswith(f"{settings.home}/"):
                found.append(process)
    return found


def test_two_calls_at_once_start_each_server_once(servers: tuple[Stack, Stack], settings: Settings) -> None:
    first, second = servers
    assert {*first.started, *second.started} == {"prefect", "mlflow"}
    assert len(first.started) + len(second.started) == 2
    assert first.model_copy(update={"started": ()}) == second.model_copy(update={"started": ()})
    assert set(pids(settings)) == {"prefect", "mlflow"}


def test_ports_give_way(running: Stack, taken: Taken) -> None:
    ports = [int(url.rpartition(":")[2]) for url in (running.prefect_url, running.tracking_uri)]
    assert len({taken.port, *ports}) == 3
    # The UI has to ask the API at the port that was taken in the end.
    assert httpx.get(f"{running.prefect_url}/ui-settings").json()["api_url"] == running.prefect_api_url


def test_a_second_up_is_fast_and_changes_nothing(running: Stack, settings: Settings) -> None:
    before, start = pids(settings), time.monotonic()
    assert stack.up(settings) == running.model_copy(update={"started": ()})
    assert time.monotonic() - start < 2
    assert pids(settings) == before
    assert stack.status(settings).model_dump(mode="json") == {
        "home": str(settings.home),
        "prefect": {"url": running.prefect_url, "ok": True},
        "mlflow": {"url": running.tracking_uri, "ok": True},
        "serving": None,
    }
    assert stack.tracking_uri(settings) == running.tracking_uri


def test_given_servers_are_used_and_left_alone(
    running: Stack, alone: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", running.prefect_api_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.tracking_uri)
    monkeypatch.delenv("SLMOPS_TRACKING_URI")
    settings = Settings(home=alone.home)
    assert stack.up(settings) == running.model_copy(update={"started": ()})
    assert stack.status(settings).prefect == stack.ServerStatus(url=running.prefect_url, ok=True)
    assert stack.status(settings).mlflow.ok
    assert stack.down(settings) == []
    assert httpx.get(f"{running.prefect_api_url}/health").is_success


def test_mlflow_keeps_runs_and_artifacts_below_home(running: Stack, settings: Settings, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRACK, running.tracking_uri],
        env={**os.environ, **stack.QUIET},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    run_id, artifact_uri = done.stdout.splitlines()[-1].split()
    assert artifact_uri.startswith("mlflow-artifacts:")
    [artifact] = (settings.home / "mlflow" / "artifacts").rglob("note.txt")
    assert run_id in artifact.parts
    assert artifact.read_text() == "kept"


@pytest.mark.parametrize("arguments", [[], ["fail"]])
def test_a_flow_is_silent_and_its_records_reach_the_server(
    running: Stack, settings: Settings, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "tiny.py").write_text(FLOW)
    done = subprocess.run(
        [sys.executable, "tiny.py", *arguments],
        env={**os.environ, **stack.prefect_environment(settings, running)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with prefect_api.client(running.prefect_api_url) as api:
        answer = api.post("logs/filter", json={"sort": "TIMESTAMP_DESC", "limit": 20})
    said = ["Traceback", "this is meant to fail"] if arguments else ["hello from slmops"]
    assert any(all(words in record["message"] for words in said) for record in answer.json())


def test_the_worker_runs_deployments_and_down_ends_its_flow_runs(
    running: Stack, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "ROOT", tmp_path)
    with pytest.raises(PrerequisiteError, match=r"deployments/prefect\.yaml is missing"):
        stack.up(settings, worker=True)
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments" / "prefect.yaml").write_text(DEPLOYMENT.format(folder=tmp_path))
    with pytest.raises(WorkError, match="could not register the deployments"):
        stack.up(settings, worker=True)  # there is no such flow
    assert "worker" not in pids(settings)

    (tmp_path / "tiny.py").write_text(FLOW)
    assert stack.up(settings, worker=True).started == ("worker",)
    worker = pids(settings)["worker"]
    assert stack.up(settings, worker=True).started == ()
    assert pids(settings)["worker"] == worker

    with prefect_api.client(running.prefect_api_url) as api:
        [deployment] = api.post("deployments/filter", json={}).json()
        ask = api.post(f"deployments/{deployment['id']}/create_flow_run", json={"parameters": {"seconds": 60}})
        run = f"flow_runs/{ask.json()['id']}"

        def messages() -> list[str]:
            return [record["message"] for record in api.post("logs/filter", json={"logs": {}}).json()]

        deadline = time.monotonic() + 60
        while api.get(run).json()["state_type"] != "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(3)  # longer than it takes Prefect to send log records
        assert "hello from slmops" in messages()
        assert daemon.stop(stack._read(settings)["worker"])
        assert api.get(run).json()["state_type"] == "CRASHED"
    assert not [process for process in ours(settings) if "prefect.engine" in " ".join(process.cmdline())]


def test_a_dead_server_is_started_again_and_its_orphans_are_removed(running: Stack, settings: Settings) -> None:
    before = pids(settings)
    orphans = psutil.Process(before["mlflow"]).children(recursive=True)
    os.kill(before["mlflow"], signal.SIGKILL)
    wait_for_death(before["mlflow"])
    assert any(process.is_running() for process in orphans)  # they still hold the port
    assert not stack.status(settings).mlflow.ok
    with pytest.raises(PrerequisiteError, match="No MLflow server"):
        stack.tracking_uri(settings)

    again = stack.up(settings)
    assert again.started == ("mlflow",)
    assert again.tracking_uri == running.tracking_uri
    assert not any(process.is_running() for process in orphans)
    assert pids(settings)["prefect"] == before["prefect"]


def wait_for_death(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_down_stops_everything_and_nothing_left_the_machine(running: Stack, settings: Settings, proxy: Taken) -> None:
    assert stack.down(settings) == ["prefect", "mlflow"]
    assert ours(settings) == []
    assert not (settings.home / "stack.json").exists()
    assert stack.down(settings) == []
    assert proxy.asked() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.prefect_url)


def test_a_port_lost_in_the_last_moment_is_given_up(
    alone: Settings, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=alone.home, prefect_port=taken.port)
    free, asked = daemon.free_port, []

    def lose_the_race(first: int, others: list[int]) -> int:
        asked.append(first)
        return taken.port if len(asked) == 1 else free(first, others)

    monkeypatch.setattr(daemon, "free_port", lose_the_race)
    running = stack.up(settings)
    assert asked == [taken.port, taken.port + 1]
    assert running.prefect_url != f"http://{daemon.HOST}:{taken.port}"
    assert [process.pid for process in ours(settings)] == [pids(settings)["prefect"]]


def test_a_start_that_fails_says_why_and_leaves_nothing(alone: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLMOPS_TRACKING_URI")
    settings = Settings(home=alone.home, prefect_port=alone.prefect_port, mlflow_port=free_port())
    (settings.home / "mlflow").mkdir(parents=True)
    (settings.home / "mlflow" / "mlflow.db").write_text("This is no database." * 100)
    with pytest.raises(PrerequisiteError, match=r"MLflow server did not start: .*not a database"):
        stack.up(settings)
    assert ours(settings) == []
    assert stack.down(settings) == []


def test_a_recycled_process_id_is_not_killed(alone: Settings) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        alone.home.mkdir()
        dead = {"pid": stranger.pid, "created": 1.0, "url": "http://127.0.0.1:1", "mark": "x"}
        (alone.home / "stack.json").write_text(json.dumps({"prefect": dead}))
        assert not stack.status(alone).prefect.ok
        assert stack.down(alone) == []
        assert stranger.poll() is None
        stranger.kill()


def test_a_given_server_that_is_down_is_named(alone: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://{daemon.HOST}:{free_port()}"
    monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
    settings = Settings(home=alone.home)
    with pytest.raises(PrerequisiteError, match=f"Prefect server at {url}/api does not answer") as caught:
        stack.up(settings)
    assert "PREFECT_API_URL" in str(caught.value.fix)
    assert stack.status(settings).prefect == stack.ServerStatus(url=url, ok=False)
    assert stack.status(settings).mlflow == stack.ServerStatus(url="sqlite:///nothing.db", ok=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.delenv("SLMOPS_TRACKING_URI")
    monkeypatch.delenv("PREFECT_API_URL")
    with pytest.raises(PrerequisiteError, match=f"MLflow server at {url} does not answer"):
        stack.up(Settings(home=alone.home))
