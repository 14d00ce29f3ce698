"""Pulling from a real MLflow server into a real Foundry Local, over connections that break."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slmops.conversion.store import files_of
from slmops.core.errors import RegistrationError, TrackingError
from slmops.core.files import sha256
from slmops.core.settings import Settings
from slmops.delivery import installed, pull
from slmops.foundry.register import register
from slmops.foundry.versions import VERSION_MANIFEST, Installed, ModelVersion, VersionManifest
from slmops.local import stack
from slmops.processes import daemon
from slmops.processes.daemon import HOST, Daemon
from slmops.tracking import download
from slmops.tracking.download import BLOCK_BYTES
from tests import making
from tests.application import application
from tests.tracked import Book, Made

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NAME = "tiny"
BIG = "model.onnx.data"
HEADERS = 1000  # more bytes than the headers of an answer
ENDLESS = 1 << 40


class Server:
    """An MLflow server that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = daemon.free_port(5600, [])
        self.artifacts = folder / "artifacts"
        self._running: Daemon | None = None

    def start(self) -> None:
        storage = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        storage += ["--artifacts-destination", str(self.artifacts), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.port), *storage]
        env = {**stack._clean_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = self.folder / "server.log"
        self._running = daemon.spawn(command, port=self.port, mark=str(self.folder), env=env, log=log)
        deadline = time.monotonic() + 60
        while (problem := daemon.problem(f"{self.url}/health", "OK")) is not None:
            assert time.monotonic() < deadline, problem
            time.sleep(0.1)

    def stop(self) -> None:
        if self._running is not None:
            daemon.stop(self._running)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


@dataclasses.dataclass
class Answer:
    """What a connection carries: how much of it still comes through, and whether it is the big file."""

    left: int = ENDLESS
    big: bool = False


class Line:
    """A TCP connection to the server that breaks on demand, while it carries the big file."""

    def __init__(self, port: int) -> None:
        self.cuts: list[int] = []  # bytes of each answer that come through
        self.cut: Callable[[], None] = lambda: None  # what happens then
        self.offsets: list[int] = []  # from where the file was asked for
        self.carried = 0  # bytes of the file and its headers
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """Request by request: MLflow's client sends none before the last one was answered."""
        with client, contextlib.suppress(OSError), socket.create_connection((HOST, self._target)) as server:
            answer = Answer()
            threading.Thread(target=self._answer, args=(client, server, answer), daemon=True).start()
            while request := client.recv(1 << 16):
                answer.big = f"/{BIG} ".encode() in request
                answer.left = ENDLESS
                if answer.big:
                    found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-", request)
                    self.offsets.append(int(found[1]) if found else 0)
                    answer.left = self.cuts.pop(0) if self.cuts else ENDLESS
                server.sendall(request)

    def _answer(self, client: socket.socket, server: socket.socket, answer: Answer) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 14)[: answer.left]:
                client.sendall(data)
                answer.left -= len(data)
                self.carried += len(data) if answer.big else 0
                if answer.left == 0:
                    self.cut()
                    break
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def version(server: Server, talkative: Path, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """A promoted version with the files of a real variant, made on another machine."""
    job = making.job(talkative)
    folder = tmp_path_factory.mktemp("maker")
    made = Made(folder / "made")
    made.variant = making.variant("fp32", job, stock)
    made.registration = register(made.variant, NAME, job, Settings(home=folder))
    return Book(server.url, NAME, folder).add(made, promote=True)


@pytest.fixture
def line(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(download, "RESUME_AFTER_S", (0.05,) * 4)
    made = Line(server.port)
    yield made
    made.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "device")


def stored(server: Server, version: ModelVersion) -> Path:
    """Where the server keeps the files of a version."""
    return server.artifacts / version.location.partition(":/")[2]


def catalog(settings: Settings) -> dict[str, str]:
    """What Foundry Local has in its catalog: id to folder."""
    known = json.loads((settings.deployed / "models" / "foundry.local.modelinfo.json").read_text())
    return {entry["model_info"]["id"]: entry["model_path"] for entry in known["models"]}


def answers(done: Installed, settings: Settings) -> bool:
    said = application(settings.deployed, done.foundry_id)["answers"][done.foundry_id]
    return bool(said["path"] == str(done.folder) and said["tokens"] > 0)


def size(server: Server, version: ModelVersion) -> int:
    return (stored(server, version) / BIG).stat().st_size


def test_a_connection_cut_at_three_points(
    server: Server, version: ModelVersion, line: Line, settings: Settings
) -> None:
    whole = size(server, version)
    assert whole > 5 * BLOCK_BYTES
    line.cuts = [100, whole // 2, whole // 2 + HEADERS - 10]  # in the headers, in the middle, at the end
    done = pull.pull(NAME, None, settings, line.url)
    assert line.cuts == []
    assert len(line.offsets) == 4
    assert line.offsets[:2] == [0, 0]
    assert whole // 2 - HEADERS - BLOCK_BYTES <= line.offsets[2] <= whole // 2
    assert whole - HEADERS - 2 * BLOCK_BYTES <= line.offsets[3] < whole
    assert line.carried <= whole + 3 * (BLOCK_BYTES + HEADERS)

    assert done.foundry_id == f"tiny-fp32-generic-cpu:{version.version}"
    assert {path.name for path in stored(server, version).iterdir()} | {"inference_model.json"} == {
        path.name for path in done.folder.iterdir()
    }
    for path in stored(server, version).iterdir():
        assert sha256(done.folder / path.name) == sha256(path)
    assert catalog(settings) == {done.foundry_id: str(done.folder)}
    assert answers(done, settings)
    assert installed.current(NAME, settings) == done

    # Once more, through a line that would not carry the file again.
    line.cuts, line.offsets[:] = [0] * 9, []
    assert pull.pull(f"{NAME}", "fp32", settings, line.url) == done
    assert line.offsets == []


def test_a_server_that_stops_in_the_middle_and_comes_back(
    server: Server, version: ModelVersion, line: Line, settings: Settings
) -> None:
    whole = size(server, version)
    line.cuts, line.cut = [whole // 2], server.stop
    with pytest.raises(TrackingError) as caught:
        pull.pull(NAME, None, settings, line.url)
    assert caught.value.message.startswith(f"{BIG} of tiny version {version.version} (fp32) ")
    assert f"MLflow at {line.url} failed" in caught.value.message
    assert caught.value.fix
    assert installed.versions(NAME, settings) == []

    server.start()
    line.cut = lambda: None
    line.offsets.clear()
    done = pull.pull(NAME, None, settings, line.url)
    assert len(line.offsets) == 1
    assert whole // 2 - HEADERS - BLOCK_BYTES <= line.offsets[0] <= whole // 2
    assert installed.current(NAME, settings) == done


def test_versions_come_and_go_in_foundrys_catalog_too(
    server: Server, version: ModelVersion, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for number in (1, 2, 3):
        made.append(pull.install(version.model_copy(update={"version": number}), settings, server.url))
        installed.make_current(made[-1], settings)
    kept = {one.foundry_id: str(one.folder) for one in made[1:]}
    assert catalog(settings) == kept
    assert not made[0].folder.exists()
    assert (made[1].folder / BIG).samefile(made[2].folder / BIG)

    # Every SHA-256 is right, and yet it does not load.
    folder = tmp_path / "broken"
    shutil.copytree(stored(server, version), folder)
    config = folder / "genai_config.json"
    config.write_text(config.read_text().replace("model.onnx", "other.onnx"))
    manifest = VersionManifest.model_validate_json((folder / VERSION_MANIFEST).read_bytes())
    files = tuple(file for file in files_of(folder) if file.name != VERSION_MANIFEST)
    manifest = manifest.model_copy(update={"files": files})
    (folder / VERSION_MANIFEST).write_text(manifest.text)
    changes = {"version": 4, "location": str(folder), "manifest_sha256": manifest.sha256}
    with pytest.raises(RegistrationError, match=r"other\.onnx"):
        pull.install(version.model_copy(update=changes), settings, server.url)
    assert catalog(settings) == kept
    assert [one.version for one in installed.versions(NAME, settings)] == [3, 2]

    # A file is gone from the server.
    monkeypatch.setattr(pull, "_known", lambda _: {})  # or it would be linked from the others
    file = stored(server, version) / "genai_config.json"
    file.rename(tmp_path / "gone")
    try:
        with pytest.raises(download.NotGivenError, match=r"genai_config\.json"):
            pull.install(version.model_copy(update={"version": 5}), settings, server.url)
    finally:
        (tmp_path / "gone").rename(file)
    assert catalog(settings) == kept
    assert installed.current(NAME, settings) == made[2]
