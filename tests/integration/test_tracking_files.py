"""Reading one artifact file: what servers of all kinds answer, and what MLflow's client makes of it."""

import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.core.errors import TrackingError
from slmops.tracking import download
from slmops.tracking.download import BLOCK_BYTES, NotGivenError, read
from tests.answering import answering

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


DATA = bytes(range(250)) * 1000


@pytest.fixture(scope="module")
def other() -> Iterator[Any]:
    """Servers of all kinds, by the first part of the path behind the route."""
    seen: list[tuple[str, dict[str, str]]] = []

    def respond(request: BaseHTTPRequestHandler, _: object) -> tuple[int, bytes, dict[str, str]]:
        kind = request.path.split("/artifacts/")[1].split("/")[0]
        seen.append((request.path, dict(request.headers)))
        if kind.isdigit():
            return int(kind), b"", {}
        whole = {"Content-Length": str(len(DATA))}
        if kind == "stalled":
            request.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 250000\r\n\r\n" + DATA[:100_000])
            time.sleep(1)
            request.wfile = BytesIO()  # nobody hears the rest
        return 200, DATA[:100_000] if kind == "short" else DATA, whole

    with answering(respond) as url:
        yield SimpleNamespace(url=url, seen=seen)


@pytest.mark.parametrize("offset", [0, 1, BLOCK_BYTES, 249_999, 250_000])
def test_a_server_that_knows_no_ranges(other: Any, offset: int) -> None:
    got = b"".join(read(other.url, "mlflow-artifacts:/plain", "a b/ö#?.txt", offset))
    assert got == DATA[offset:]
    path, headers = other.seen[-1]
    assert path == "/api/2.0/mlflow-artifacts/artifacts/plain/a%20b/%C3%B6%23%3F.txt"
    assert headers.get("Range") == (f"bytes={offset}-" if offset else None)
    assert headers["Accept-Encoding"] == "identity"


def test_the_sign_in_of_mlflow_is_used(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    list(read(f"{other.url}/below", "mlflow-artifacts:/plain", "x", 0))
    path, headers = other.seen[-1]
    assert path == "/below/api/2.0/mlflow-artifacts/artifacts/plain/x"
    assert headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 500, 503])
def test_what_a_server_says(other: Any, status: int) -> None:
    before, said = len(other.seen), rf"answers {status} \({HTTPStatus(status).phrase}\) for x"
    if status in (404, 410):
        said = r"^x is gone from the registry\."
    with pytest.raises(TrackingError, match=said) as caught:
        list(read(other.url, f"mlflow-artifacts:/{status}", "x", 10))
    assert isinstance(caught.value, NotGivenError) == (status < 429)
    assert len(other.seen) == before + 1  # nothing is retried behind our back
    assert list(read(other.url, "mlflow-artifacts:/416", "x", 10)) == []


@pytest.mark.parametrize("kind", ["short", "stalled"])
def test_a_connection_that_breaks_or_stalls(other: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(download, "STALLED_S", 0.5)
    got: list[bytes] = []
    started = time.monotonic()
    with pytest.raises(TrackingError, match="failed") as caught:
        got.extend(read(other.url, f"mlflow-artifacts:/{kind}", "x", 0))
    assert not isinstance(caught.value, NotGivenError)
    assert 100_000 - BLOCK_BYTES <= sum(map(len, got)) <= 100_000
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_in_a_folder(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model.onnx").write_bytes(b"x" * BLOCK_BYTES + b"yz")

    def ask(path: str, offset: int) -> list[bytes]:
        return list(read(f"sqlite:///{tmp_path / 'mlflow.db'}", f"{scheme}{tmp_path}", path, offset))

    assert ask("deep/model.onnx", 0) == [b"x" * BLOCK_BYTES, b"yz"]
    assert (ask("deep/model.onnx", BLOCK_BYTES + 1), ask("deep/model.onnx", BLOCK_BYTES + 9)) == ([b"z"], [])
    with pytest.raises(NotGivenError, match=r"^nothing is gone from the registry\."):
        ask("nothing", 0)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///x.db"])
def test_nobody_is_there(uri: str) -> None:
    with pytest.raises(TrackingError, match=f"^MLflow at {uri} failed"):
        list(read(uri, "mlflow-artifacts:/1", "x", 0))
