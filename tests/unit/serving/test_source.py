"""What a fleet is given: the registry, this device, and threads."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from slmops.core.settings import Settings
from slmops.foundry.versions import ModelVersion
from slmops.serving.registry_watch import VersionSource, in_thread
from tests.fleets import installed, version


def test_a_thread_that_does_not_come_back_keeps_nobody() -> None:
    never = threading.Event()
    mine = set(threading.enumerate())

    async def hang() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await in_thread(never.wait)
        assert [thread.daemon for thread in threading.enumerate() if thread not in mine] == [True]

    started = time.monotonic()
    asyncio.run(hang())
    assert time.monotonic() - started < 2
    never.set()  # it comes back to a loop that is closed


def test_a_result_that_comes_too_late() -> None:
    later, wrong = threading.Event(), []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await in_thread(later.wait)
        later.set()
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert wrong == []


def test_in_thread_gives_and_raises() -> None:
    assert asyncio.run(in_thread(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(divmod, 7, 0))


def test_the_registry_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    calls: list[tuple[Any, ...]] = []

    class Registry:
        def __init__(self, uri: str) -> None:
            calls.append(("connect", uri))

        def champion(self, name: str) -> ModelVersion:
            return version(2) if name == "bot" else version(0)

        def versions(self, name: str) -> list[ModelVersion]:
            return [self.champion(name)]

        def withdraw(self, failed: ModelVersion, reason: str) -> None:
            calls.append(("withdraw", failed.version, reason))

    def replace(name: str, **functions: Any) -> None:
        fake = types.SimpleNamespace(**functions)
        package, _, module = f"slmops.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"{package}.{module}", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(importlib.import_module(package), module, fake, raising=False)

    replace("tracking.registry", Registry=Registry)
    replace("delivery.pull", install=lambda *args: calls.append(("install", *args)))
    replace(
        "delivery.installed",
        make_current=lambda *args: calls.append(("make_current", *args)),
        current=lambda *args: calls.append(("current", *args)),
    )
    source = VersionSource("bot", settings, "http://registry")
    assert calls == []  # nothing is imported or asked before it is needed
    assert source.champion() == version(2)
    assert source.versions() == [version(2)]
    source.withdraw(version(2), "why")
    source.install(version(2))
    source.make_current(installed(2))
    source.current()
    assert calls == [
        ("connect", "http://registry"),
        ("withdraw", 2, "why"),
        ("install", version(2), settings, "http://registry"),
        ("make_current", installed(2), settings),
        ("current", "bot", settings),
    ]
