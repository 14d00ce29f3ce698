"""New champions that fail, and a registry that is away. The processes are none."""

from __future__ import annotations

import asyncio

import pytest

from slmops.core.errors import PrerequisiteError, RegistrationError, UsageError
from slmops.serving import registry_watch
from slmops.serving.fleet import UnknownModel
from tests.fleets import BAD, DOWN, World, asked, fleet, installed, rounds, run, serving, until, version

# --- failures of a new version


@pytest.mark.parametrize("where", ["bad", "unstartable", "undeliverable"])
def test_a_version_at_fault_is_withdrawn_once(where: str) -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            error = RegistrationError("Foundry Local refuses it.") if where == "undeliverable" else BAD
            getattr(world, where)[2] = error
            world.now = version(2)
            await until(lambda: bool(world.withdrawn))
            await rounds(world)
            assert world.withdrawn == [(2, error.message)]
            assert world.installs == [1, 2]
            assert await asked(made) == 1
            assert world.running == [1]
            state = made.state()
            assert (state.version, state.switches, state.ready) == (1, 0, True)
            assert f"bot version 2 (int8) cannot be served, and its promotion is withdrawn: {error.message}" in (
                state.last_failure or ""
            )
            assert world.last == installed(1)
            # Promoted again it is tried again, though nobody wrote down when, and mended it is served.
            world.now = version(2)
            await until(lambda: len(world.withdrawn) == 2)
            getattr(world, where).clear()
            world.now = version(2, "second")
            await until(lambda: made.state().version == 2)

    run(test)


def test_a_version_that_stays_champion_is_not_tried_again() -> None:
    async def test(world: World) -> None:
        world.goes_back_to = None
        async with serving(world) as made:
            world.bad[2] = BAD
            world.now = version(2)
            await until(lambda: bool(world.withdrawn))
            await rounds(world)
            assert (world.installs, len(world.withdrawn)) == ([1, 2], 1)
            world.now = version(2, "second")
            await until(lambda: len(world.withdrawn) == 2)
            assert world.installs == [1, 2, 2]
            assert made.state().version == 1

    run(test)


@pytest.mark.parametrize(
    ("error", "times"), [(DOWN, 1), (UsageError("There is no such version."), 0), (KeyError("x"), 0)]
)
def test_a_withdrawal_that_does_not_get_through(error: Exception, times: int) -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            world.bad[2] = BAD
            world.unwithdrawable = error
            world.now = version(2)
            await until(lambda: world.installs == [1, 2])
            await until(lambda: made.state().last_failure is not None)
            await asyncio.sleep(0.1)
            assert made.state().registry.startswith("unreachable since" if times else "ok")
            world.unwithdrawable = None
            await rounds(world)
            assert len(world.withdrawn) == times
            assert world.installs == [1, 2]
            assert await asked(made) == 1

    run(test)


@pytest.mark.parametrize("error", [DOWN, PrerequisiteError("The disk is full."), OSError("broken pipe")])
@pytest.mark.parametrize("where", ["undeliverable", "unstartable"])
def test_what_does_not_get_here_is_tried_again(error: Exception, where: str) -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            getattr(world, where)[2] = error
            world.now = version(2)
            await until(lambda: world.installs == [1, 2, 2, 2])
            failure = made.state().last_failure or ""
            assert "bot version 2 (int8) is not here yet, next attempt in 0 s: " in failure
            assert str(error.args[0]) in failure
            assert await asked(made) == 1
            getattr(world, where).clear()
            await until(lambda: made.state().version == 2)

    world = run(test)
    assert world.withdrawn == []


def test_pauses_grow_and_another_champion_does_not_wait() -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            world.undeliverable[2] = DOWN
            world.now = version(2)
            await asyncio.sleep(0.5)
            # 0, 20, 60, 140, 300 ms: with pauses of the first length there would be 20 of them.
            assert 2 <= world.installs.count(2) <= 6
            made._watch._retry_at += 60
            world.now = version(3)
            await until(lambda: made.state().version == 3)

    run(test)


def test_pauses_do_not_grow_for_ever() -> None:
    said: list[str] = []

    async def test(world: World) -> None:
        made = registry_watch.RegistryWatch(world, fleet(world)._deploy, said.append, 2.0)
        for _ in range(1100):
            await made.failed(version(2), DOWN)

    run(test)
    assert "next attempt in 4 s: " in said[0]
    assert "next attempt in 300 s: " in said[-1]


# --- the registry is away, or gives what makes no sense


def test_a_registry_that_goes_away_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            world.down = DOWN
            await until(lambda: made.state().registry.startswith("unreachable since 20"))
            since = made.state().registry
            await rounds(world)
            assert (made.state().registry, made.state().ready) == (since, True)
            assert await asked(made) == 1
            assert made.state().last_failure is None
            world.down, world.now = None, version(2)
            await until(lambda: made.state().version == 2)
            assert made.state().registry == "ok"

    run(test)
    lost = [one for one in caplog.messages if one.startswith("the registry")]
    assert lost == [
        "the registry cannot be reached, what is served stays: MLflow at http://x does not answer.",
        "the registry answers again",
    ]


@pytest.mark.parametrize("error", [UsageError("Version 2 was not registered by slmops."), ValueError("no number")])
def test_an_answer_without_sense_does_not_end_the_watch(error: Exception) -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            world.down = error
            await until(lambda: str(error.args[0]) in (made.state().last_failure or ""))
            assert await asked(made) == 1
            world.down, world.now = None, version(2)
            await until(lambda: made.state().version == 2)

    run(test)


def test_nothing_promoted_any_more() -> None:
    async def test(world: World) -> None:
        async with serving(world) as made:
            world.now = None
            await until(lambda: "version 1 is still served" in (made.state().last_failure or ""))
            assert await asked(made) == 1

    run(test)


def test_a_registry_that_is_away_at_the_start() -> None:
    async def test(world: World) -> None:
        world.down, world.last = DOWN, installed(3)
        async with serving(world) as made:
            assert await asked(made) == 3
            assert made.state().registry.startswith("unreachable since")
            assert [row["id"] for row in made.models()] == ["bot", "bot:3"]
            with pytest.raises(UnknownModel):
                await asked(made, "bot:1")
            world.down, world.now = None, version(3)
            await until(lambda: made.state().registry == "ok")
            assert made.state().switches == 0
            assert await asked(made, "bot:2") == 2
        assert world.installs == [2]

    run(test)


def test_the_watch_and_the_fleet_agree_on_faults() -> None:
    assert [
        registry_watch.at_fault(error) for error in (BAD, RegistrationError("x"), DOWN, OSError(), UsageError("x"))
    ] == [
        True,
        True,
        False,
        False,
        False,
    ]
