"""The service with a real runtime behind it, in a process of its own, as clients see it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from tests.upstream import CHAT, RESPONSES

pytestmark = pytest.mark.integration

TOKEN = "secret"
CONTEXT = 2048
HI: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
EXAMPLES = 3000
SERVICE = """
import asyncio, logging, sys
from slmops.foundry.versions import Installed
from slmops.core import web
from slmops.serving import service
from slmops.serving.fleet import Fleet
from slmops.serving.limits import Serve
from slmops.core.settings import Settings
from tests import fleets

class Source(fleets.World):
    def install(self, wanted):
        return installed

logging.basicConfig(level=logging.INFO)
installed = Installed.model_validate_json(sys.argv[1])
source = Source(count=1)
source.settings = Settings(home=sys.argv[2])
options = Serve.model_validate_json(sys.argv[3])
listening = web.listen("127.0.0.1", 0)
token = source.settings.serve_token.get_secret_value()
asyncio.run(service.serve(Fleet(source, options), options, source.settings.home, listening, token))
"""


@dataclass
class Service:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    home: Path
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def client(self, token: str = TOKEN) -> openai.OpenAI:
        made = openai.OpenAI(base_url=self.url + "/v1", api_key=token, max_retries=0, timeout=30)
        self.clients.append(made)
        return made

    def worker(self) -> psutil.Process:
        """The runtime."""
        [one] = fleets.workers(self.process.pid)
        return one

    def answers(self) -> bool:
        answer = self.client().chat.completions.create(model="bot", messages=HI, max_tokens=2)
        return answer.usage is not None and answer.usage.completion_tokens > 0


@pytest.fixture(scope="module")
def installed(talkative: Path, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    variant = making.variant("fp32", making.job(talkative), stock)
    return fleets.place(variant, talkative, tmp_path_factory.mktemp("installed"))


def start(installed: Installed, home: Path, **options: Any) -> Service:
    home.mkdir()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, installed.model_dump_json(), str(home), json.dumps(options)],
            stderr=log,
            env={**os.environ, "SLMOPS_SERVE_TOKEN": TOKEN},
        )
    path = home / "serving.json"
    for _ in range(600):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert path.exists(), (home / "log").read_text()
    return Service(process, json.loads(path.read_text())["url"], home)


def stop(service: Service) -> None:
    """End it as the system does; nothing may be left."""
    for client in service.clients:
        client.close()
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0, (service.home / "log").read_text()
    assert not any(child.is_running() for child in children)
    assert not (service.home / "serving.json").exists()
    assert "Traceback" not in (service.home / "log").read_text()


@pytest.fixture(scope="module")
def service(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = start(installed, tmp_path_factory.mktemp("serving") / "home")
    yield one
    stop(one)


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return service.client()


def test_chat_completions(client: openai.OpenAI, installed: Installed) -> None:
    for model in ("bot", "bot:1", installed.foundry_id):
        asked = client.chat.completions.with_raw_response.create(model=model, messages=HI, max_tokens=8, temperature=0)
        answer = asked.parse()
        assert asked.headers["x-slmops-version"] == "1"
        assert answer.model == installed.foundry_id
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8


def test_without_a_temperature_the_answer_is_what_was_measured(client: openai.OpenAI) -> None:
    """The runtime's own service samples, whatever do_sample says."""
    asked: dict[str, Any] = {"model": "bot", "messages": HI, "max_tokens": 8}
    greedy = client.chat.completions.create(**asked, temperature=0).choices[0].message.content
    assert {client.chat.completions.create(**asked).choices[0].message.content for _ in range(3)} == {greedy}
    sampled = {client.chat.completions.create(**asked, temperature=1).choices[0].message.content for _ in range(3)}
    assert sampled != {greedy}  # of random weights no two are alike
    said = {"model": "bot", "input": "Hi", "max_output_tokens": 8}
    assert client.responses.create(**said).output_text == client.responses.create(**said, temperature=0).output_text


