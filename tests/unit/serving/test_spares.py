"""Versions beside the champion. The processes are fakes."""

from __future__ import annotations

import asyncio

import pytest

from slmops.serving import spares
from slmops.serving.fleet import Fleet, UnknownModel
from slmops.serving.spares import Unavailable
from tests.fleets import BAD, World, asked, rounds, serving, until, version

pytestmark = pytest.mark.anyio


async def test_a_version_on_demand_and_the_oldest_makes_room(world: World) -> None:
    async with serving(world, spare=2) as made:
        assert [await asked(made, f"bot:{number}") for number in (2, 3, 2)] == [2, 3, 2]
        assert world.running == [1, 2, 3]
        assert await asked(made, "bot-int8-generic-cpu:4") == 4
        assert sorted(world.running) == [1, 2, 4]
        assert [one.installed.version for one in made.running] == [1, 2, 4]
        assert await asked(made, "bot:1") == 1
        assert made.switches == 0
    assert world.installs == [1, 2, 3, 4]


async def test_a_version_in_use_is_not_stopped_and_one_that_died_is_started_again(world: World, made: Fleet) -> None:
    async with made.lease("bot:2"):
        with pytest.raises(Unavailable, match="1 versions") as caught:
            await asked(made, "bot:3")
        assert caught.value.retry_after_s > 0
        assert world.running == [1, 2]
    for _ in range(2):
        assert await asked(made, "bot:3") == 3
        assert world.running == [1, 3]
        world.backends[-1].die()
        assert [one.installed.version for one in made.running] == [1]
    assert world.backends[-2].stopped


async def test_one_start_for_all_who_wait_and_none_for_who_left(world: World, made: Fleet) -> None:
    world.held[2] = asyncio.Event()
    waiting = [asyncio.create_task(asked(made, "bot:2")) for _ in range(5)]
    await until(lambda: world.installs == [1, 2])
    waiting[0].cancel()  # it started the process, and is not the only one who wants it
    other = asyncio.create_task(asked(made, "bot:3"))
    await asyncio.sleep(0.02)
    world.held[2].set()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert done[1:] == [2, 2, 2, 2]
    await asyncio.gather(other, return_exceptions=True)
    assert world.installs.count(2) == 1
    await until(lambda: all(one.in_flight == 0 for one in world.backends))


async def test_what_was_just_started_is_there_for_who_asked(world: World, made: Fleet) -> None:
    answers = await asyncio.gather(*(asked(made, f"bot:{number}") for number in (2, 3, 4, 5)), return_exceptions=True)
    for number, answer in enumerate(answers, 2):
        assert answer == number or isinstance(answer, Unavailable)
    assert 2 in answers
    assert len(world.running) == 2


async def test_a_version_that_fails_is_not_started_by_each_request(
    world: World, made: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "BROKEN_S", 0.2)
    world.bad[2] = BAD
    for _ in range(3):
        with pytest.raises(Unavailable, match="version 2") as caught:
            await asked(made, "bot:2")
        assert 0 < caught.value.retry_after_s <= 0.2
    assert (world.installs, world.running) == ([1, 2], [1])
    world.bad.clear()
    await asyncio.sleep(0.25)
    assert await asked(made, "bot:2") == 2
    assert world.withdrawn == []


async def test_a_version_beside_becomes_champion_without_a_second_process(world: World, made: Fleet) -> None:
    world.held[2] = asyncio.Event()
    waiting = asyncio.create_task(asked(made, "bot:2"))
    await until(lambda: world.installs == [1, 2])
    world.now = version(2)
    await until(lambda: world.installs == [1, 2, 2])
    world.held[2].set()
    assert await waiting == 2
    await until(lambda: (made.version, world.running) == (2, [2]))
    assert len(world.backends) == 2


async def test_unknown_models(world: World, made: Fleet) -> None:
    for model in ("", "bot:9", "bot:", "bot:x", "other", "bot:02", "bot@int8", "Bot", "x" * 10_000):
        with pytest.raises(UnknownModel) as caught:
            await asked(made, model)
        assert caught.value.fix == "Ask for one of bot, bot:5, bot:4, bot:3, bot:2, bot:1."
        assert len(caught.value.message) < 200
    assert world.installs == [1]


async def test_a_version_that_is_new_in_the_registry_is_found_soon(world: World, made: Fleet) -> None:
    await rounds(world)
    lists = world.asked["versions"]
    world.all = [version(6), *world.all]
    with pytest.raises(UnknownModel):
        await asked(made, "bot:6")
    await rounds(world)
    assert await asked(made, "bot:6") == 6
    assert world.asked["versions"] == lists + 1


async def test_the_champion_alone(world: World) -> None:
    async with serving(world, spare=0) as made:
        assert [row["id"] for row in made.models()] == ["bot", "bot:1"]
        with pytest.raises(UnknownModel):
            await asked(made, "bot:2")
        assert await asked(made, "bot:1") == 1
