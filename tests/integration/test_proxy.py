"""The service with a real runtime behind it, in a process of its own, as clients see it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings

from slmops.core.settings import Settings
from slmops.foundry.versions import Installed
from tests import fleets, fuzzing, making
from tests.served import ASKED, HI, TOKEN, Service, start, stop
from tests.upstream import CHAT, RESPONSES

pytestmark = pytest.mark.integration

CONTEXT = 2048
EXAMPLES = 3000


@pytest.fixture(scope="module")
def installed(talkative: Path, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    variant = making.variant("fp32", making.job(talkative), stock)
    return fleets.place(variant, talkative, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def service(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = start(installed, tmp_path_factory.mktemp("serving") / "home")
    yield one
    stop(one)


def test_chat_completions(service: Service, installed: Installed) -> None:
    for model in ("bot", "bot:1", installed.foundry_id):
        asked = service.client.chat.completions.with_raw_response.create(**{**ASKED, "model": model}, temperature=0)
        answer = asked.parse()
        assert (asked.headers["x-slmops-version"], answer.model) == ("1", installed.foundry_id)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens == 8
    for usage in (False, True):
        options: Any = {"stream": True, "stream_options": {"include_usage": usage}}
        pieces: Any = list(service.client.chat.completions.create(**ASKED, temperature=0, **options))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == answer.choices[0].message.content
        assert [piece.usage == answer.usage for piece in pieces if piece.usage] == [True] * usage
        assert len(pieces) > 8


def test_without_a_temperature_the_answer_is_what_was_measured(service: Service) -> None:
    """The runtime's own service samples, whatever do_sample says."""

    def answers(**more: Any) -> set[str]:
        return {service.client.chat.completions.create(**ASKED, **more).choices[0].message.content for _ in range(3)}

    greedy = answers()
    assert answers(temperature=0) == greedy
    assert len(greedy) == 1
    assert answers(temperature=1) != greedy  # of random weights no two are alike


