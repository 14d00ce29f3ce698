"""Where the servers are said to be; that they start is tested with real ones."""

import socket
from pathlib import Path

import pytest

from slmops.core.settings import Settings
from slmops.local import stack
from slmops.processes import daemon
from slmops.processes.daemon import Daemon
from slmops.tracking.registry import Registry
from tests import values

PREFECT, MLFLOW = "https://prefect.example", "https://mlflow.example"


def test_links_lead_to_where_people_reach_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_PREFECT_UI_URL", PREFECT)
    monkeypatch.setenv("SLMOPS_MLFLOW_UI_URL", MLFLOW)
    given = "http://127.0.0.1:1"  # nobody answers there
    settings = Settings(home=tmp_path, prefect_api_url=f"{given}/api", tracking_uri=given)
    status = stack.status(settings)
    assert (status.prefect.url, status.mlflow.url) == (PREFECT, MLFLOW)
    servers = stack._stack(settings, {})
    assert (servers.prefect_url, servers.mlflow_url, servers.tracking_uri) == (PREFECT, MLFLOW, given)
    assert stack.prefect_environment(settings, servers)["PREFECT_UI_URL"] == PREFECT
    assert Registry(given).page(values.model_version(3, name="router")) == f"{MLFLOW}/#/models/router/versions/3"


def test_a_port_that_is_taken_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemon, "spawn", lambda *_, port, **__: Daemon(pid=1, created=0, url=f"http://h:{port}"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        servers: dict[stack.Server, Daemon] = {}
        stack._start(Settings(home=tmp_path, mlflow_port=port), servers, "mlflow")
    [said] = caplog.messages
    now = servers["mlflow"].port
    assert said == f"port {port} is taken: MLflow server is at {now} (SLMOPS_MLFLOW_PORT sets another)"
