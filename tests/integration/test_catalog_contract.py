"""The contract with Foundry's real SDK, which is documented nowhere, and what else comes over the network."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.checkpoints import chat_template
from slmops.core.files import link_or_copy
from slmops.core.settings import Settings
from slmops.delivery import catalog
from slmops.foundry import layout, prompt_template
from slmops.foundry.private_catalog import FIELDS, OPERATORS, PATH, Query
from tests import making
from tests.catalogs import LIST, FakeRegistry, Server, body, entry, version

pytestmark = pytest.mark.integration

# An application that does what it is told, line by line, and says what came of it.
APPLICATION = """
import json, sys
import foundry_local_sdk as sdk

home, url, override = sys.argv[1:]
manager = sdk.FoundryLocalManager(
    sdk.Configuration(
        app_name="application",
        app_data_dir=f"{home}/application",
        model_cache_dir=f"{home}/models",
        catalog_urls=[(url, override or None)],
        disable_nonessential_telemetry=True,
        web=sdk.Configuration.WebService(urls="http://127.0.0.1:0"),
    )
)
catalog = manager.get_catalog()
show = lambda model: model and [model.alias, model.id, model.is_cached]

def serve():
    manager.start_web_service()
    return manager.urls

def ask(foundry_id):
    request = sdk.Request()
    request.add_item(sdk.MessageItem.user("What is the capital of France?"))
    with sdk.ChatSession(catalog.get_model_variant(foundry_id)) as session:
        session.set_options(sdk.RequestOptions(search=sdk.SearchOptions(max_output_tokens=8, do_sample=False)))
        with session.process_request(request) as response:
            return response.get_item(0).get_simple_text()

