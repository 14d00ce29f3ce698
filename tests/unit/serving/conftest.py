"""What async tests share: a fleet that watches, and a proxy before a scripted runtime."""

from collections.abc import AsyncIterator

import pytest

from slmops.serving.fleet import Fleet
from tests.fleets import World, serving
from tests.upstream import Stand, stand


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def made(world: World) -> AsyncIterator[Fleet]:
    async with serving(world) as fleet:
        yield fleet


@pytest.fixture
async def one() -> AsyncIterator[Stand]:
    async with stand() as proxy:
        yield proxy
