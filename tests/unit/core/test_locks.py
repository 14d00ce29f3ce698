"""Locks between real processes."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
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
def holder(lock: Path) -> Iterator[Holder]:
    """A process that holds the lock until it is told to go."""
    argv = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def who(lock: Path) -> Any:
    return json.loads(lock.with_suffix(".json").read_text(encoding="utf-8"))


def refused(lock: Path, what: str = "the thing") -> str:
    with pytest.raises(BusyError) as raised, exclusive(lock, what, wait=False):
        pass
    return raised.value.message


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_free_and_free_again(lock: Path, error: type[BaseException] | None) -> None:
    with pytest.raises(error) if error else nullcontext(), exclusive(lock, "the thing", wait=False):
        assert who(lock)["pid"] == os.getpid()
        assert abs((datetime.now().astimezone() - datetime.fromisoformat(who(lock)["since"])).total_seconds()) < 60
        assert lock.parent.stat().st_mode & 0o777 == 0o700
        assert f"process {os.getpid()}" in refused(lock)  # in the same process, too
        if error:
            raise error
    assert not lock.with_suffix(".json").exists()
    with exclusive(lock, "the thing", wait=False):
        assert lock.with_suffix(".json").exists()


def test_busy_names_the_holder(lock: Path, holder: Holder) -> None:
    assert re.search(rf"the job of 'bot' \(process {holder.pid}, since {SECOND}\)", refused(lock, "the job of 'bot'"))
    lock.with_suffix(".json").write_text("{", encoding="utf-8")
    assert "process unknown" in refused(lock)
    # Who was refused did not take the note away, either.
    assert lock.with_suffix(".json").exists()
    holder.communicate("\n")
    assert holder.returncode == 0
    with exclusive(lock, "the thing", wait=False):
        pass


def test_waits_for_the_holder_and_says_so(lock: Path, holder: Holder, caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    def release() -> None:
        released.set()
        holder.stdin.write("\n")
        holder.stdin.flush()

    timer = threading.Timer(0.3, release)
    timer.start()
    with caplog.at_level(logging.INFO, "slmops.core.locks"), exclusive(lock, "the thing", wait=True):
        assert released.is_set()
        assert who(lock)["pid"] == os.getpid()
    timer.join()
    [record] = caplog.records
    assert record.getMessage().startswith(f"waiting for the thing, held by another run (process {holder.pid}, since ")


def test_free_again_when_the_holder_is_killed(lock: Path, holder: Holder) -> None:
    holder.kill()
    holder.wait()
    assert lock.with_suffix(".json").exists(), "it had no time to tidy up"
    with exclusive(lock, "the thing", wait=False):
        assert who(lock)["pid"] == os.getpid()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="a folder has no numbered owner")
def test_folder_of_another_user_is_refused(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PrerequisiteError, match="belongs to another user") as raised:
        exclusive(lock, "the thing", wait=False).__enter__()
    assert "TMPDIR" in (raised.value.fix or "")
    assert not lock.exists()