def test_chat_completions_piece_by_piece(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="bot", messages=HI, max_tokens=8, temperature=0)
    for usage in (False, True):
        pieces = list(
            client.chat.completions.create(
                model="bot",
                messages=HI,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": usage},
            )
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert [piece.usage == whole.usage for piece in pieces if piece.usage] == [True] * usage
        assert len(pieces) > 8


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="bot", input="Hi", max_output_tokens=8, temperature=0)
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens == 8
    events = list(client.responses.create(model="bot", input="Hi", max_output_tokens=8, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    [last] = [event for event in events if event.type in ("response.completed", "response.incomplete")]
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 8


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bot", "bot:1"]
    assert client.models.retrieve("bot").owned_by == "slmops"


def test_structured_outputs(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},  # random weights may like blanks best, and JSON has room for them
    }
    answer = client.chat.completions.create(
        model="bot",
        messages=HI,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"yes"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_a_limit_takes_the_room_that_is_left(client: openai.OpenAI, stream: bool) -> None:
    """The runtime itself refuses: it takes no limit for the whole context."""
    words: list[Any] = [{"role": "user", "content": "word " * 700}]
    if stream:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        usage = list(client.chat.completions.create(model="bot", messages=words, **options))[-1].usage
    else:
        usage = client.chat.completions.create(model="bot", messages=words).usage
    assert usage is not None
    assert usage.prompt_tokens > 700
    assert usage.completion_tokens <= CONTEXT - usage.prompt_tokens
    assert usage.total_tokens > CONTEXT / 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_clients_do_wrong_is_told_and_the_next_good_request_is_answered(service: Service, stream: bool) -> None:
    client = service.client()

    def ask(client: openai.OpenAI = client, model: str = "bot", content: str = "Hi", **more: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": content}]
        list(client.chat.completions.create(model=model, messages=messages, stream=stream, **more))

    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="nobody")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        ask(service.client("wrong"))
    with pytest.raises(openai.APIStatusError) as large:
        ask(content="a" * 1_000_000)
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError) as long:
        ask(content="word " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature must be in the range"):
        ask(temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tool calling"):
        ask(tools=[{"type": "function", "function": {"name": "f"}}])
    assert service.answers()


def test_bytes_that_are_not_http_do_no_harm(service: Service) -> None:
    worker = service.worker()
    host = b"host: 127.0.0.1\r\n"
    for sent in (
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n" + host + b"\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + host + b"content-length: -1\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + host + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + host + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"x: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"x: y\r\n" * 5000 + b"\r\n",
    ):
        with socket.create_connection(service.address, 10) as connection:
            try:
                connection.sendall(sent)
                answer = connection.recv(100)
            except ConnectionError:  # it was refused before it was read to its end
                continue
            assert answer[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 4"), (sent[:60], answer)
    assert service.worker() == worker
    assert service.answers()


@pytest.mark.timeout(600)
def test_no_input_gives_a_5xx_or_ends_anything(installed: Installed, tmp_path: Path) -> None:
    service = start(installed, tmp_path / "home", max_output_tokens=2, request_timeout_s=10)
    worker = service.worker()
    seen: Counter[int] = Counter()
    connections = {path: http.client.HTTPConnection(*service.address, timeout=20) for path in (CHAT, RESPONSES)}
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}

    def send(path: str, body: bytes) -> None:
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

    @hypothesis_settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
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
    stop(service)


def test_a_runtime_that_dies_is_an_error_at_worst_and_the_service_goes_on(service: Service) -> None:
    worker = service.worker()
    client = service.client()
    stream = client.chat.completions.create(model="bot", messages=HI, max_tokens=400, temperature=1, stream=True)
    next(iter(stream))
    os.kill(worker.pid, signal.SIGKILL)
    statuses = set()
    until = time.monotonic() + 30
    while 200 not in statuses and time.monotonic() < until:
        asked = client.chat.completions.with_raw_response
        try:
            statuses.add(asked.create(model="bot", messages=HI, max_tokens=2).status_code)
        except openai.InternalServerError as error:
            statuses.add(error.status_code)
        time.sleep(0.05)
    assert 200 in statuses
    assert statuses <= {200, 502, 503}
    assert service.worker() != worker
    metrics = httpx.get(service.url + "/metrics", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)
    assert "slmops_backend_restarts_total 1.0" in metrics.text
    assert "slmops_in_flight 0.0" in metrics.text
