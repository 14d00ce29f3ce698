"""New champions: those that fail, a registry that is away, and the watch over one that is served."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from slmops.core.errors import PrerequisiteError, RegistrationError, ServingError, UsageError
from slmops.core.settings import Settings
from slmops.core.values import Measurement
from slmops.foundry.versions import RELEASE
from slmops.serving import new_champion
from slmops.serving.fleet import Fleet
from slmops.serving.registry_watch import in_thread
from slmops.serving.requests import Refused
from tests.answering import answering
from tests.fleets import BAD, DOWN, World, asked, installed, promote, rounds, serving, until, version

pytestmark = pytest.mark.anyio
VERSION = version(7)
MEASURED = Measurement(value=1.0, unit="1", samples=20, low=0.8, high=1.0)


@pytest.mark.parametrize(
    ("where", "error"), [("bad", BAD), ("unstartable", BAD), ("undeliverable", RegistrationError("It is refused."))]
)
async def test_a_version_at_fault_is_withdrawn_once(world: World, made: Fleet, where: str, error: Any) -> None:
    getattr(world, where)[2] = error
    world.now = version(2)
    await until(lambda: bool(world.withdrawn))
    await rounds(world)
    assert (world.withdrawn, world.installs) == ([(2, error.message)], [1, 2])
    assert (await asked(made), world.running, world.last) == (1, [1], installed(1))
    assert (made.version, made.switches, made.ready) == (1, 0, True)
    said = f"bot version 2 (int8) cannot be served, and its promotion is withdrawn: {error.message}"
    assert (made.last_failure, world.told) == (said, [said])
    # Promoted again, it is tried again, even without a date of its promotion; once it works, it is served.
    world.now = version(2)
    await until(lambda: len(world.withdrawn) == 2)
    getattr(world, where).clear()
    await promote(world, made, 2, "second")


async def test_a_version_that_stays_champion_is_not_tried_again(world: World, made: Fleet) -> None:
    world.goes_back_to = None
    world.bad[2] = BAD
    for count, promoted in ((1, "first"), (2, "second")):
        world.now = version(2, promoted)
        await until(lambda count=count: len(world.withdrawn) == count)  # type: ignore[misc]
        await rounds(world)
        assert (world.installs, len(world.withdrawn), made.version) == ([1] + [2] * count, count, 1)


@pytest.mark.parametrize(
    ("error", "times"), [(DOWN, 1), (UsageError("There is no such version."), 0), (KeyError("x"), 0)]
)
async def test_a_withdrawal_that_does_not_get_through(world: World, made: Fleet, error: Exception, times: int) -> None:
    world.bad[2] = BAD
    world.unwithdrawable = error
    world.now = version(2)
    await until(lambda: made.last_failure != "")
    await asyncio.sleep(0.1)
    assert made.watch.reachable == (times == 0)
    world.unwithdrawable = None
    await rounds(world)
    assert (len(world.withdrawn), world.installs) == (times, [1, 2])
    assert await asked(made) == 1


@pytest.mark.parametrize("error", [DOWN, PrerequisiteError("full"), OSError("broken pipe"), UsageError("x")])
@pytest.mark.parametrize("where", ["undeliverable", "unstartable"])
async def test_what_does_not_get_here_is_tried_again(world: World, made: Fleet, error: Exception, where: str) -> None:
    getattr(world, where)[2] = error
    world.now = version(2)
    await until(lambda: world.installs == [1, 2, 2, 2])
    assert "bot version 2 (int8) is not here yet, next attempt in 0 s: " in made.last_failure
    assert str(error.args[0]) in made.last_failure
    assert await asked(made) == 1
    getattr(world, where).clear()
    await until(lambda: made.version == 2)
    assert world.withdrawn == []


async def test_pauses_grow_but_not_for_ever_and_another_champion_does_not_wait(world: World, made: Fleet) -> None:
    world.undeliverable[2] = DOWN
    world.now = version(2)
    await asyncio.sleep(0.5)
    # 0, 20, 60, 140, 300 ms: with pauses of the first length there would be 20 of them.
    assert 2 <= world.installs.count(2) <= 6
    for _ in range(1100):
        await made.watch.failed(version(2), DOWN)
    assert "next attempt in 300 s: " in made.last_failure
    await promote(world, made, 3)


async def test_a_registry_that_goes_away_and_comes_back(
    world: World, made: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    world.down = DOWN
    await until(lambda: not made.watch.reachable)
    await rounds(world)
    assert made.ready
    assert await asked(made) == 1
    assert not made.last_failure
    world.down = None
    await promote(world, made, 2)
    assert made.watch.reachable
    lost = [one for one in caplog.messages if one.startswith("the registry")]
    assert lost == [
        "the registry cannot be reached, what is served stays: MLflow at http://x does not answer.",
        "the registry answers again",
    ]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"down": UsageError("Version 2 was not registered by slmops.")}, "Version 2 was not registered by slmops."),
        ({"down": ValueError("no number")}, "no number"),
        ({"now": None}, "version 1 is still served"),
    ],
)
async def test_an_answer_without_sense_does_not_end_the_watch(
    world: World, made: Fleet, fault: dict[str, Any], said: str
) -> None:
    vars(world).update(fault)
    await until(lambda: said in made.last_failure)
    assert await asked(made) == 1
    world.down = None
    await promote(world, made, 2)


async def test_a_registry_that_is_away_at_the_start(world: World) -> None:
    world.down, world.last = DOWN, installed(3)
    async with serving(world) as made:
        assert await asked(made) == 3
        assert not made.watch.reachable
        assert [row["id"] for row in made.models()] == ["bot", "bot:3"]
        with pytest.raises(Refused, match="model_not_found"):
            await asked(made, "bot:1")
        world.down, world.now = None, version(3)
        await until(lambda: made.watch.reachable)
        assert made.switches == 0
        assert await asked(made, "bot:2") == 2
    assert world.installs == [2]


def test_a_thread_that_does_not_come_back_in_time_keeps_nobody() -> None:
    late, never, wrong = threading.Event(), threading.Event(), []
    mine = set(threading.enumerate())

    async def hang() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        for event in (late, never):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await in_thread(event.wait)
            assert [thread.daemon for thread in threading.enumerate() if thread not in mine] == [True]
            late.set()
            await asyncio.sleep(0.05)

    started = time.monotonic()
    asyncio.run(hang())
    assert time.monotonic() - started < 30
    never.set()  # it comes back to a loop that is closed
    assert wrong == []


class Service:
    """Answers "yes" as version 7, unless it is told otherwise."""

    def __init__(self) -> None:
        self.url = "http://127.0.0.1:9"
        self.asked: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.version = "7"
        self.statuses: dict[int, int] = {}  # of the request with this number
        self.answer: Any = "yes"
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
        said = {"content": self.answer} if isinstance(self.answer, str) else {"tool_calls": [{"function": self.answer}]}
        content = json.dumps({"choices": [{"message": said}]})
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


@pytest.mark.parametrize(("called", "right"), [('{"city": "Rome"}', 1.0), ("Rome", 0.0), (None, 0.0)])
def test_a_wrong_call_is_a_wrong_answer_and_no_failed_request(
    service: Service, tmp_path: Path, called: str | None, right: float
) -> None:
    expected, tool = {"name": "f", "arguments": {"city": "Rome"}}, {"type": "function", "function": {"name": "f"}}
    item = {"prompt": "?", "match": "tool_call", "expected": expected, "tools": [tool]}
    (tmp_path / "calls.jsonl").write_text(json.dumps(item))
    service.answer, service.statuses = {"name": "f", "arguments": called}, {0: 200 if called else 422}
    result = watch(service, tmp_path / "calls.jsonl", 0.5)
    assert (result.failed, result.accuracy.value, len(service.asked[0]["tools"])) == (0, right, 1)


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
        ({4: 500}, 3, 1),  # one failure in twenty is forgiven
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
    service.health = [9, 9]  # of the same release
    of_a_gpu = VERSION.model_copy(update={"tags": {**VERSION.tags, RELEASE: "8 9"}})
    assert new_champion.await_switch(service.url, VERSION, lambda: of_a_gpu) == 9
    monkeypatch.setattr(new_champion, "SWITCH_S", 0.1)
    service.health = [6]
    for champion, said in (
        (version(6), "version 7 .*version 6"),
        (None, "version 7 .*no champion"),
        (VERSION, "did not switch .*version 6"),
    ):
        with pytest.raises(ServingError, match=said):
            new_champion.await_switch(service.url, VERSION, lambda champion=champion: champion)  # type: ignore[misc]
