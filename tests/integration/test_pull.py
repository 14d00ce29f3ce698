"""Pulling from a real MLflow server into a real Foundry Local, and what servers of all kinds answer."""

import json
import shutil
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from slmops.conversion.store import files_of
from slmops.core.errors import RegistrationError, TrackingError
from slmops.core.files import sha256
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.delivery import installed, pull
from slmops.foundry.layout import RELEASED_CONFIG
from slmops.foundry.register import register
from slmops.foundry.versions import VERSION_MANIFEST, Installed, ModelVersion, VersionManifest
from slmops.local import stack
from slmops.local.stack import Server
from slmops.processes import daemon
from slmops.processes.daemon import Daemon
from slmops.tracking import download
from slmops.tracking.download import BLOCK_BYTES
from tests import making
from tests.answering import answering
from tests.application import application
from tests.tracked import Book, Made

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NAME = "tiny"
BIG = "model.onnx.data"
read = download.read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    settings, servers = Settings(home=folder, mlflow_port=5600), dict[Server, Daemon]()
    stack._start(settings, servers, "mlflow")
    stack._wait_until_healthy(settings, servers, "mlflow")
    yield servers["mlflow"].url
    daemon.stop(servers["mlflow"])


@pytest.fixture(scope="module")
def version(url: str, job: Job, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """A promoted version with the files of a real variant, made on another machine."""
    maker = tmp_path_factory.mktemp("maker")
    made = Made(maker / "made")
    made.variant = making.variant("fp32", job, stock)
    made.registration = register(made.variant, NAME, job, Settings(home=maker))
    return Book(url, NAME, maker).add(made, promote=True)


@pytest.fixture
def stored(folder: Path, version: ModelVersion) -> Path:
    """Where the server keeps the files of the version."""
    return folder / "mlflow" / "artifacts" / version.location.partition(":/")[2]


def catalog(home: Settings) -> dict[str, str]:
    """What Foundry Local has in its catalog: id to folder."""
    known = json.loads((home.deployed / "models" / "foundry.local.modelinfo.json").read_text())
    return {entry["model_info"]["id"]: entry["model_path"] for entry in known["models"]}


def test_a_pull_goes_on_where_an_earlier_one_broke_off(
    url: str, stored: Path, version: ModelVersion, fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = (stored / BIG).read_bytes(), []
    left = download.part_of(installed.downloads_of(fresh) / version.manifest_sha256, BIG)
    left.parent.mkdir(parents=True)
    left.write_bytes(whole[:BLOCK_BYTES])
    monkeypatch.setattr(download, "read", lambda *given: asked.append(given[2:]) or read(*given))
    done = pull.pull(NAME, None, fresh, url)
    assert [offset for name, offset in asked if name == BIG] == [BLOCK_BYTES]
    # That the server sends no more than that is for it to say.
    path = f"api/2.0/mlflow-artifacts/artifacts/{version.location.partition(':/')[2]}/{BIG}"
    assert httpx.get(f"{url}/{path}", headers={"Range": "bytes=9-"}, trust_env=False).content == whole[9:]

    assert done.foundry_id == f"tiny-fp32-generic-cpu:{version.version}"
    here = {path.name: sha256(path) for path in done.folder.iterdir() if path.name != "inference_model.json"}
    here["genai_config.json"] = here.pop(RELEASED_CONFIG)  # beside that with this device's number of threads
    assert here == {path.name: sha256(path) for path in stored.iterdir()}
    assert catalog(fresh) == {done.foundry_id: str(done.folder)}
    said = application(fresh.deployed, done.foundry_id)["answers"][done.foundry_id]
    assert said["path"] == str(done.folder)
    assert said["tokens"] > 0
    assert installed.current(NAME, fresh) == done

    asked.clear()
    assert pull.pull(NAME, "fp32", fresh, url) == done
    assert BIG not in [name for name, _ in asked]


def test_versions_come_and_go_in_foundrys_catalog_too(
    url: str, stored: Path, version: ModelVersion, fresh: Settings
) -> None:
    def install(**changes: Any) -> Installed:
        return pull.install(version.model_copy(update=changes), fresh, url)

    made = []
    for number in (1, 2, 3):
        made.append(install(version=number))
        installed.make_current(made[-1], fresh)
    kept = {one.foundry_id: str(one.folder) for one in made[1:]}
    assert catalog(fresh) == kept
    assert not made[0].folder.exists()
    assert (made[1].folder / BIG).samefile(made[2].folder / BIG)

    # Every SHA-256 is right, and yet it does not load.
    broken = fresh.home / "broken"
    shutil.copytree(stored, broken)
    config = broken / "genai_config.json"
    config.write_text(config.read_text().replace("model.onnx", "other.onnx"))
    manifest = VersionManifest.model_validate_json((broken / VERSION_MANIFEST).read_bytes())
    files = tuple(file for file in files_of(broken) if file.name != VERSION_MANIFEST)
    manifest = manifest.model_copy(update={"files": files})
    (broken / VERSION_MANIFEST).write_text(manifest.text)
    with pytest.raises(RegistrationError, match=r"other\.onnx"):
        install(version=4, location=str(broken), manifest_sha256=manifest.sha256)
    assert catalog(fresh) == kept
    assert [one.version for one in installed.versions(NAME, fresh)] == [3, 2]
    assert installed.current(NAME, fresh) == made[2]


# --- one file: servers of all kinds, and what MLflow's client makes of it ---

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
    got = b"".join(download.read(other.url, "mlflow-artifacts:/plain", "a b/ö#?.txt", offset))
    assert got == DATA[offset:]
    path, headers = other.seen[-1]
    assert path == "/api/2.0/mlflow-artifacts/artifacts/plain/a%20b/%C3%B6%23%3F.txt"
    assert headers.get("Range") == (f"bytes={offset}-" if offset else None)
    assert headers["Accept-Encoding"] == "identity"


def test_the_sign_in_of_mlflow_is_used(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    list(download.read(f"{other.url}/below", "mlflow-artifacts:/plain", "x", 0))
    path, headers = other.seen[-1]
    assert path == "/below/api/2.0/mlflow-artifacts/artifacts/plain/x"
    assert headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 500, 503])
def test_what_a_server_says(other: Any, status: int) -> None:
    before, said = len(other.seen), rf"answers {status} \({HTTPStatus(status).phrase}\) for x"
    if status in (404, 410):
        said = r"^x is gone from the registry\."
    with pytest.raises(TrackingError, match=said) as caught:
        list(download.read(other.url, f"mlflow-artifacts:/{status}", "x", 10))
    assert isinstance(caught.value, download.NotGivenError) == (status < 429)
    assert len(other.seen) == before + 1  # nothing is retried behind our back
    assert list(download.read(other.url, "mlflow-artifacts:/416", "x", 10)) == []


@pytest.mark.parametrize("kind", ["short", "stalled"])
def test_a_connection_that_breaks_or_stalls(other: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(download, "STALLED_S", 0.5)
    got: list[bytes] = []
    started = time.monotonic()
    with pytest.raises(TrackingError, match="failed") as caught:
        got.extend(download.read(other.url, f"mlflow-artifacts:/{kind}", "x", 0))
    assert not isinstance(caught.value, download.NotGivenError)
    assert 100_000 - BLOCK_BYTES <= sum(map(len, got)) <= 100_000
    assert time.monotonic() - started < 25


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_in_a_folder(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model.onnx").write_bytes(b"x" * BLOCK_BYTES + b"yz")

    def ask(path: str, offset: int) -> list[bytes]:
        return list(download.read(f"sqlite:///{tmp_path / 'mlflow.db'}", f"{scheme}{tmp_path}", path, offset))

    assert ask("deep/model.onnx", 0) == [b"x" * BLOCK_BYTES, b"yz"]
    assert (ask("deep/model.onnx", BLOCK_BYTES + 1), ask("deep/model.onnx", BLOCK_BYTES + 9)) == ([b"z"], [])
    with pytest.raises(download.NotGivenError, match=r"^nothing is gone from the registry\."):
        ask("nothing", 0)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///x.db"])
def test_nobody_is_there(uri: str) -> None:
    with pytest.raises(TrackingError, match=f"^MLflow at {uri} failed"):
        list(download.read(uri, "mlflow-artifacts:/1", "x", 0))
