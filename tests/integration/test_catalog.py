"""``slmops catalog`` as it is run."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from slmops.foundry.private_catalog import PATH
from tests.catalogs import LIST, body

pytestmark = pytest.mark.integration


@contextlib.contextmanager
def serving(uri: str, host: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its URL, and the lines that it logged up to there, without the time."""
    argv = [sys.executable, "-m", "slmops.cli", "catalog", "--from", uri, "--host", host, "--port", "0"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line.strip().partition(" ")[2])
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


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Its status and last words."""
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    return process.returncode, said


def test_served_from_the_registry_until_it_is_stopped(promoted: str) -> None:
    with serving(promoted, "localhost") as (process, url, lines):
        assert url.startswith("http://localhost:")
        assert lines == [f"The catalog answers. In Foundry Local's Configuration: catalog_urls=[({url!r}, None)]"]
        (found,) = httpx.post(url, content=body(*LIST), timeout=30).json()["value"]
        assert found["annotations"]["tags"]["alias"] == "bot"
        assert (found["properties"]["name"], found["properties"]["version"]) == ("bot-int8-generic-cpu", 1)
        assert httpx.get(url.replace(PATH, "/health")).json() == {"status": "ok", "models": 1}
        assert stop(process, signal.SIGTERM) == (0, "")


def test_beyond_loopback_it_warns_and_a_registry_that_is_down_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, shown = "0.0.0.0", socket.gethostname()  # noqa: S104 - the warning is the point
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving("http://127.0.0.1:9", host) as (process, url, lines):
        assert url.startswith(f"http://{shown}:")
        assert f"warning: Anybody who reaches {host} can read the names and sizes of the promoted models." in lines
        answered = httpx.post(url.replace(shown, "127.0.0.1"), content=body(*LIST), timeout=60)
        assert answered.status_code == 503
        assert answered.headers["retry-after"] == "5"
        assert "MLflow at http://127.0.0.1:9" in answered.json()["error"]["message"]
        assert process.poll() is None
        assert stop(process, signal.SIGINT) == (130, "interrupted\n")
