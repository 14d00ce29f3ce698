"""``slmops catalog`` as it is run, and the contract with Foundry's real SDK, which is documented nowhere."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.checkpoints import chat_template
from slmops.core.settings import Settings
from slmops.delivery import catalog
from slmops.foundry import layout, prompt_template
from slmops.foundry.private_catalog import FIELDS, OPERATORS, PATH, Query
from tests import making
from tests.application import Application
from tests.catalogs import LIST, FakeRegistry, Server, body, entry, version

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


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    return process.returncode, said


def test_served_from_the_registry_until_it_is_stopped(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tracked import Book, Made

    monkeypatch.chdir(tmp_path)
    for name in ("bot", "other"):  # which has no champion
        Book(database, name, tmp_path).add(Made(tmp_path / name, "int8"), promote=name == "bot")
    with serving(database, "localhost") as (process, url, lines):
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


# --- what the SDK asks for and makes of the answers

NAME = "tiny-fp32-generic-cpu"
FIRST, SECOND, THIRD = (f"{NAME}:{number}" for number in (1, 2, 3))


Story = dict[str, Any]


@pytest.fixture(scope="module")
def story(talkative: Path, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """What an application saw that did all that it can do with a catalog, and what it sent; nothing is judged yet.

    Its model cache holds a variant as three versions.
    """
    variant = making.variant("fp32", making.job(talkative), stock)
    strings = prompt_template.derive(chat_template.load(variant.path))
    home = tmp_path_factory.mktemp("home")
    for top_p in (None, 0.5, 0.6):  # which changes no greedy answer
        layout.place(variant, "tiny", making.job(talkative, top_p=top_p), strings, home)
    saw: Story = {}
    with Server() as server:
        server.entries = [entry("tiny-fp32", 1), *(entry(f"m{n}-int4", 1) for n in range(60))]
        with Application(home, server.url) as application:
            saw["list"] = application("list")
            saw["model"] = application("model", "tiny")
            saw["load"] = application("load", FIRST)
            saw["ask"] = application("answer", FIRST, 8)
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
        return {**saw, "bodies": server.bodies}


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
    for kept in story["bodies"]:
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
    assert story["list"] == sorted([["tiny", FIRST, True], *others])
    assert story["model"] == ["tiny", FIRST, True]
    assert story["other tags"] == []


def test_a_model_of_the_catalog_is_loaded_and_served_and_a_later_version_is_found_by_its_id(story: Story) -> None:
    assert story["load"] is None
    assert story["chat"]["choices"][0]["message"]["content"].strip()
    assert story["chat"]["model"] == FIRST
    # And opened by a chat session.
    assert story["ask"]["text"] == story["chat"]["choices"][0]["message"]["content"]
    assert story["not yet"] is None  # though its files are there
    assert story["later"] == ["tiny", SECOND, True]
    assert story["load later"] is None
    answers = [story[name]["choices"][0]["message"]["content"] for name in ("chat", "chat later", "chat still")]
    assert len(set(answers)) == 1
    assert story["versions"] == story["versions of a name"] == [FIRST, SECOND]


def test_the_alias_is_the_champion_after_a_promotion_and_after_a_rollback(story: Story) -> None:
    assert story["promoted"] == ["tiny", SECOND, True]
    assert story["list promoted"] == [["tiny", FIRST, True], ["tiny", SECOND, True]]
    assert story["rolled back"] == ["tiny", SECOND, True]
    assert story["list rolled back"] == [["tiny", SECOND, True], ["tiny.previous", THIRD, True]]


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
