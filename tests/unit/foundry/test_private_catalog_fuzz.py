"""A great many random requests to the private catalog: none breaks it, and a good one is answered afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from slmops.foundry.private_catalog import FIELDS, OPERATORS, PATH
from tests.catalogs import BOT2, BOT3, ENTRIES, FAQ1, LIST, Exchange, body, found, ids


def spoil(text: bytes, cuts: list[tuple[float, bytes]]) -> bytes:
    for where, put in cuts:
        at = int(where * len(text))
        text = text[:at] + put + text[at + 1 :]
    return text


WORDS = ["models", "Versioned", "latest", "true", "false", "cpu", BOT3.name, BOT2.name, "bot", ""]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def a_filter(fields: Any, operators: Any, values: Any) -> Any:
    return st.fixed_dictionaries(
        {"field": st.sampled_from([*FIELDS]) | fields, "operator": st.sampled_from(operators), "values": values}
    )


TEXT = st.text(max_size=10)
FILTER = a_filter(
    TEXT,
    [*OPERATORS, "in", "contains", "EQ"],
    st.lists(st.sampled_from(WORDS) | TEXT, max_size=2) | SCALARS,
)
NEAR = st.fixed_dictionaries(
    {"filters": st.lists(FILTER, max_size=3) | JSON},
    optional={
        "pageSize": st.integers(-2, 1100) | JSON,
        "continuationToken": st.from_regex(r"[0-9]{1,12}", fullmatch=True) | JSON,
        "skip": JSON,
    },
)
GOOD_FILTER = a_filter(st.nothing(), [*OPERATORS], st.lists(st.sampled_from(WORDS), max_size=3))
GOOD = st.fixed_dictionaries({"filters": st.lists(GOOD_FILTER, max_size=4), "pageSize": st.integers(1, 4)})
SPOILED = st.builds(
    spoil,
    GOOD.map(lambda request: json.dumps(request).encode()),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=3),
)
BODIES = st.one_of(
    st.binary(max_size=200), (JSON | NEAR | GOOD).map(lambda request: json.dumps(request).encode()), SPOILED
)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_no_body_breaks_it(client: TestClient, loop: asyncio.Runner) -> None:
    statuses = {200: 0, 400: 0}

    @settings(max_examples=5000, derandomize=True, deadline=None)
    @given(BODIES)
    def attack(sent: bytes) -> None:
        exchange = Exchange([{"type": "http.request", "body": sent, "more_body": False}])
        loop.run(exchange.run(client.app))
        statuses[exchange.status] += 1
        if exchange.status == 200:
            names = {(one["properties"]["name"], one["properties"]["version"]) for one in exchange.answered["value"]}
            assert names <= set(ids(*ENTRIES))
        else:
            assert set(exchange.answered["error"]) == {"message", "type"}

    attack()
    assert min(statuses.values()) > 500  # neither all nor nothing got through
    assert found(client.post(PATH, content=body(*LIST)).content) == ids(BOT3, FAQ1)


METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "FOO"]
HEADERS = [b"content-type", b"content-length", b"content-encoding", b"expect", b"host", b"x-y"]


def test_no_request_breaks_it(client: TestClient, loop: asyncio.Runner) -> None:
    """Methods, paths and headers that no client of ours sends."""

    @settings(max_examples=500, derandomize=True, deadline=None)
    @given(
        st.sampled_from(METHODS),
        st.sampled_from([PATH, PATH + "/", "/health", "/"]) | st.text(max_size=20),
        st.lists(st.tuples(st.sampled_from(HEADERS), st.binary(max_size=20)), max_size=3),
    )
    def attack(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        exchange = Exchange([{"type": "http.request", "body": b"{}", "more_body": False}], headers)
        loop.run(exchange.run(client.app, method, path))
        assert exchange.status < 500

    attack()
    assert client.get("/health").status_code == 200