def test_responses(service: Service) -> None:
    asked: dict[str, Any] = {"model": "bot", "input": "Hi", "max_output_tokens": 8}
    whole = service.client.responses.create(**asked)
    assert whole.output_text
    events = list(service.client.responses.create(**asked, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    [last] = [event for event in events if event.type in ("response.completed", "response.incomplete")]
    assert [one.usage.output_tokens for one in (whole, last.response)] == [8, 8]


def test_structured_outputs(service: Service) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    # Random weights may like blanks best, and JSON has room for them.
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = service.client.chat.completions.create(model="bot", messages=HI, max_tokens=100, response_format=form)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"yes"}


def test_an_answer_without_a_limit_takes_the_room_that_is_left(service: Service) -> None:
    """The runtime itself refuses: it takes no limit for the whole context."""
    asked: Any = {"model": "bot", "messages": [{"role": "user", "content": "word " * 700}]}
    whole = service.client.chat.completions.create(**asked)
    pieces: Any = service.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for usage in (whole.usage, list(pieces)[-1].usage):
        assert usage.prompt_tokens > 700
        assert usage.completion_tokens <= CONTEXT - usage.prompt_tokens
        assert usage.total_tokens > CONTEXT / 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_runtime_refuses_is_told_and_the_next_good_request_is_answered(service: Service, stream: bool) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for wrong, said in (
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "more than the model's context of 2048"),
        ({"temperature": -1}, "temperature must be in the range"),
        ({"tools": [tool]}, "tool calling"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            list(service.client.chat.completions.create(**{**ASKED, **wrong}, stream=stream))
    assert service.answers()


def test_bytes_that_are_not_http_do_no_harm(service: Service) -> None:
    worker = service.worker()
    post, health, host = f"POST {CHAT} HTTP/1.1", "GET /health HTTP/1.1", "host: 127.0.0.1"
    for lines in (
        ("\x00" * 100,),
        ("GET",),
        ("GET / HTTP/9.9", host),
        (health,),  # no host
        (health, "host: evil.example"),
        (post, host, "content-length: -1"),
        (post, host, "content-length: 5", "content-length: 6", "", "abcdef"),
        (post, host, "transfer-encoding: chunked", "", "zz"),
        ("GET /" + "a" * 100_000 + " HTTP/1.1", host),
        (health, host, "x: " + "y" * 100_000),
        (health, host, *["x: y"] * 5000),
    ):
        with socket.create_connection(service.address, 10) as connection:
            try:
                connection.sendall("\r\n".join((*lines, "", "")).encode())
                answer = connection.recv(100)
            except ConnectionError:  # it was refused before it was read to its end
                continue
            assert answer[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 4"), (lines[0][:60], answer)
    assert service.worker() == worker
    assert service.answers()


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of a body as large as it was meant to be
def test_no_input_gives_a_5xx_or_ends_anything(
    installed: Installed, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    service = start(installed, tmp_path / "home", max_output_tokens=2, request_timeout_s=10)
    request.addfinalizer(lambda: stop(service))  # also if it fails: a process that is left would fail another test
    worker = service.worker()
    seen: Counter[int] = Counter()
    connections = {path: http.client.HTTPConnection(*service.address, timeout=60) for path in (CHAT, RESPONSES)}
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}

    def send(path: str, body: bytes) -> None:
        try:
            connections[path].request("POST", path, body, headers)
            answer = connections[path].getresponse()
        except (BrokenPipeError, ConnectionResetError):  # it waited for the other too long, and the service hung up
            connections[path].close()
            connections[path].request("POST", path, body, headers)
            answer = connections[path].getresponse()
        said = answer.read()
        seen[answer.status] += 1
        assert answer.status in (200, 400, 404, 413), said
        if answer.status != 200:
            assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
        elif "event-stream" in (answer.getheader("content-type") or ""):
            assert not any(mark in said for mark in (b"event: response.failed", b'data: {"error"')), said
        else:
            assert "usage" in json.loads(said)

    unlimited: Any = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @hypothesis_settings(max_examples=EXAMPLES, derandomize=True, phases=[Phase.generate], **unlimited)
    @given(fuzzing.requests())
    def fuzz(body: bytes) -> None:
        # Both endpoints, at the same time.
        for done in [both.submit(send, path, body) for path in connections]:
            done.result()

    with ThreadPoolExecutor(2) as both, contextlib.ExitStack() as stack:
        for connection in connections.values():
            stack.callback(connection.close)
        fuzz()
    assert seen.total() >= 2 * EXAMPLES * 0.9  # hypothesis counts the odd example that it discards
    assert seen[200] > seen.total() / 20  # it is no use if everything is refused at the door
    assert seen[400] > seen.total() / 4
    assert service.worker() == worker
    assert service.answers()


def test_a_runtime_that_dies_is_an_error_at_worst_and_the_service_goes_on(service: Service) -> None:
    worker = service.worker()
    stream = service.client.chat.completions.create(**{**ASKED, "max_tokens": 400}, temperature=1, stream=True)
    next(iter(stream))
    os.kill(worker.pid, signal.SIGKILL)
    statuses = set()
    until = time.monotonic() + 30
    token = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=service.url, headers=token, timeout=30, trust_env=False) as client:
        while 200 not in statuses and time.monotonic() < until:
            statuses.add(client.post(CHAT, json=ASKED).status_code)
            time.sleep(0.05)
        metrics = client.get("/metrics").text
    assert 200 in statuses
    assert statuses <= {200, 502, 503}
    assert service.worker() != worker
    assert "slmops_backend_restarts_total 1.0" in metrics
    assert "slmops_in_flight 0.0" in metrics


def test_a_killed_service_takes_its_runtime_along_and_the_next_one_cleans_up(
    installed: Installed, tmp_path: Path
) -> None:
    killed = start(installed, tmp_path / "home")
    worker = killed.worker()
    killed.client.close()
    killed.process.kill()
    killed.process.wait()
    for _ in range(100):
        ended = not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        if not ended:
            time.sleep(0.05)
    assert ended
    scratch = tmp_path / "home" / "deployed" / "serving" / "bot"
    [left] = scratch.iterdir()
    again = start(installed, tmp_path / "home")
    assert not left.exists()
    stop(again)
    assert list(scratch.iterdir()) == []
