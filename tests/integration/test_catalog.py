"""``slmops catalog``: what it makes of the registry, and the server as it is run."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.core.errors import PrerequisiteError, TrackingError, UsageError
from slmops.delivery import catalog
from slmops.foundry.private_catalog import PATH, Entry
from slmops.foundry.versions import ModelVersion
from tests.catalogs import LIST, MADE, FakeRegistry, body, entry, version

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("champion", "previous", "expected"),
    [
        (None, None, []),
        (None, version(1), []),
        (version(1), None, [("tiny", "tiny-fp32-generic-cpu", 1, True)]),
        (version(1), version(1), [("tiny", "tiny-fp32-generic-cpu", 1, True)]),
        (
            version(3, "int4"),
            version(2, "int8"),
            [("tiny", "tiny-int4-generic-cpu", 3, True), ("tiny", "tiny-int8-generic-cpu", 2, False)],
        ),
        (
            version(2),
            version(3, "int4"),
            [("tiny", "tiny-fp32-generic-cpu", 2, True), ("tiny.previous", "tiny-int4-generic-cpu", 3, False)],
        ),
    ],
)
def test_entries(
    champion: ModelVersion | None, previous: ModelVersion | None, expected: list[tuple[str, str, int, bool]]
) -> None:
    registry: Any = FakeRegistry(tiny=(champion, previous))
    found = catalog.entries(registry)
    assert [(one.alias, one.name, one.version, one.latest) for one in found] == expected


def test_an_entry_has_what_the_version_has() -> None:
    registry: Any = FakeRegistry(tiny=(version(4, "int8", size_mb=190.7, device="gpu", provider="CUDA"), None))
    assert catalog.entries(registry) == [
        Entry(
            alias="tiny",
            name="tiny-int8-generic-cpu",
            version=4,
            display_name="tiny int8",
            device="gpu",
            provider="CUDA",
            size_bytes=190_700_000,
            created=MADE,
        )
    ]


def test_a_model_that_is_not_ours_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    foreign = UsageError("Version 1 of foreign was not registered by slmops.")
    registry: Any = FakeRegistry(foreign=foreign, tiny=(version(1), None))
    assert [one.alias for one in catalog.entries(registry)] == ["tiny"]
    assert "foreign is not in the catalog: Version 1 of foreign was not registered" in caplog.text


def test_a_registry_that_is_down_is_no_empty_catalog() -> None:
    registry: Any = FakeRegistry(tiny=TrackingError("down"))
    with pytest.raises(TrackingError, match="down"):
        catalog.entries(registry)


def test_many_requests_read_the_registry_once() -> None:
    reads: list[int] = []

    def read() -> list[Entry]:
        reads.append(1)
        time.sleep(0.05)
        return [entry("tiny-fp32", len(reads))]

    kept = catalog.Kept(read, keep_s=0.3)
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(kept()[0].version)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [1] * 20
    time.sleep(0.35)
    assert kept()[0].version == 2


def test_a_failure_is_kept_no_longer_than_an_answer() -> None:
    results: list[list[Entry] | Exception] = [
        TrackingError("down", "slmops up"),
        [entry("tiny-fp32", 1)],
        ZeroDivisionError(),
    ]

    def read() -> list[Entry]:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    kept = catalog.Kept(read, keep_s=0.2)
    for _ in range(3):
        with pytest.raises(TrackingError, match="down") as caught:
            kept()
        assert caught.value.fix == "slmops up"
    time.sleep(0.25)
    assert kept()[0].version == 1
    time.sleep(0.25)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden behind what was
        kept()


# --- the server as it is run

SERVE = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from slmops.delivery import catalog
from slmops.core.errors import SlmopsError
try:
    catalog.serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
except SlmopsError as error:
    sys.exit(f"{type(error).__name__}: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


@contextlib.contextmanager
def serving(uri: str, host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its URL, and the lines that it logged up to there."""
    argv = [sys.executable, "-c", SERVE, uri, host, str(port)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line.strip())
            if "catalog_urls=[('" in line:
                break
        yield process, lines[-1].partition("catalog_urls=[('")[2].partition("'")[0], lines
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def promoted(database: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database in which the model ``bot`` has a champion, and ``other`` has none."""
    from tests.tracked import Book, Made

    folder = tmp_path_factory.mktemp("promoted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("bot", "other"):
            Book(database, name, folder).add(Made(folder / name, "int8"), promote=name == "bot")
    return database


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_served_from_the_registry_until_it_is_stopped(promoted: str, number: signal.Signals, status: int) -> None:
    with serving(promoted) as (process, url, lines):
        assert lines == [f"INFO The catalog answers. In Foundry Local's Configuration: catalog_urls=[({url!r}, None)]"]
        (found,) = httpx.post(url, content=body(*LIST), timeout=30).json()["value"]
        assert found["annotations"]["tags"]["alias"] == "bot"
        assert (found["properties"]["name"], found["properties"]["version"]) == ("bot-int8-generic-cpu", 1)
        assert httpx.get(url.replace(PATH, "/health")).json() == {"status": "ok", "models": 1}
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (status, "")


def test_a_registry_that_cannot_be_reached_is_said_and_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving("http://127.0.0.1:9") as (process, url, _):
        answered = httpx.post(url, content=body(*LIST), timeout=60)
        assert answered.status_code == 503
        assert answered.headers["retry-after"] == "5"
        assert "MLflow at http://127.0.0.1:9" in answered.json()["error"]["message"]
        assert process.poll() is None


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/never-made.db"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PrerequisiteError) as caught:
            catalog.serve(uri, "127.0.0.1", port)
    assert str(port) in caught.value.message
    assert "--port" in (caught.value.fix or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", socket.gethostname()), ("localhost", "localhost")],  # noqa: S104 - the warning is the point
)
def test_beyond_loopback_it_warns(host: str, shown: str) -> None:
    with serving("http://127.0.0.1:9", host) as (_, url, lines):
        assert url.startswith(f"http://{shown}:")
        warned = f"WARNING Anybody who reaches {host} can read the names and sizes of the promoted models."
        assert (warned in lines) is (host == "0.0.0.0")  # noqa: S104
