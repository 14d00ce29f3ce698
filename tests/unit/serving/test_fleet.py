"""Who serves what: the champion, its successors, versions beside it, processes that die. The processes are fakes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.core.errors import PrerequisiteError, RegistrationError, ServingError, TrackingError, UsageError
from slmops.core.settings import Settings
from slmops.delivery import pull
from slmops.foundry.versions import RELEASE, ModelVersion
from slmops.serving import fleet as module
from slmops.serving.fleet import Fleet
from slmops.serving.registry_watch import VersionSource
from slmops.serving.requests import Refused
from tests import fleets, values
from tests.fleets import BAD, DOWN, World, asked, fleet, installed, promote, rounds, serving, until, version

pytestmark = pytest.mark.anyio


async def test_the_champion_is_served_and_written_down_and_who_leaves_is_not_counted(world: World, made: Fleet) -> None:
    assert [await asked(made, name) for name in ("bot", "bot:1", "bot-int8-generic-cpu:1")] == [1, 1, 1]
    assert world.last == installed(1)
    assert (made.version, made.ready, made.watch.reachable) == (1, True, True)
    assert (made.last_failure, made.switches, made.restarts) == ("", 0, 0)
    assert made.running == [made.champion]
    rows = made.models()
    assert [row["id"] for row in rows] == ["bot", *(f"bot:{number}" for number in (5, 4, 3, 2, 1))]
    created = int(version(1).created.timestamp())
    assert {(row["object"], row["owned_by"], row["created"]) for row in rows} == {("model", "slmops", created)}
    assert (world.installs, world.withdrawn) == ([1], [])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), made.lease("bot"):
            await asyncio.sleep(60)
    assert world.backends[0].in_flight == 0


async def test_the_old_one_answers_until_the_new_one_is_ready_and_ends_what_it_began(world: World, made: Fleet) -> None:
    old = world.backends[0]
    world.held[2] = asyncio.Event()
    world.now = version(2)
    await until(lambda: world.installs == [1, 2])
    assert await asked(made) == 1
    async with made.lease("bot") as held:
        world.held[2].set()
        await until(lambda: made.version == 2)
        assert await asked(made) == 2
        await asyncio.sleep(0.2)
        assert held is old
        assert old.alive
        assert [(one.installed.version, one.in_flight) for one in made.running] == [(2, 0), (1, 1)]
        assert made.switches == 1
    await until(lambda: old.stopped)
    assert (world.last, [one.installed.version for one in made.running]) == (installed(2), [2])
    assert not made.last_failure
    world.unwritable = PrerequisiteError("The disk is full.")
    await promote(world, made, 3)
    await until(lambda: "could not be written down: The disk is full." in made.last_failure)
    assert await asked(made) == 3


async def test_of_a_release_that_is_served_which_is_for_this_device(world: World, made: Fleet) -> None:
    world.now = version(2).model_copy(update={"tags": {"slmops.promoted": "now", RELEASE: "3"}})
    await until(lambda: made.version == 3)
    await asyncio.sleep(0.1)
    assert (await asked(made), made.switches, world.withdrawn) == (3, 1, [])


def test_a_device_with_a_gpu_serves_what_is_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = values.model_version(1, tags={"slmops.promoted": "today", RELEASE: "2 3"})
    release = [
        first,
        *(values.model_version(n, variant=variant) for n, variant in ((2, "int4-webgpu"), (3, "int4-cuda"))),
    ]
    tried: list[str] = []

    def problem(one: ModelVersion, _: Settings) -> str | None:
        tried.append(one.variant)
        return "there is no such device" if one.variant in missing else None

    monkeypatch.setattr(pull, "_problem", problem)
    order = ["int4-cuda", "int4-webgpu", "int8"]
    for number, last in ((3, 1), (2, 2), (1, 3), (1, 4)):
        missing = order[: last - 1]
        tried.clear()
        source = VersionSource("bot", Settings(home=Path("/nowhere")), "")
        vars(source)["registry"] = SimpleNamespace(release=lambda _: release)
        for _ in range(2):
            found = source.fitting(first)
            assert (found.version, found.tags["slmops.promoted"]) == (number, "today")
        assert tried == order[:last]


async def test_switches_in_a_row_and_a_drain_that_does_not_wait_for_ever(world: World) -> None:
    async with serving(world, request_timeout_s=0.5) as made, made.lease("bot"):
        for number in (2, 3, 1):
            await promote(world, made, number)
        assert made.switches == 3
        # The first one drains still, and a second process of the same version has taken over.
        assert (world.running, await asked(made)) == ([1, 1], 1)
        await until(lambda: world.backends[0].stopped)
        assert "1 requests" in made.last_failure


@pytest.mark.parametrize(
    ("champion", "last", "faults", "raised", "said"),
    [
        (None, 1, {}, UsageError, "bot"),
        (1, None, {"down": DOWN}, ServingError, "MLflow at http://x"),
        (2, None, {"bad": {2: BAD}}, ServingError, "bot-int8-generic-cpu:2"),
        (2, 2, {"bad": {2: BAD}}, ServingError, "bot-int8-generic-cpu:2"),
        (2, None, {"undeliverable": {2: DOWN}}, TrackingError, "does not answer"),
        # Where nothing can be served, the device may be at fault: nobody's promotion is withdrawn.
        (2, 1, {"bad": {1: ServingError("Also bad."), 2: BAD}}, ServingError, "Also bad."),
    ],
)
async def test_nothing_to_serve(
    champion: int | None, last: int | None, faults: dict[str, Any], raised: type[Exception], said: str
) -> None:
    world = World(champion)
    world.last = installed(last) if last else None
    vars(world).update(faults)
    made = fleet(world)
    with pytest.raises(raised, match=said):
        await made.start()
    assert not made.ready
    with pytest.raises(Refused, match="unavailable"):
        await asked(made)
    assert made.models() == []
    await made.stop()
    assert world.withdrawn == world.running == []


@pytest.mark.parametrize(
    ("last", "fault", "error", "withdrawn"),
    [
        (1, "bad", BAD, 1),
        (1, "undeliverable", RegistrationError("refused"), 1),
        (1, "undeliverable", DOWN, 0),
        (2, "undeliverable", DOWN, 0),  # the champion itself: only its files cannot be checked
    ],
)
async def test_the_last_version_is_served_where_the_champion_cannot(
    last: int, fault: str, error: Exception, withdrawn: int
) -> None:
    world = World(2)
    world.last = installed(last)
    getattr(world, fault)[2] = error
    async with serving(world, poll_s=0.05) as made:
        for _ in range(2):
            assert (await asked(made), len(world.withdrawn)) == (last, withdrawn)
            assert ("bot version 2 (int8)" in made.last_failure) == (last == 1)
            await rounds(world, 2)
        getattr(world, fault).clear()
        await promote(world, made, 2, "second")
        assert made.switches == (last == 1)


async def test_a_process_that_dies_is_restarted(world: World, made: Fleet) -> None:
    world.held[1] = asyncio.Event()
    async with made.lease("bot"):
        world.backends[0].die()
        assert not made.ready
        with pytest.raises(Refused, match=r"503, 'bot.*unavailable") as caught:
            await asked(made)
        assert caught.value.headers == {"retry-after": f"{module.RESTART_S:.0f}"}
        world.held[1].set()
        await until(lambda: made.ready)
    assert await asked(made) == 1
    assert world.backends[0].stopped  # its scratch folder is gone
    assert (made.restarts, made.switches) == (1, 0)
    assert "bot-int8-generic-cpu:1 died and is restarted" in made.last_failure
    world.backends[1].die()
    await asyncio.sleep(0.1)
    assert not made.ready  # the second time so soon, it takes a while
    await until(lambda: made.restarts == 2)
    assert world.installs == [1]


async def test_a_process_that_cannot_be_restarted_has_its_files_checked(
    world: World, made: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_PAUSE_MOST_S", 0.02)
    world.unstartable[1] = BAD
    world.undeliverable[1] = DOWN
    world.backends[0].die()
    await until(lambda: len(world.installs) >= 3)
    assert "cannot be restarted" in made.last_failure
    world.unstartable.clear()
    await until(lambda: made.ready)
    assert (made.restarts, world.withdrawn) == (1, [])


@pytest.mark.parametrize("hangs", [False, True])
async def test_another_champion_replaces_one_that_cannot_be_restarted(world: World, made: Fleet, hangs: bool) -> None:
    world.held[1] = asyncio.Event()
    world.unstartable[1] = BAD
    world.backends[0].die()
    if not hangs:
        world.held[1].set()
        await until(lambda: "cannot be restarted" in made.last_failure)
    await promote(world, made, 2)
    world.held[1].set()
    world.unstartable.clear()
    assert await asked(made) == 2
    await asyncio.sleep(0.1)
    assert world.running == [2]
    world.backends[-1].die()  # and the new one is looked after
    await until(lambda: made.restarts == 1)


async def test_a_start_that_is_cancelled_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets.FakeBackend, "smoke_test", lambda _: asyncio.sleep(60))
    starting = asyncio.create_task(fleet(world).start())
    await until(lambda: bool(world.backends))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert world.running == []


async def test_a_stop_in_the_middle_of_everything(world: World) -> None:
    made = fleet(world)
    await made.start()
    watching = asyncio.create_task(made.run())
    world.held = {3: asyncio.Event(), 4: asyncio.Event()}
    async with made.lease("bot"):
        await promote(world, made, 2)
        world.now = version(3)
        beside = asyncio.create_task(asked(made, "bot:4"))
        await until(lambda: world.installs[-2:] in ([3, 4], [4, 3]))
        await made.stop()
    assert watching.cancelled()
    for event in world.held.values():
        event.set()
    await asyncio.sleep(0.05)
    assert world.running == []
    with pytest.raises(Refused, match="unavailable"):
        await asked(made)
    with pytest.raises((asyncio.CancelledError, Refused)):
        await beside
    await made.stop()


async def test_a_version_on_demand_and_the_oldest_makes_room(world: World) -> None:
    async with serving(world, spare=2) as made:
        assert ([await asked(made, f"bot:{number}") for number in (2, 3, 2)], world.running) == ([2, 3, 2], [1, 2, 3])
        assert (await asked(made, "bot-int8-generic-cpu:4"), sorted(world.running)) == (4, [1, 2, 4])
        assert [one.installed.version for one in made.running] == [1, 2, 4]
        assert (await asked(made, "bot:1"), made.switches) == (1, 0)
    assert world.installs == [1, 2, 3, 4]


async def test_a_version_in_use_is_not_stopped_and_one_that_died_is_started_again(world: World, made: Fleet) -> None:
    async with made.lease("bot:2"):
        with pytest.raises(Refused, match="1 versions") as caught:
            await asked(made, "bot:3")
        assert caught.value.headers == {"retry-after": f"{module.IN_USE_RETRY_S:.0f}"}
        assert world.running == [1, 2]
    for _ in range(2):
        assert (await asked(made, "bot:3"), world.running) == (3, [1, 3])
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
        assert answer == number or isinstance(answer, Refused)
    assert 2 in answers
    assert len(world.running) == 2


async def test_a_version_that_fails_is_not_started_by_each_request(
    world: World, made: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_S", 0.2)
    world.bad[2] = BAD
    for _ in range(3):
        with pytest.raises(Refused, match="version 2") as caught:
            await asked(made, "bot:2")
        assert caught.value.headers == {"retry-after": "1"}
    assert (world.installs, world.running) == ([1, 2], [1])
    world.bad.clear()
    await asyncio.sleep(0.25)
    assert (await asked(made, "bot:2"), world.withdrawn) == (2, [])


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


async def test_unknown_models_and_one_that_is_new_in_the_registry(world: World, made: Fleet) -> None:
    for model in ("", "bot:9", "bot:", "bot:x", "other", "bot:02", "bot@int8", "Bot", "x" * 10_000):
        with pytest.raises(Refused, match=r"404, .*model_not_found") as caught:
            await asked(made, model)
        assert len(caught.value.message) < 200
    assert world.installs == [1]
    await rounds(world)
    lists = world.asked["versions"]
    world.all = [version(6), *world.all]
    with pytest.raises(Refused, match="model_not_found"):
        await asked(made, "bot:6")
    await rounds(world)
    assert (await asked(made, "bot:6"), world.asked["versions"]) == (6, lists + 1)


async def test_the_champion_alone(world: World) -> None:
    async with serving(world, spare=0) as made:
        assert [row["id"] for row in made.models()] == ["bot", "bot:1"]
        with pytest.raises(Refused, match="model_not_found"):
            await asked(made, "bot:2")
        assert await asked(made, "bot:1") == 1
