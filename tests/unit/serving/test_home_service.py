"""What `slmops status` says of a service: it runs, it hangs, it was killed, somebody else has its process id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slmops.serving.home_service import SERVING, Running, ServingStatus, status
from tests.answering import answering


@pytest.fixture
def code() -> int:
    """The status of /health."""
    return 200


@pytest.fixture
def url(code: int) -> Iterator[str]:
    with answering(lambda request, _: (code if request.path == "/health" else 404, "")) as address:
        yield address


def write(home: Path, url: str, pid: int = os.getpid(), later: float = 0) -> None:
    created = psutil.Process(os.getpid()).create_time() + later
    running = Running(pid=pid, created=created, url=url, model="bot")
    (home / SERVING).write_text(running.model_dump_json())


@pytest.mark.parametrize(("code", "answers", "ok"), [(200, True, True), (503, True, False), (200, False, False)])
def test_it_runs(tmp_path: Path, url: str, answers: bool, ok: bool) -> None:
    url = url if answers else "http://127.0.0.1:9"
    write(tmp_path, url)
    assert status(tmp_path) == ServingStatus(url=url, model="bot", ok=ok)


def test_there_is_none(tmp_path: Path, url: str) -> None:
    assert status(tmp_path) is None
    write(tmp_path, url, pid=2**22 + 1)  # killed
    assert status(tmp_path) is None
    write(tmp_path, url, later=-60)  # the number is another process's by now
    assert status(tmp_path) is None
    (tmp_path / SERVING).write_text("{half")
    assert status(tmp_path) is None
