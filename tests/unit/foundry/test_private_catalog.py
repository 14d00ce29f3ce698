"""The catalog protocol: what Foundry's runtime asks, what nobody should ask, and a great many random requests."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta, timezone
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from slmops.core.errors import TrackingError, UsageError
from slmops.foundry import private_catalog
from slmops.foundry.private_catalog import FIELDS, OPERATORS, PATH, Entry, answer, app
from tests import catalogs, fuzzing
from tests.catalogs import BOT2, BOT3, COMMON, ENTRIES, FAQ1, LIST, Exchange, body, condition, entry, found, ids

BOTS = condition("annotations/tags/alias", "bot")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (LIST, [BOT3, FAQ1]),
        ([*COMMON, condition("name", BOT2.name)], [BOT2]),
        ([*COMMON, condition("name", BOT2.name, BOT2.name, BOT3.name, "unknown")], [BOT3, BOT2]),
        ([*COMMON, BOTS, *catalogs.HARDWARE], [BOT3, BOT2]),
        ([*COMMON, BOTS, *catalogs.HARDWARE, condition("name", BOT3.name)], [BOT3]),
        ([condition("annotations/tags/foundryLocal", "test")], []),
        ([condition(catalogs.OPTIONS, "Something else")], []),
        ([condition("name", BOT2.name, operator="NotEquals")], [BOT3, FAQ1]),
        ([condition("labels", "latest", operator="NotEquals")], [BOT2]),
        ([condition(catalogs.DEVICE, "gpu")], []),
        ([condition(catalogs.DEVICE, "gpu", "cpu")], ENTRIES),
        ([condition(catalogs.PROVIDER, "CUDAExecutionProvider")], []),
        ([condition("name", BOT2.name.upper())], []),
        ([condition("name")], []),
        ([condition("name", operator="NotEquals")], ENTRIES),
        ([], ENTRIES),
    ],
)
def test_filters(filters: list[dict[str, Any]], expected: list[Entry]) -> None:
    assert found(answer(body(*filters), ENTRIES)) == ids(*expected)


def test_an_entity_is_what_the_runtime_accepts() -> None:
    elsewhere = BOT3.model_copy(update={"created": catalogs.MADE.astimezone(timezone(timedelta(hours=2)))})
    identity = "azureml://registries/slmops/models/bot-int8-generic-cpu/versions/3"
    tags = {"alias": "bot", "task": "chat-completion", "foundryLocal": "", "promptTemplate": ""}
    data = {"publisher": "slmops", "displayName": "bot-int8", "inferenceTasks": ["chat-completion"]}
    runs_on = {"device": "cpu", "executionProvider": "CPUExecutionProvider"}
    properties = {
        "id": identity,
        "name": "bot-int8-generic-cpu",
        "version": 3,
        "variantInfo": {"parents": [], "variantMetadata": {"modelType": "ONNX", "fileSizeBytes": 3000, **runs_on}},
        "creationContext": {"createdTime": "2026-11-22T21:30:00Z"},
    }
    annotations = {"tags": tags, "systemCatalogData": data}
    entity = {"assetId": identity, "entityId": identity, "annotations": annotations, "properties": properties}
    assert json.loads(answer(body(*LIST), [elsewhere])) == {"value": [entity]}
    tags |= {"supportsToolCalling": "true", "supportsReasoning": "true"}
    able = elsewhere.model_copy(update={"abilities": frozenset({"tools", "reasoning"})})
    assert json.loads(answer(body(*LIST), [able])) == {"value": [entity]}


@pytest.mark.parametrize(("count", "pages"), [(0, [0]), (3, [3]), (4, [3, 1]), (6, [3, 3]), (7, [3, 3, 1])])
def test_pages(count: int, pages: list[int]) -> None:
    many = [entry(f"m{number}-int8", 1) for number in range(count)]
    sizes, seen, token = [], [], {}
    while True:
        page = answer(body(*LIST, pageSize=3, **token), many)
        sizes.append(len(found(page)))
        seen += found(page)
        if "continuationToken" not in (said := json.loads(page)):
            break
        token = {"continuationToken": said["continuationToken"]}
    assert sizes == pages
    assert seen == ids(*many)
    assert json.loads(answer(body(continuationToken="50"), many)) == {"value": []}  # beyond the end


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "table of keys and values"),
        (b"{}", "filters is missing"),
        (b"[" * 50_000, "recursion limit"),
        (b'{"filters":' * 5_000, "recursion limit"),
        (b'{"filters": [1]}', "filters.0 "),
        (b'{"filters": [{"field": "name", "operator": "eq"}]}', "filters.0.values is missing"),
        (b'{"filters": [{"field": "name", "operator": "eq", "values": [1]}]}', "filters.0.values.0 "),
        (b'{"filters": [{"field": "name", "operator": "eq", "values": ["\\ud800"]}]}', "not valid JSON"),
        (b'{"filters": [{"field": "name", "operator": "eq", "values": ["\xed\xa0\x80"]}]}', "not valid JSON"),
        (body(pageSize=0), "pageSize "),
        (body(pageSize=1001), "pageSize "),
        (body(pageSize="50"), "pageSize "),
        (body(pageSize=float("nan")), "pageSize "),
        (b'{"filters": [], "pageSize": ' + b"9" * 5000 + b"}", "out of range"),
        (body(continuationToken="-1"), "continuationToken "),
        (body(continuationToken="٣"), "continuationToken "),  # a digit, but none of ours
        (body(continuationToken="9" * 10), "continuationToken "),
        (body(skip=50), "skip is not a known key"),
        (body(*[condition("name", "bot")] * 51), "filters "),
        (body(condition("size", "1")), "no filter field 'size'. It has type, kind, name, labels, "),
        (body(condition("name", "bot", operator="EQ")), "no filter operator 'EQ'. It has eq, NotEquals."),
        (body(condition("x" * 5000, "bot")), "no filter field 'xxx"),
    ],
)
def test_what_is_no_request(sent: bytes, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        answer(sent, ENTRIES)
    assert said in caught.value.message
    assert len(caught.value.message) < 600


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """Raises what the application does not catch."""
    with TestClient(app(lambda: ENTRIES)) as opened:
        yield opened


def test_served(client: TestClient) -> None:
    answered = client.post(PATH, content=body(*LIST).ljust(private_catalog.BODY_BYTES))  # the largest body
    assert (answered.status_code, answered.headers["content-type"]) == (200, "application/json")
    assert found(answered.content) == ids(BOT3, FAQ1)
    assert client.get("/health").json() == {"status": "ok", "models": 2}


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "said"),
    [
        ("POST", PATH, body(condition("size", "1")), 400, "has no filter field 'size'"),
        ("POST", PATH, b"", 400, "EOF"),
        ("POST", PATH, b" " * 65_537, 413, "65536 bytes"),
        ("POST", PATH, b"[" * 10_000_000, 413, "65536 bytes"),
        ("GET", PATH, b"", 405, "Method Not Allowed"),
        ("PUT", PATH, body(), 405, "Method Not Allowed"),
        ("POST", "/health", b"", 405, "Method Not Allowed"),
        ("POST", PATH + "/more", body(), 404, "Not Found"),
        ("GET", "/", b"", 404, "Not Found"),
        ("POST", "/asset-gallery/v1.0/%6dodels%00", body(), 404, "Not Found"),
    ],
)
def test_refused(client: TestClient, method: str, path: str, sent: bytes, status: int, said: str) -> None:
    answered = client.request(method, path, content=sent)
    assert answered.status_code == status
    assert answered.headers["content-type"] == "application/json"
    error = answered.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert client.post(PATH, content=body(*LIST)).status_code == 200


def piece(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


MEGABYTE, BLANK, LAST = piece(b" " * 1_000_000), piece(b" "), piece(b" ", more=False)
BYTES = [piece(bytes([byte])) for byte in body(*LIST)]


@pytest.mark.parametrize(
    ("pieces", "length", "status", "left"),
    [
        pytest.param([*BYTES, LAST], None, 200, 0, id="in many pieces"),
        pytest.param([MEGABYTE] * 100, None, 413, 83, id="large without a length: read to a limit"),
        pytest.param([BLANK], b"100000000", 413, 1, id="huge with a length: not read at all"),
        pytest.param([BLANK], b"9" * 5000, 413, 1, id="a length of many digits"),
        *(
            pytest.param([LAST], length, 400, 0, id=f"length {length!r}")
            for length in (b"-1", b"x", b"", b"1e9", b"\xb2")
        ),
        pytest.param([BLANK], None, 408, 0, id="never ends"),
        pytest.param([BLANK, {"type": "http.disconnect"}], None, 400, 0, id="the client goes away"),
    ],
)
def test_bodies(
    monkeypatch: pytest.MonkeyPatch, pieces: list[dict[str, Any]], length: bytes | None, status: int, left: int
) -> None:
    monkeypatch.setattr(private_catalog, "BODY_TIMEOUT_S", 0.5)
    exchange = Exchange(pieces, [] if length is None else [(b"content-length", length)])
    asyncio.run(exchange.run(app(lambda: ENTRIES)))
    assert (exchange.status, len(exchange.left)) == (status, left)
    if status == 200:
        assert len(exchange.answered["value"]) == 2
    else:
        assert exchange.answered["error"]["type"] == "invalid_request_error"
    assert ((b"connection", b"close") in exchange.sent[0]["headers"]) == (status in (408, 413))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TrackingError("MLflow is down."), 503, "MLflow is down."),
        (ZeroDivisionError("secret"), 500, "The catalog failed; its log says how."),  # a mistake of our own
    ],
)
def test_a_registry_that_fails(error: Exception, status: int, said: str) -> None:
    with TestClient(app(Mock(side_effect=error)), raise_server_exceptions=False) as client:
        for answered in (client.post(PATH, content=body(*LIST)), client.get("/health")):
            assert (answered.status_code, answered.headers.get("retry-after") == "5") == (status, status == 503)
            assert answered.json() == {"error": {"message": said, "type": "server_error"}}
        assert client.get("/else").status_code == 404


TEXTS = st.text(max_size=10)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
WORDS = st.sampled_from(["models", "Versioned", "latest", "true", "cpu", BOT3.name, BOT2.name, "bot", ""])
FIELD, OPERATOR = st.sampled_from([*FIELDS]), st.sampled_from([*OPERATORS])
NAMES, SOME = st.sampled_from([*OPERATORS, "in", "EQ"]), st.lists(WORDS | TEXTS, max_size=2) | LEAVES
GOOD = st.fixed_dictionaries({"field": FIELD, "operator": OPERATOR, "values": st.lists(WORDS, max_size=3)})
NEAR = st.fixed_dictionaries({"field": FIELD | TEXTS, "operator": NAMES, "values": SOME})
KEYS = {"pageSize": st.integers(-2, 1100), "continuationToken": st.from_regex(r"[0-9]{1,12}", fullmatch=True)}
GOOD_BODIES = fuzzing.encoded(st.fixed_dictionaries({"filters": st.lists(GOOD, max_size=4)}, optional=KEYS))
NEAR_BODIES = st.fixed_dictionaries(
    {"filters": st.lists(GOOD | NEAR, max_size=3) | ANYTHING},
    optional={**{key: right | ANYTHING for key, right in KEYS.items()}, "skip": ANYTHING},
)
BODIES = GOOD_BODIES | fuzzing.encoded(NEAR_BODIES | ANYTHING) | fuzzing.cut(GOOD_BODIES) | st.binary(max_size=200)
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "FOO"])
PATHS = st.sampled_from([PATH, PATH + "/", "/health", "/"]) | TEXTS
HEADERS = st.sampled_from([b"content-type", b"content-length", b"content-encoding", b"expect", b"host", b"x-y"])


def test_nothing_that_is_sent_breaks_it(client: TestClient) -> None:
    statuses = Counter[int]()
    same = settings(derandomize=True, deadline=None)

    def send(sent: bytes, headers: Sequence[tuple[bytes, bytes]] = (), *where: str) -> Exchange:
        exchange = Exchange([piece(sent, more=False)], headers)
        loop.run(exchange.run(client.app, *where))
        return exchange

    @settings(same, max_examples=1000)
    @given(BODIES)
    def bodies(sent: bytes) -> None:
        exchange = send(sent)
        statuses[exchange.status] += 1
        if exchange.status == 200:
            names = {(one["properties"]["name"], one["properties"]["version"]) for one in exchange.answered["value"]}
            assert names <= set(ids(*ENTRIES))
        else:
            assert set(exchange.answered["error"]) == {"message", "type"}

    @settings(same, max_examples=150)
    @given(METHODS, PATHS, st.lists(st.tuples(HEADERS, st.binary(max_size=20)), max_size=3))
    def requests(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Methods, paths and headers that no client of ours sends."""
        assert send(b"{}", headers, method, path).status < 500

    with asyncio.Runner() as loop:
        bodies()
        requests()
    assert statuses.keys() == {200, 400}
    assert min(statuses.values()) > 100  # neither all nor nothing got through
    assert found(client.post(PATH, content=body(*LIST)).content) == ids(BOT3, FAQ1)
    assert client.get("/health").status_code == 200


def test_a_slow_registry_holds_nobody_else_up() -> None:
    together = threading.Barrier(2, timeout=10)  # breaks unless two requests read at the same time

    def slow() -> list[Entry]:
        together.wait()
        return ENTRIES

    with TestClient(app(slow)) as client, ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda _: client.post(PATH, content=body(*LIST)).status_code, range(2))
    assert list(answers) == [200, 200]
