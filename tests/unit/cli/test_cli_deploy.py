"""The commands that deploy, as a table of arguments, exit code and what the user is told. Nothing is started."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.cli import command as cli
from slmops.cli import flows as cli_flows
from slmops.delivery import pull
from slmops.foundry.versions import Installed
from slmops.local import stack
from slmops.serving import service
from slmops.tracking.registry import Registry
from tests import values


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLMOPS_TRACKING_URI", "http://registry")
    monkeypatch.chdir(tmp_path)  # no .env of a developer's
    logger = logging.getLogger("slmops")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers[:], level = before
    logger.setLevel(level)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the flows and services were asked."""
    calls: list[Any] = []

    def note(*arguments: Any, **options: Any) -> int:
        calls.append((*arguments, options))
        return 0

    for module, function in ((cli_flows, "promote"), (cli_flows, "rollback"), (service, "run")):
        monkeypatch.setattr(module, function, note)
    return calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bot"], {}),
        (["bot", "--precision", "int8"], {"precision": "int8"}),
        (["bot", "--version", "3", "--force", "the old one is wrong"], {"version": 3, "force": "the old one is wrong"}),
        (["bot", "--approval", "--approval-timeout-s", "60"], {"approval": True, "approval_timeout_s": 60}),
    ],
)
def test_promote(asked: list[Any], arguments: list[str], expected: dict[str, Any]) -> None:
    assert cli._main(["promote", *arguments, "--json"]) == 0
    [(request, options)] = asked
    assert request.model_dump(exclude_defaults=True) == {"name": "bot", **expected}
    assert options == {"json": True}


def test_rollback_and_serve(asked: list[Any]) -> None:
    assert cli._main(["rollback", "bot"]) == 0
    assert cli._main(["serve", "bot", "--port", "9000", "--concurrency", "4"]) == 0
    (name, options), (served, limits, _, uri, _) = asked
    assert (name, options) == ("bot", {"json": False})
    assert (served, limits.host, limits.port, uri) == ("bot", "127.0.0.1", 9000, "http://registry")


WRONG = [
    (["promote"], "requires an argument"),
    (["promote", "../bot"], "--name may only have letters"),
    (["promote", "bot", "--force"], "--force requires an argument"),
    (["promote", "bot", "--force", " "], "--force must have at least 3 characters"),
    (["promote", "bot", "--version", "0"], "--version must be at least 1"),
    (["rollback", "a/b"], "'a/b' is no model name"),
    (["serve", "../../etc"], "'../../etc' is no model name"),
    (["serve", "bot", "--port", "70000"], "--port must be at most 65535"),
    (["serve", "bot", "--host", "0.0.0.0"], "SLMOPS_SERVE_TOKEN"),  # noqa: S104 - it is refused
    (["pull", "bot@"], "'bot@' names no model"),
    (["pull", "a b"], "'a b' names no model"),
    (["status", "a/b"], "'a/b' is no model name"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli._main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, said in err) == ("", True), err


def test_pull_says_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = Installed(name="bot", version=3, variant="int8", foundry_id="bot-int8-generic-cpu:3", folder=Path("/there"))
    asked: list[Any] = []

    def fetch(name: str, which: str | None, _: Any, uri: str) -> Installed:
        asked.append((name, which, uri))
        return done

    monkeypatch.setattr(pull, "pull", fetch)
    assert cli._main(["pull", "bot@int8", "--from", "http://elsewhere"]) == 0
    assert cli._main(["pull", "bot"]) == 0
    assert asked == [("bot", "int8", "http://elsewhere"), ("bot", None, "http://registry")]
    assert capsys.readouterr().out.splitlines()[:2] == ["bot-int8-generic-cpu:3", "/there"]
    assert cli._main(["pull", "bot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 3


def test_status_of_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tags = {"slmops.gates": "passed 3 of 4", "slmops.withdrawn": "it answers nothing"}
    version = values.model_version(3, aliases=("champion", "int8"), size_mb=158.02, tags=tags)
    found = {"bot": [version]}
    monkeypatch.setattr(Registry, "versions", lambda _, name: found.get(name, []))
    monkeypatch.setattr(Registry, "models", lambda _: list(found))
    assert cli._main(["status", "bot"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == [
        *["3", "int8", "158.0", "passed", "3", "of", "4", "2026-01-02", "00:00", "champion"],
        *["withdrawn:", "it", "answers", "nothing"],
    ]
    assert cli._main(["status", "bot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"][0]["version"] == 3
    assert cli._main(["status", "boat"]) == 2
    assert "Known models: bot." in capsys.readouterr().err


def test_serve_starts_without_a_registry(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLMOPS_TRACKING_URI")
    monkeypatch.setattr(stack, "_read", lambda _: {})
    assert cli._main(["serve", "bot"]) == 0
    assert asked[0][3] == "http://127.0.0.1:5000"
