"""Watching a service after a switch, against an HTTP server that can be told how to misbehave."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from slmops.core.errors import ServingError
from slmops.core.settings import Settings
from slmops.core.values import Measurement
from slmops.serving import new_champion
from tests.answering import answering
from tests.values import model_version

VERSION = model_version(7)
MEASURED = Measurement(value=1.0, unit="1", samples=20, low=0.8, high=1.0)


class Service:
    """Answers "yes" as version 7, unless it is told otherwise."""

    def __init__(self) -> None:
        self.url = "http://127.0.0.1:9"
        self.asked: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.version = "7"
        self.statuses: dict[int, int] = {}  # of the request with this number
        self.answer = "yes"
        self.health: list[int | None] = [7]
        self.errors_of_others = 0

    def respond(self, request: Any, body: Any) -> tuple[int, str]:
        if request.path == "/health":
            version = self.health.pop(0) if len(self.health) > 1 else self.health[0]
            return 200 if version else 503, json.dumps({"version": version})
        if request.path == "/metrics":
            broken = sum(status >= 500 for status in self.statuses.values()) + self.errors_of_others
            row = f'slmops_requests_total{{endpoint="x",status="500",version="7"}} {broken if self.asked else 0}\n'
            return 200, f"# TYPE slmops_requests counter\n{row}"
        self.asked.append(body)
        self.tokens.add(request.headers["authorization"])
        content = json.dumps({"choices": [{"message": {"content": self.answer}}]})
        return self.statuses.get(len(self.asked) - 1, 200), content


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    with answering(made.respond, lambda: {"x-slmops-version": made.version}) as made.url:
        yield made


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Q{n}?", "expected": "yes"}) + "\n" for n in range(20)))
    return path


def watch(service: Service, questions: Path, seconds: float = 1, **settings: Any) -> new_champion.Probation:
    made = Settings(home=questions.parent, **settings)
    return new_champion.watch(service.url, VERSION, questions, None, MEASURED, seconds, made)


def test_a_version_that_answers_as_measured_holds(service: Service, questions: Path) -> None:
    result = watch(service, questions, 2, serve_token=SecretStr("geheim"))
    assert result.held
    assert (result.requests, result.failed, result.accuracy.value) == (20, 0, 1.0)
    assert service.tokens == {"Bearer geheim"}
    assert {(body["model"], body["temperature"]) for body in service.asked} == {("bot", 0)}
    assert service.asked[3]["messages"] == [{"role": "user", "content": "Q3?"}]
    assert "accuracy 1.00 where 1.00 was measured" in result.detail


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"answer": "no"}, "its answers are worse than measured (95 % interval up to 0."),
        ({"version": "6"}, "requests fail: version 6 answered"),
        ({"errors_of_others": 3}, "3 requests of other clients failed"),
        ({"statuses": dict.fromkeys(range(20), 500)}, "3 failed; requests fail: status 500"),
        ({"url": "http://127.0.0.1:9"}, "ConnectError"),
    ],
)
def test_what_speaks_against_it(service: Service, questions: Path, wrong: dict[str, Any], said: str) -> None:
    vars(service).update(wrong)
    result = watch(service, questions)
    assert not result.held
    assert said in result.detail
    assert (result.accuracy is None) == (result.failed == 3)


@pytest.mark.parametrize(
    ("statuses", "seconds", "failed"),
    [
        ({4: 500}, 1, 1),  # one failure in twenty is forgiven
        ({4: 500, 9: 500}, 1, 2),
        ({2: 429, 5: 503}, 3, 0),  # a busy service is asked again
        ({}, 0, 0),
    ],
)
def test_what_fails_is_counted(
    service: Service, questions: Path, statuses: dict[int, int], seconds: int, failed: int
) -> None:
    service.statuses = statuses
    result = watch(service, questions, seconds)
    assert (result.held, result.failed) == (failed < 2, failed)
    assert seconds or result.requests <= 1  # no more is asked than there is time for


def test_a_switch_is_waited_for_and_told_if_it_does_not_come(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.health = [None, 6, 7]
    new_champion.await_switch(service.url, VERSION, lambda: VERSION)
    assert service.health == [7]
    monkeypatch.setattr(new_champion, "SWITCH_S", 0.1)
    service.health = [6]
    for champion, said in (
        (model_version(6), "version 7 .*version 6"),
        (None, "version 7 .*no champion"),
        (VERSION, "did not switch .*version 6"),
    ):
        with pytest.raises(ServingError, match=said):
            new_champion.await_switch(service.url, VERSION, lambda champion=champion: champion)  # type: ignore[misc]
