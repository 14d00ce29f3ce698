"""Locks between real processes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import BusyError, PrerequisiteError
from slmops.core.locks import exclusive

pytestmark = pytest.mark.timeout(60)  # a lock that is never released would wait for ever

HOLDER = """\
import sys
from pathlib import Path
from slmops.core.locks import exclusive

with exclusive(Path(sys.argv[1]), "the thing", wait=False):
    print("held", flush=True)
    sys.stdin.readline()
"""
SECOND = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
Holder = subprocess.Popen[str]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "thing.lock"


@pytest.fixture
def hold(lock: Path) -> Iterator[Callable[[], Holder]]:
    """Start a process that holds the lock until it is told to go."""
    holders: list[Holder] = []

    def start() -> Holder:
        argv = [sys.executable, "-c", HOLDER, str(lock)]
        holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def who(lock: Path) -> Any:
    """The note about the holder."""
    return json.loads(lock.with_suffix(".json").read_text(encoding="utf-8"))


def test_free(lock: Path) -> None:
    with exclusive(lock, "the thing", wait=False):
        assert who(lock)["pid"] == os.getpid()
        assert abs((datetime.now().astimezone() - datetime.fromisoformat(who(lock)["since"])).total_seconds()) < 60
        assert lock.parent.stat().st_mode & 0o777 == 0o700
    assert not lock.with_suffix(".json").exists()
    with exclusive(lock, "the thing", wait=False):
        pass


def test_busy_names_the_holder(lock: Path, hold: Callable[[], Holder]) -> None:
    holder = hold()
    with pytest.raises(BusyError) as raised, exclusive(lock, "the job of 'bot'", wait=False):
        pytest.fail("two hold it")
    assert re.search(rf"the job of 'bot' \(process {holder.pid}, since {SECOND}\)", raised.value.message)
    holder.communicate("\n")
    assert holder.returncode == 0
    with exclusive(lock, "the thing", wait=False):
        pass


def test_busy_in_the_same_process(lock: Path) -> None:
    with (
        exclusive(lock, "the thing", wait=False),
        pytest.raises(BusyError, match=f"process {os.getpid()}"),
        exclusive(lock, "the thing", wait=False),
    ):
        pytest.fail("two hold it")


def test_holder_without_a_note(lock: Path, hold: Callable[[], Holder]) -> None:
    hold()
    lock.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(BusyError, match="process unknown"), exclusive(lock, "the thing", wait=False):
        pytest.fail("two hold it")
    # Who was refused did not take the note away, either.
    assert lock.with_suffix(".json").exists()


def test_waits_for_the_holder_and_says_so(
    lock: Path, hold: Callable[[], Holder], caplog: pytest.LogCaptureFixture
) -> None:
    holder = hold()
    assert holder.stdin is not None
    released: list[float] = []

    def release() -> None:
        released.append(time.monotonic())
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()

    timer = threading.Timer(0.3, release)
    timer.start()
    with caplog.at_level(logging.INFO, "slmops.core.locks"), exclusive(lock, "the thing", wait=True):
        assert released
        assert time.monotonic() >= released[0]
        assert who(lock)["pid"] == os.getpid()
    timer.join()
    [record] = caplog.records
    assert record.getMessage().startswith(f"waiting for the thing, held by another run (process {holder.pid}, since ")


def test_free_again_when_the_holder_is_killed(lock: Path, hold: Callable[[], Holder]) -> None:
    holder = hold()
    holder.kill()
    holder.wait()
    assert lock.with_suffix(".json").exists(), "it had no time to tidy up"
    with exclusive(lock, "the thing", wait=False):
        assert who(lock)["pid"] == os.getpid()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_free_again_after_an_exception(lock: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), exclusive(lock, "the thing", wait=False):
        raise error
    with exclusive(lock, "the thing", wait=False):
        assert lock.with_suffix(".json").exists()


def test_folder_of_another_user_is_refused(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PrerequisiteError, match="belongs to another user") as raised:
        exclusive(lock, "the thing", wait=False).__enter__()
    assert "TMPDIR" in (raised.value.fix or "")
    assert not lock.exists()
