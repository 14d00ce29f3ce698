"""The servers of docker-compose.yml, started by the file's own commands as processes (see tests/compose.py)."""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.server.security_utils import is_allowed_host_header

from tests import making
from tests.compose import ROOT, Compose

pytestmark = pytest.mark.integration

PASSWORD = "p@ss:/w#rd %41'$x"
"""With all that breaks a URL, a shell or a variable."""
DEFINED = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


@pytest.fixture(scope="module")
def servers() -> Iterator[Compose]:
    """PostgreSQL, Prefect and MLflow, healthy. A test that stops one starts it again."""
    with Compose({"POSTGRES_PASSWORD": PASSWORD}) as compose:
        compose.up("prefect", "mlflow")
        yield compose


@pytest.fixture(scope="module")
def registered(servers: Compose) -> Compose:
    """With work pool and deployments."""
    assert servers.run("deployments") == 0, servers.said("deployments")
    return servers


@pytest.fixture(scope="module")
def working(registered: Compose) -> Iterator[Compose]:
    """With a worker, which looks for work more often than the file says."""
    registered.start("worker", PREFECT_WORKER_QUERY_SECONDS="1")
    registered.wait_healthy("worker")
    yield registered
    registered.stop("worker")


@pytest.fixture(scope="module")
def run_id(servers: Compose, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with a metric and a file, logged through the server."""
    note = tmp_path_factory.mktemp("note") / "note.txt"
    note.write_text("kept", encoding="utf-8")
    client = MlflowClient(servers.tracking_uri)
    run = client.create_run("0")
    client.log_metric(run.info.run_id, "size_mb", 1.5)
    client.log_artifact(run.info.run_id, str(note), "notes")
    return str(run.info.run_id)


def kept(compose: Compose, run_id: str, folder: Path) -> None:
    client = MlflowClient(compose.tracking_uri)
    assert client.get_run(run_id).data.metrics == {"size_mb": 1.5}
    note = Path(client.download_artifacts(run_id, "notes/note.txt", str(folder)))
    assert note.read_text(encoding="utf-8") == "kept"


def test_files_go_through_the_server(servers: Compose, run_id: str, tmp_path: Path) -> None:
    kept(servers, run_id, tmp_path)
    run = MlflowClient(servers.tracking_uri).get_run(run_id)
    assert run.info.artifact_uri == f"mlflow-artifacts:/0/{run_id}/artifacts"
    stored = servers.folder("mlflow", "/srv/artifacts") / "0" / run_id / "artifacts" / "notes" / "note.txt"
    assert stored.read_text(encoding="utf-8") == "kept"


def test_each_server_knows_its_names(servers: Compose) -> None:
    # As in the file: here "mlflow:5000" is another address.
    allowed = servers.services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    called = {"mlflow:5000": True, "127.0.0.1:5000": True, "localhost:5001": True, "evil.example": False}
    assert {host: is_allowed_host_header(allowed, host) for host in called} == called
    url = f"{servers.tracking_uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert httpx.get(url, headers={"Host": "evil.example"}, trust_env=False).status_code == 403
    page = servers.prefect_api_url.removesuffix("/api")
    assert httpx.get(f"{page}/ui-settings", trust_env=False).json()["api_url"] == servers.prefect_api_url
    assert "<html" in httpx.get(page, follow_redirects=True, trust_env=False).text


def test_the_worker_runs_what_is_started_on_the_page(working: Compose) -> None:
    deployment = working.ask("/deployments/name/prepare-environment/prepare-environment")
    run = working.ask(f"/deployments/{deployment['id']}/create_flow_run", {})
    now = partial(working.ask, f"/flow_runs/{run['id']}")
    making.until(lambda: now()["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), "it ends", 240)
    assert now()["state_type"] == "COMPLETED", working.said("worker")
    [shown] = working.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    assert shown["key"] == "environment"
    # This environment is whole: every package was imported.
    checks = {one["check"]: one for one in json.loads(shown["data"])}
    assert {name for name, one in checks.items() if one["status"] != "ok"} <= {"memory", "disk", "CPU"}
    assert checks.keys() >= {"Python", "memory", "disk", "CPU", "torch", "olive-ai", "Prefect server", "MLflow server"}
    assert "CPUExecutionProvider" in checks["ONNX Runtime"]["found"]
    assert checks["Foundry Local"]["found"].startswith(checks["foundry-local-sdk"]["found"])


def test_passwords_show_nowhere(working: Compose) -> None:
    services = ("postgres", "prefect", "mlflow", "worker")
    seen = [process for service in services for process in working.processes(service)]
    assert len(seen) > 15
    for process in seen:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert PASSWORD not in " ".join(process.cmdline())
    assert not any("PGPASSWORD" in process.environ() for process in working.processes("worker"))
    logs = sorted(working.root.glob("*.log"))
    assert {"prefect.log", "mlflow.log", "databases.log", "worker.log"} <= {log.name for log in logs}
    assert not [log.name for log in logs if PASSWORD in log.read_text(encoding="utf-8", errors="replace")]


def test_after_a_crash_of_postgresql_both_servers_answer(registered: Compose, run_id: str, tmp_path: Path) -> None:
    before = [registered.processes(service) for service in ("prefect", "mlflow")]
    registered.kill("postgres")
    assert [registered.healthy(service) for service in ("prefect", "mlflow")] == [False, False]
    registered.start("postgres")
    for service in ("postgres", "prefect", "mlflow"):
        registered.wait_healthy(service)
    assert [registered.processes(service) for service in ("prefect", "mlflow")] == before
    kept(registered, run_id, tmp_path)
    assert len(registered.ask("/deployments/filter", {})) == len(DEFINED)


def test_setting_up_once_more_changes_nothing(registered: Compose) -> None:
    assert registered.run("databases") == 0
    assert registered.log("databases").read_text(encoding="utf-8").count("made the database") == 2
    assert registered.log("deployments").read_text(encoding="utf-8").count("successfully created") == len(DEFINED)


def test_a_wrong_password_is_told(servers: Compose) -> None:
    with Compose({"POSTGRES_PASSWORD": "wrong"}) as mistaken:
        mistaken.ports["postgres"] = servers.ports["postgres"]
        assert mistaken.run("databases") == 1
        said = mistaken.said("databases")
        assert "password authentication failed" in said
        assert "changed in .env" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Set SLMOPS_SERVE_MODEL and SLMOPS_SERVE_TOKEN in .env."),
        ({"SLMOPS_SERVE_MODEL": "router"}, "Set SLMOPS_SERVE_TOKEN in .env."),
        ({"SLMOPS_SERVE_MODEL": "router", "SLMOPS_SERVE_TOKEN": "secret"}, ""),
    ],
)
def test_nothing_is_served_without_a_model_and_a_token(given: dict[str, str], said: str) -> None:
    with Compose({"POSTGRES_PASSWORD": "unused", **given}) as compose:
        assert compose.run("serve-settings") == bool(said)
        assert compose.said("serve-settings") == said
