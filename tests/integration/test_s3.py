"""MLflow's files in an S3 store: through the server where only it reaches the store, else straight from there.

The store is nanio, which .ci/run installs apart from the other packages: it checks signatures, and knows ranges and
uploads in parts.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from slmops.core.errors import WorkError
from slmops.core.files import sha256
from slmops.core.settings import Settings
from slmops.core.values import VariantFile
from slmops.delivery import installed, pull
from slmops.processes import daemon
from slmops.processes.daemon import HOST
from slmops.tracking import download
from slmops.tracking.exchange import Exchange
from tests import making
from tests.compose import ROOT, free_ports
from tests.pulled import BIG, Device
from tests.tracked import Book, Made

NANIO = os.environ.get("SLMOPS_S3_SERVER") or shutil.which("nanio")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(NANIO is None, reason="no S3 server: SLMOPS_S3_SERVER names no nanio, and PATH has none"),
]

DATA = bytes(range(251)) * 80_000  # 20 MB, which MLflow is told to send in parts
HALF = len(DATA) // 2
IN_PARTS = {"MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "10000000", "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE": "6000000"}
CLOSED = {"http_proxy": f"http://{HOST}:9", "no_proxy": "localhost"}  # MLflow is localhost, and the store is not
DIRECT = {"MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true", "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true"}
SEND = """
import sys
from pathlib import Path
from slmops.core.settings import Settings
from slmops.tracking.client import Client
from slmops.tracking.exchange import Exchange
uri, run, file = sys.argv[1:]
[sent] = Exchange(uri, run, Settings()).put({"big": Path(file)})
Client(uri).log_text(run, sent.model_dump_json(), "sent.json")
print(Client(uri).text_of(run, "sent.json"))
"""
ways = pytest.mark.parametrize("environment", [CLOSED, DIRECT], ids=["server", "store"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def uri(folder: Path, databases: Path) -> Iterator[str]:
    """An MLflow server with its files in a bucket. Its clients have no keys of the store."""
    (folder / "files" / "mlflow").mkdir(parents=True)
    database = shutil.copy(databases / "mlflow.db", folder)
    s3, server = free_ports(2)
    keys = {"AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-key"}
    known = {"PATH": os.environ["PATH"], "HOME": str(folder), "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{s3}", **keys}
    commands = {
        s3: [str(NANIO), "serve", "--data-dir", str(folder / "files")],
        server: [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--artifacts-destination", "s3://mlflow"],
    }
    commands[server] += ["--backend-store-uri", f"sqlite:///{database}"]
    known |= {"NANIO_ACCESS_KEY": keys["AWS_ACCESS_KEY_ID"], "NANIO_SECRET_KEY": keys["AWS_SECRET_ACCESS_KEY"]}
    started = [
        daemon.spawn(
            [*command, "--host", HOST, "--port", str(port)],
            port=port,
            mark=f"{folder}/{port}",
            env={**known, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            log=folder / f"{name}.log",
        )
        for name, (port, command) in zip(("store", "server"), commands.items(), strict=True)
    ]
    try:
        making.until(partial(daemon.healthy, started[1], "/health", "OK"), "MLflow is healthy")
        yield f"http://localhost:{server}"
    finally:
        for one in started:
            daemon.stop(one)


@ways
def test_a_large_file_of_a_job_arrives(
    uri: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    (tmp_path / "big").write_bytes(DATA)
    exchange = Exchange.open(uri, Book(uri, name, tmp_path).start(), Settings())[0]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **IN_PARTS, **environment}
    argv = [sys.executable, "-c", SEND, uri, exchange.run_id, str(tmp_path / "big")]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    sent = VariantFile.model_validate_json(done.stdout)
    assert (sent.size, sent.sha256) == (len(DATA), sha256(tmp_path / "big"))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    there = Exchange(uri, exchange.run_id, Settings(home=tmp_path / "there"))
    assert there.get(sent).read_bytes() == DATA
    with pytest.raises(WorkError, match="lost is not among this job's files"):
        there.get(sent.model_copy(update={"name": "lost", "sha256": "0" * 64}))


def test_a_pull_goes_on_where_it_broke_off(
    uri: str, folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, read, asked = Made(tmp_path / "made"), download.read, []
    (made.registration.path / BIG).write_bytes(DATA)
    version = Book(uri, name, tmp_path).add(made, promote=True)
    device = Device(tmp_path, monkeypatch)
    monkeypatch.setattr(download, "read", lambda *given: asked.append(given[2:]) or read(*given))
    for variable, value in CLOSED.items():
        monkeypatch.setenv(variable, value)
    downloads = installed.downloads_of(device.settings) / version.manifest_sha256
    begin(downloads)
    done = pull.pull(name, None, device.settings, uri)
    assert (done.folder / BIG).read_bytes() == DATA
    assert [offset for file, offset in asked if file == BIG] == [HALF]

    # The same of the store, which sends no more than that.
    monkeypatch.delenv("http_proxy")
    for variable, value in DIRECT.items():
        monkeypatch.setenv(variable, value)
    begin(tmp_path / "direct")
    origin = download.Origin(uri, version.location, "the file")
    file = download.fetch(origin, BIG, len(DATA), hashlib.sha256(DATA).hexdigest(), tmp_path / "direct")
    assert file.read_bytes() == DATA
    said = [line for line in (folder / "store.log").read_text(encoding="utf-8").splitlines() if BIG in line]
    assert '" 206' in said[-1]


def begin(folder: Path) -> None:
    """Leave what a download brought that broke off in the middle."""
    part = download.part_of(folder, BIG)
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:HALF])
