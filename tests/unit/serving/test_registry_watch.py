"""New champions that fail, and a registry that is away. The processes are fakes."""

import asyncio
import threading
import time
from typing import Any

import pytest

from slmops.core.errors import PrerequisiteError, RegistrationError, UsageError
from slmops.serving.fleet import Fleet
from slmops.serving.registry_watch import in_thread
from slmops.serving.requests import Refused
from tests.fleets import BAD, DOWN, World, asked, installed, promote, rounds, serving, until, version

pytestmark = pytest.mark.anyio


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
    assert made.last_failure == said
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
