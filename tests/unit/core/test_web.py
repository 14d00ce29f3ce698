"""The socket that the service and the catalog listen at; how they read bodies is tested with each of them."""

import socket

import pytest

from slmops.core import web
from slmops.core.errors import PrerequisiteError, UsageError


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
