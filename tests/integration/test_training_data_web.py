"""Training data from a web server, a good one and several bad ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from slmops.core.errors import DataError, PrerequisiteError, SlmopsError
from slmops.core.settings import Settings
from slmops.training import sources
from tests.training_data import fetch, refused

pytestmark = pytest.mark.integration

ITEM = '{"prompt": "How are you?", "completion": "Well."}\n'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


ANSWERS: dict[str, tuple[int, str, dict[str, str]]] = {
    "/good.jsonl": (200, ITEM, {}),
    "/page.jsonl": (200, "<html>Sign in</html>", {"Content-Type": "text/html; charset=utf-8"}),
    "/moved.jsonl": (302, "", {"Location": "/good.jsonl"}),
    "/round.jsonl": (302, "", {"Location": "/round.jsonl"}),
    "/elsewhere.jsonl": (302, "", {"Location": "file:///etc/hostname"}),
    "/forbidden.jsonl": (403, "", {}),
    "/short.jsonl": (200, ITEM, {"Content-Length": "1000", "Connection": "close"}),
}


class Server(ThreadingHTTPServer):
    """A web server that does what the path says."""

    over = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """The client hangs up in some tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        match path:
            case "/silent.jsonl":
                Server.over.wait(60)
            case "/large.jsonl":
                self._begin(200, {"Transfer-Encoding": "chunked"})
                while True:
                    self.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            case "/slow.jsonl":
                self._begin(200, {"Content-Length": "1000000"})
                while not Server.over.wait(0.02):
                    self.wfile.write(b"x")
            case _:
                status, body, headers = ANSWERS.get(path, (404, "no", {}))
                self._begin(status, {"Content-Length": str(len(body)), **headers})
                self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["/good.jsonl", "/moved.jsonl", "/good.jsonl?key=secret#secret"])
def test_a_url(url: str, path: str, held_out: Path, home: Settings) -> None:
    fetched = fetch(url + path, home, held_out)
    assert fetched.source == url + path.partition("?")[0]
    assert [file.read_text() for file in fetched.files] == [ITEM]
    assert fetched.evaluation.name == "questions.jsonl"


def test_a_url_has_nothing_beside_it(url: str, home: Settings) -> None:
    error = refused(f"{url}/good.jsonl?key=secret", home)
    assert isinstance(error, DataError)
    assert f"{url}/good.jsonl" in error.message
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/absent.jsonl", DataError, "404"),
        ("/forbidden.jsonl", DataError, "403"),
        ("/page.jsonl", DataError, "web page"),
        ("/round.jsonl", DataError, "TooManyRedirects"),
        ("/elsewhere.jsonl", PrerequisiteError, "UnsupportedProtocol"),
        ("/large.jsonl", DataError, "1 MB"),
        ("/short.jsonl", PrerequisiteError, "RemoteProtocolError"),
        ("/silent.jsonl", PrerequisiteError, "does not answer"),
        ("/slow.jsonl", PrerequisiteError, "longer than 0 s"),
    ],
)
def test_a_url_that_gives_nothing(
    url: str, path: str, error: type[SlmopsError], said: str, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGEST", 1_000_000)
    monkeypatch.setattr(sources, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT_S", 0.4 if path == "/slow.jsonl" else 60)
    caught = refused(f"{url}{path}?key=secret", home)
    assert isinstance(caught, error)
    assert caught.message.startswith(f"{url}{path} ")
    assert said in caught.message
    assert caught.fix


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://me:secret@127.0.0.1:1/a.jsonl", "http://127.0.0.1:1/a.jsonl"),
        ("http://127.0.0.1:1/a.jsonl?secret", "ConnectError"),
        ("http://[::1/a.jsonl?secret", "not a URL"),
        ("http://127.0.0.1:99999/a.jsonl?secret", "http://127.0.0.1:99999/a.jsonl"),
        ("http:///a.jsonl?secret", "UnsupportedProtocol"),
    ],
)
def test_a_bad_url(address: str, said: str, home: Settings) -> None:
    error = refused(address, home)
    assert isinstance(error, (DataError, PrerequisiteError))
    assert said in error.message
    assert "secret" not in f"{error} {error.fix}"
