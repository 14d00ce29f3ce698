"""The local servers: real ones, on free ports, in a home of their own."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from slmops.core.errors import PrerequisiteError, WorkError
from slmops.core.settings import Settings
from slmops.local import stack
from slmops.local.stack import ServerStatus, Stack
from slmops.processes import daemon
from tests import making, shown, surroundings

pytestmark = pytest.mark.integration

FLOW = """
import logging, time
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
    failed = [tiny(failing=failing, return_state=True).is_failed() for failing in (False, True)]
    raise SystemExit(failed != [False, True])
"""
DEPLOYMENT = """
name: slmops
pull: [prefect.deployments.steps.set_working_directory: {{directory: "{folder}"}}]
deployments: [{{name: tiny, entrypoint: "tiny.py:tiny", work_pool: {{name: slmops}}}}]
"""


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    with socket.create_server((daemon.HOST, 0)) as other:
        yield other.getsockname()[1]


@pytest.fixture(scope="module")
def proxy() -> Iterator[socket.socket]:
    """Whatever wants to leave this machine comes by here."""
    with socket.create_server((daemon.HOST, 0)) as other:
        yield other


def clean_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    surroundings.clear(patch, folder)
    for name in ("CI", "DO_NOT_TRACK", "PYTEST_CURRENT_TEST"):
        patch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, taken: int) -> Settings:
    home = tmp_path_factory.mktemp("stack") / "home with a space"
    return Settings(home=home, prefect_port=taken, mlflow_port=taken)


@pytest.fixture(scope="module")
def servers(
    settings: Settings, proxy: socket.socket, taken: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Stack]]:
    """What two calls at once gave, of which the first loses its port at the last moment."""
    free, tried = daemon.free_port, []

    def lose_the_race(first: int, others: list[int]) -> int:
        tried.append(first)
        return taken if len(tried) == 1 else free(first, others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemon, "free_port", lose_the_race)
        clean_environment(patch, tmp_path_factory.mktemp("elsewhere"))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, f"http://{daemon.HOST}:{proxy.getsockname()[1]}")
        patch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////nowhere/somebody-elses.db")
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: stack.up(settings), range(2)))
    assert tried == [taken, taken, taken + 1]
    yield both
    stack.down(settings)


@pytest.fixture
def running(servers: list[Stack], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stack:
    clean_environment(monkeypatch, tmp_path)
    return servers[0].model_copy(update={"started": ()})


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Settings]:
    """A home of its own in which nothing runs; MLflow is a file, so that only Prefect would be started."""
    clean_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("SLMOPS_TRACKING_URI", "sqlite:///nothing.db")
    settings = Settings(home=tmp_path / "home", prefect_port=daemon.free_port(24200, ()), mlflow_port=25000)
    yield settings
    stack.down(settings)


def pids(settings: Settings) -> dict[str, int]:
    return {name: server.pid for name, server in stack._read(settings).items()}


def ours(settings: Settings) -> list[psutil.Process]:
    """All processes that carry the mark of this home."""
    everybody = psutil.process_iter(["environ"])
    return [
        one for one in everybody if (one.info["environ"] or {}).get(daemon.MARK, "").startswith(f"{settings.home}/")
    ]


def test_two_calls_at_once_start_each_server_once(servers: list[Stack], settings: Settings, taken: int) -> None:
    first, second = servers
    assert sorted(first.started + second.started) == ["mlflow", "prefect"]
    assert first.model_copy(update={"started": ()}) == second.model_copy(update={"started": ()})
    assert set(pids(settings)) == {"prefect", "mlflow"}
    assert len({taken, httpx.URL(first.prefect_url).port, httpx.URL(first.tracking_uri).port}) == 3
    assert [one.pid for one in ours(settings) if "prefect" in one.cmdline()] == [pids(settings)["prefect"]]
    # The UI has to ask the API at the port that was taken in the end.
    assert httpx.get(f"{first.prefect_url}/ui-settings").json()["api_url"] == first.prefect_api_url


def test_a_second_up_changes_nothing(running: Stack, settings: Settings) -> None:
    before = pids(settings)
    assert stack.up(settings) == running
    assert pids(settings) == before
    assert stack.status(settings).model_dump(mode="json") == {
        "home": str(settings.home),
        "prefect": {"url": running.prefect_url, "ok": True},
        "mlflow": {"url": running.tracking_uri, "ok": True},
        "serving": None,
    }
    assert stack.tracking_uri(settings) == running.tracking_uri


def test_given_servers_are_used_and_left_alone(running: Stack, alone: Settings) -> None:
    given = {"prefect_api_url": running.prefect_api_url, "tracking_uri": running.tracking_uri}
    settings = alone.model_copy(update=given)
    assert stack.up(settings) == running
    assert stack.status(settings).prefect == ServerStatus(url=running.prefect_url, ok=True)
    assert stack.status(settings).mlflow.ok
    assert stack.down(settings) == []
    assert httpx.get(f"{running.prefect_api_url}/health").is_success


def test_mlflow_keeps_runs_and_artifacts_below_home(running: Stack, settings: Settings) -> None:
    with httpx.Client(base_url=f"{running.tracking_uri}/api/2.0", timeout=30) as api:
        run = api.post("mlflow/runs/create", json={"experiment_id": "0"}).raise_for_status().json()["run"]["info"]
        assert run["artifact_uri"] == f"mlflow-artifacts:/0/{run['run_id']}/artifacts"
        path = f"0/{run['run_id']}/artifacts/note.txt"
        api.put(f"mlflow-artifacts/artifacts/{path}", content=b"kept").raise_for_status()
        assert (settings.home / "mlflow" / "artifacts" / path).read_text() == "kept"
        model = api.post("mlflow/registered-models/create", json={"name": "tiny"})
    assert model.raise_for_status().json()["registered_model"]["name"] == "tiny"
    assert (settings.home / "mlflow" / "mlflow.db").is_file()


def test_flows_are_silent_and_their_records_reach_the_server(
    running: Stack, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "tiny.py").write_text(FLOW)
    done = subprocess.run(
        [sys.executable, "tiny.py"],
        env={**os.environ, **stack.prefect_environment(settings, running)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with shown.api(running.prefect_api_url) as api:
        said = [record["message"] for record in api.post("logs/filter", json={"limit": 50}).json()]
    assert said.count("hello from slmops") == 2
    assert any("Traceback" in message and "this is meant to fail" in message for message in said)


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

    with shown.api(running.prefect_api_url) as api:
        [deployment] = api.post("deployments/filter", json={}).json()
        ask = api.post(f"deployments/{deployment['id']}/create_flow_run", json={"parameters": {"seconds": 60}})
        run = f"flow_runs/{ask.json()['id']}"
        of_run = {"logs": {"flow_run_id": {"any_": [ask.json()["id"]]}}}
        said = partial(api.post, "logs/filter", json=of_run)
        making.until(lambda: "hello from slmops" in [one["message"] for one in said().json()], "it says hello")
        assert daemon.stop(stack._read(settings)["worker"])
        assert api.get(run).json()["state_type"] == "CRASHED"
    assert not [process for process in ours(settings) if "prefect.engine" in " ".join(process.cmdline())]


def test_a_dead_server_is_started_again_and_its_orphans_are_removed(running: Stack, settings: Settings) -> None:
    before = pids(settings)
    server = psutil.Process(before["mlflow"])
    orphans = server.children(recursive=True)
    server.kill()
    server.wait(10)
    assert any(process.is_running() for process in orphans)  # they still hold the port
    assert not stack.status(settings).mlflow.ok
    with pytest.raises(PrerequisiteError, match="No MLflow server"):
        stack.tracking_uri(settings)

    assert stack.up(settings) == running.model_copy(update={"started": ("mlflow",)})
    assert not any(process.is_running() for process in orphans)
    assert pids(settings)["prefect"] == before["prefect"]


def test_the_prefect_page_asks_nobody_else(running: Stack) -> None:
    scripts = re.findall(r'src="(/[^"]+\.js)"', httpx.get(running.prefect_url).text)
    assert scripts
    assert "amplitude.com" not in "".join(httpx.get(f"{running.prefect_url}{script}").text for script in scripts)


def test_down_stops_everything_and_nothing_left_the_machine(
    running: Stack, settings: Settings, proxy: socket.socket
) -> None:
    assert stack.down(settings) == ["prefect", "mlflow"]
    assert ours(settings) == []
    assert not (settings.home / "stack.json").exists()
    assert stack.down(settings) == []
    proxy.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            with proxy.accept()[0] as visitor, contextlib.suppress(TimeoutError, ConnectionError):
                visitor.settimeout(1)
                assert visitor.recv(200) == b""  # who looks for a free port, or for somebody's server, says nothing
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.prefect_url)


def test_a_start_that_fails_says_why_and_leaves_nothing(alone: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = alone.model_copy(update={"tracking_uri": None})
    health = alone.home / "api" / "health"
    health.parent.mkdir(parents=True)
    health.write_text("true")
    # It is stopped, and does as well as Prefect, which takes seconds to start.
    pages = ["http.server", "--bind", daemon.HOST, "--directory", str(alone.home)]
    monkeypatch.setattr(stack, "_prefect_command", lambda _, __, port: ([*pages, str(port)], {**os.environ}))
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


def test_a_given_server_that_is_down_is_named(alone: Settings) -> None:
    url = f"http://{daemon.HOST}:{alone.prefect_port}"
    settings = alone.model_copy(update={"prefect_api_url": f"{url}/api"})
    with pytest.raises(PrerequisiteError, match=f"Prefect server at {url}/api does not answer(?s:.*)PREFECT_API_URL"):
        stack.up(settings)
    assert stack.status(settings).prefect == ServerStatus(url=url, ok=False)
    assert stack.status(settings).mlflow == ServerStatus(url="sqlite:///nothing.db", ok=True)
    with pytest.raises(PrerequisiteError, match=f"MLflow server at {url} does not answer"):
        stack.up(alone.model_copy(update={"tracking_uri": url}))