commands = {
    "list": lambda: sorted(show(variant) for model in catalog.list_models() for variant in model.variants),
    "model": lambda alias: show(catalog.get_model(alias)),
    "variant": lambda foundry_id: show(catalog.get_model_variant(foundry_id)),
    "versions": lambda alias, name: sorted(model.id for model in catalog.get_model_versions(alias, name)),
    "load": lambda foundry_id: catalog.get_model_variant(foundry_id).load(),
    "ask": ask,
    "serve": serve,
}
for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        answer = commands[command](*arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print("ANSWER " + json.dumps(answer), flush=True)
"""


class Application:
    """A process with the real SDK and our catalog."""

    def __init__(self, home: Path, url: str, override: str = "") -> None:
        argv = [sys.executable, "-c", APPLICATION, str(home), url, override]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Application:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def __call__(self, *command: str | None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        return "the application died"


NAME = "tiny-fp32-generic-cpu"
FIRST, SECOND, THIRD = (f"{NAME}:{number}" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def home(talkative: Path, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache with a variant as three versions."""
    job = making.job(talkative)
    variant = making.variant("fp32", job, stock)
    template = chat_template.load(variant.path)
    assert template is not None
    home = tmp_path_factory.mktemp("home")
    first, _, _ = layout.place(variant, "tiny", job, prompt_template.derive(template), home)
    for number in (2, 3):
        folder = first.with_name(f"{NAME}-{number}")
        folder.mkdir()
        for file in first.iterdir():
            if file.name != layout.INFERENCE_MODEL:
                link_or_copy(file, folder / file.name)
        described = json.loads((first / layout.INFERENCE_MODEL).read_text(encoding="utf-8"))
        described.update(Name=f"{NAME}:{number}", Version=str(number))
        (folder / layout.INFERENCE_MODEL).write_text(json.dumps(described), encoding="utf-8")
    return home


@dataclass
class Story:
    """What an application saw, and what it asked."""

    saw: dict[str, Any] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(home: Path) -> Story:
    """All that an application can do with a catalog; nothing is judged yet, whatever fails."""
    saw: dict[str, Any] = {}
    with Server() as server:
        server.entries = [entry("tiny-fp32", 1), *(entry(f"m{n}-int4", 1) for n in range(60))]
        with Application(home, server.url) as application:
            saw["list"] = application("list")
            saw["model"] = application("model", "tiny")
            saw["load"] = application("load", FIRST)
            saw["ask"] = application("ask", FIRST)
            urls = application("serve")
            saw["chat"] = chat(urls, FIRST)
            saw["not yet"] = application("variant", SECOND)
            server.entries = [entry("tiny-fp32", 2), entry("tiny-fp32", 1, latest=False)]
            saw["later"] = application("variant", SECOND)
            saw["load later"] = application("load", SECOND)
            saw["chat later"] = chat(urls, SECOND)
            saw["chat still"] = chat(urls, FIRST)
            saw["versions"] = application("versions", "tiny", None)
            saw["versions of a name"] = application("versions", "tiny", NAME)
        with Application(home, server.url) as application:
            saw["promoted"] = application("model", "tiny")
            saw["list promoted"] = application("list")
        server.entries = catalog.entries(FakeRegistry(tiny=(version(2), version(3))))
        with Application(home, server.url) as application:
            saw["rolled back"] = application("model", "tiny")
            saw["list rolled back"] = application("list")
        with Application(home, server.url, "foundryLocal=test") as application:
            saw["other tags"] = application("list")
        return Story(saw, server.bodies)


def chat(urls: Any, foundry_id: str) -> Any:
    """What Foundry's web service answers to an OpenAI client."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": foundry_id, "messages": messages, "max_tokens": 8, "temperature": 0}
    try:
        answered = httpx.post(f"{urls[0]}/v1/chat/completions", json=body, timeout=60)
    except httpx.HTTPError as error:
        return repr(error)
    return answered.json()


def test_the_sdk_asks_for_nothing_that_the_catalog_does_not_know(story: Story) -> None:
    known = {(name, operator) for name in FIELDS for operator in OPERATORS}
    keys = {field.alias or name for name, field in Query.model_fields.items()}
    sent, more = set(), set()
    for kept in story.bodies:
        request = json.loads(kept)
        more |= set(request)
        sent |= {(one.get("field"), one.get("operator")) for one in request["filters"]}
    assert sent - known == set(), f"the SDK now sends the filters {sorted(sent - known)}: teach private_catalog"
    assert more - keys == set(), f"the SDK now sends the keys {sorted(more - keys)}: teach private_catalog"
    # And all that private_catalog knows has a reason.
    assert {name for name, _ in sent} == set(FIELDS)
    assert {operator for _, operator in sent} == set(OPERATORS)
    assert more == keys


def test_the_sdk_lists_what_the_catalog_offers(story: Story) -> None:
    others = [[f"m{n}", f"m{n}-int4-generic-cpu:1", False] for n in range(60)]  # two pages, and nothing on this device
    assert story.saw["list"] == sorted([["tiny", FIRST, True], *others])
    assert story.saw["model"] == ["tiny", FIRST, True]
    assert story.saw["other tags"] == []


def test_a_model_of_the_catalog_is_loaded_and_served(story: Story) -> None:
    assert story.saw["load"] is None
    assert story.saw["chat"]["choices"][0]["message"]["content"].strip()
    assert story.saw["chat"]["model"] == FIRST


def test_a_model_of_the_catalog_is_opened_by_a_chat_session_and_answers(story: Story) -> None:
    assert story.saw["ask"] == story.saw["chat"]["choices"][0]["message"]["content"]


def test_a_version_that_comes_later_is_found_by_its_id(story: Story) -> None:
    assert story.saw["not yet"] is None  # though its files are there
    assert story.saw["later"] == ["tiny", SECOND, True]
    assert story.saw["load later"] is None
    answers = [story.saw[name]["choices"][0]["message"]["content"] for name in ("chat", "chat later", "chat still")]
    assert len(set(answers)) == 1
    assert story.saw["versions"] == story.saw["versions of a name"] == [FIRST, SECOND]


def test_the_alias_is_the_champion_after_a_promotion_and_after_a_rollback(story: Story) -> None:
    assert story.saw["promoted"] == ["tiny", SECOND, True]
    assert story.saw["list promoted"] == [["tiny", FIRST, True], ["tiny", SECOND, True]]
    assert story.saw["rolled back"] == ["tiny", SECOND, True]
    assert story.saw["list rolled back"] == [["tiny", SECOND, True], ["tiny.previous", THIRD, True]]


# --- what comes over the network


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"[" * 60_000, 400), (bytes(range(256)) * 100, 400), (b"x" * 70_000, 413), (b'{"a":' * 2_000_000, 413)],
)
def test_bad_bodies_are_answered_and_then_good_ones(sent: bytes, status: int) -> None:
    """To a client that sends all before it listens, as many do."""
    with Server() as server:
        server.entries = [entry("tiny-fp32", 1)]
        at = httpx.URL(server.url)
        for _ in range(3):
            with contextlib.closing(http.client.HTTPConnection(at.host, at.port, timeout=30)) as connection:
                connection.request("POST", at.path, sent)
                assert connection.getresponse().status == status
        assert len(httpx.post(server.url, content=body(*LIST)).json()["value"]) == 1


def test_clients_that_hang_up_or_say_nothing_hold_nobody_up() -> None:
    async def knock(server: Server) -> int:
        at = httpx.URL(server.url)
        writers = []
        for number in range(50):
            _, writer = await asyncio.open_connection(at.host, at.port)
            writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{" % PATH.encode())
            await writer.drain()
            if number % 2:
                writer.transport.abort()
            else:
                writers.append(writer)
        async with httpx.AsyncClient() as client:
            status = (await client.post(server.url, content=body(*LIST), timeout=5)).status_code
        for writer in writers:
            writer.close()
        return status

    with Server() as server:
        assert asyncio.run(knock(server)) == 200
