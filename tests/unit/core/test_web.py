"""The socket that the service and the catalog listen at; how they read bodies is tested with each of them."""

import logging
import os
import socket

import httpx
import pytest
import requests

from slmops.core import web
from slmops.core.errors import PrerequisiteError, UsageError
from tests.answering import answering

CLOSED = "http://127.0.0.1:9"


def test_answers_are_not_held_back_for_company() -> None:
    """Otherwise each short one waits 40 ms for the receiver's acknowledgement of the one before."""
    with web.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_a_port_in_use(host: str) -> None:
    with web.listen(host, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PrerequisiteError, match=rf"{port}(.|\n)*--port"):
            web.listen(host, port)


@pytest.mark.parametrize(
    ("host", "port", "error", "named"),
    [
        ("no.such.invalid", 8000, UsageError, "no.such.invalid"),
        ("127.0.0.1", 70000, UsageError, "70000"),
        ("127.0.0.1", -1, UsageError, "-1"),
        ("192.0.2.1", 8000, PrerequisiteError, "192.0.2.1"),  # nobody's address
    ],
)
def test_an_address_that_cannot_be(host: str, port: int, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        web.listen(host, port)


PROXIES = [name for kind in ("http", "https", "all") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]
OURS = "localhost,127.0.0.1,::1"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of this process, with a proxy for everything."""
    inside = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"}
    monkeypatch.setattr(os, "environ", inside | dict.fromkeys(PROXIES, CLOSED))
    return os.environ


@pytest.mark.parametrize(
    ("said", "direct"),
    [
        ({}, OURS),
        ({"NO_PROXY": ""}, OURS),
        ({"NO_PROXY": ".corp.example, 127.0.0.1"}, ".corp.example,127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a.example", "no_proxy": "b.example"}, f"b.example,{OURS}"),  # as urllib and requests read it
        ({"no_proxy": "a.example,*"}, "*"),
    ],
)
def test_no_proxy_of_the_user_is_extended(environment: dict[str, str], said: dict[str, str], direct: str) -> None:
    environment.update(said)
    assert web.past_proxies() == {"NO_PROXY": direct, "no_proxy": direct}


@pytest.mark.parametrize("scheme", ["http", "socks"])
def test_clients_reach_this_machine_and_what_is_outside_by_the_proxy(
    environment: dict[str, str], scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment.update({"ALL_PROXY": f"{scheme}://127.0.0.1:9", "all_proxy": f"{scheme}://127.0.0.1:9"})
    with caplog.at_level(logging.WARNING):
        environment.update(web.past_proxies())
    assert ("ALL_PROXY" in caplog.text) == (scheme == "socks")
    with answering(lambda request, _: (200, request.path)) as url:
        for there in (url, url.replace("127.0.0.1", "localhost")):
            assert httpx.get(there).status_code == requests.get(there, timeout=9).status_code == 200
    with pytest.raises(httpx.ConnectError, match="refused"):  # by the proxy; no name server knows the host
        httpx.get("http://hub.invalid")
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get("http://hub.invalid", timeout=9)
