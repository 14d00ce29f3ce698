"""What `slmops status` says of a service: it runs, it hangs, it was killed, somebody else has its process id."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from slmops.serving.home_service import SERVING, Running, ServingStatus, status
from tests.answering import answering


def write(home: Path, url: str = "http://127.0.0.1:9", pid: int = os.getpid(), later: float = 0) -> None:
    running = Running(pid=pid, created=psutil.Process().create_time() + later, url=url, model="bot")
    (home / SERVING).write_text(running.model_dump_json())


def test_it_runs(tmp_path: Path) -> None:
    codes = [503, 200]
    with answering(lambda request, _: (codes.pop() if request.path == "/health" else 404, "")) as url:
        write(tmp_path, url)
        for ok in (True, False):
            assert status(tmp_path) == ServingStatus(url=url, model="bot", ok=ok)
    assert status(tmp_path) == ServingStatus(url=url, model="bot", ok=False)  # it hangs, or does not listen


def test_there_is_none(tmp_path: Path) -> None:
    assert status(tmp_path) is None
    write(tmp_path, pid=2**22 + 1)  # killed
    assert status(tmp_path) is None
    write(tmp_path, later=-60)  # the number is another process's by now
    assert status(tmp_path) is None
    (tmp_path / SERVING).write_text("{half")
    assert status(tmp_path) is None
