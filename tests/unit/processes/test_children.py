"""Child processes, with real ones of a few lines each."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slmops.core.errors import CheckpointError, ConversionError, EvaluationError
from slmops.core.values import Frozen
from slmops.processes import children
from slmops.processes.memory import Meter

pytestmark = pytest.mark.timeout(60)

LONG_S = 30.0
WORKER = """\
import os, signal, sys, time
from pathlib import Path
from slmops.core import errors
from slmops.processes import child
from slmops.core.values import Frozen

class Request(Frozen):
    what: str

class Result(Frozen):
    said: str
    pid: int

def handle(request):
    if request.what == "checkpoint error":
        raise errors.CheckpointError("The folder is empty.", "Give another one.")
    if request.what == "crash":
        print("something was said")
        raise KeyError("int8")
    if request.what == "exit":
        sys.exit(0)
    if request.what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if request.what == "crash in the clean-up":
        import atexit
        atexit.register(os.abort)
    if request.what.startswith("sleep "):
        Path(request.what.removeprefix("sleep ")).write_text(str(os.getpid()))
        time.sleep(60)
    return Result(said=f"did {request.what} {os.environ.get('MODE', '')}", pid=os.getpid())

if __name__ == "__main__":
    child.main(Request, handle)
"""


class Request(Frozen):
    """What the worker is to do."""

    what: str


class Result(Frozen):
    """What it did."""

    said: str
    pid: int


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "GRACE_S", 0.3)


def python(program: str, log: Path, timeout_s: float = LONG_S, **options: Any) -> children.Finished:
    return children.run([sys.executable, "-S", "-c", program], log=log, timeout_s=timeout_s, **options)


def gone(pid: int, within_s: float) -> bool:
    """Has the process ended? One that nobody has reaped yet has."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def number(file: Path) -> int:
    """The process number that a child writes as soon as it lives."""
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text(encoding="utf-8"))
        time.sleep(0.02)
    raise AssertionError(f"nobody wrote {file}")


@pytest.fixture
def over_when_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file; once a child has written it, an hour has passed on the clock that children are timed by."""
    file = tmp_path / "pid"

    def clock() -> float:
        return time.monotonic() + (3600 if file.exists() and file.stat().st_size else 0)

    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=clock))
    return file


def test_output_goes_to_the_log_and_line_by_line_to_the_caller(log: Path) -> None:
    lines: list[str] = []
    program = "import sys; print('out', flush=True); print('ünd err', file=sys.stderr, flush=True); print('last')"
    finished = python(program, log, on_line=lines.append, env={"PYTHONIOENCODING": "utf-8"})
    assert (finished.returncode, finished.timed_out) == (0, False)
    assert lines == ["out", "ünd err", "last"]
    python("print(2)", log)
    assert log.read_text(encoding="utf-8") == "out\nünd err\nlast\n2\n"


@pytest.mark.parametrize(
    ("program", "written"),
    [
        (r"print('Load:  0%\rLoad: 50%\rLoad: 100%\r\ndone\r', end='')", "Load: 100%\ndone\n"),
        (r"import sys; sys.stdout.buffer.write(b'not \xff\xfetext\nnext\n')", "not \ufffd\ufffdtext\nnext\n"),
        ("import os; print(os.environ['MODE'], 'PATH' in os.environ, os.getcwd())", "x True {folder}\n"),
    ],
)
def test_what_the_log_has(log: Path, tmp_path: Path, program: str, written: str) -> None:
    python(program, log, env={"MODE": "x"}, cwd=tmp_path)
    assert log.read_text(encoding="utf-8") == written.replace("{folder}", str(tmp_path))
    assert "MODE" not in os.environ


def test_status_and_time(log: Path) -> None:
    finished = python("import time; time.sleep(0.3); raise SystemExit(7)", log)
    assert finished.returncode == 7
    assert 0.3 <= finished.seconds < 5


def test_child_killed_by_a_signal(log: Path) -> None:
    assert python("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", log).returncode == -signal.SIGTERM


@pytest.mark.parametrize("held_by", ["the child", "its child"])
def test_memory_of_the_whole_group_is_sampled(log: Path, held_by: str) -> None:
    program = "import time; x = b'x' * 60_000_000; time.sleep(0.6)"
    if held_by == "its child":
        program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {program!r}])"
    before = time.monotonic()
    finished = python(program, log)
    assert 60 < finished.memory_peak_mb < 300
    assert finished.memory_peak_mb == max(mb for _, mb in finished.memory)
    assert len(finished.memory) >= 3
    times = [at for at, _ in finished.memory]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= before + finished.seconds + 1


STUBBORN = ", signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
GRANDCHILD = "import pathlib, os, time{first}; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize("stubborn", [False, True])
def test_children_of_a_child_whose_time_is_over_end_too(log: Path, over_when_written: Path, stubborn: bool) -> None:
    first = STUBBORN if stubborn else ""
    grandchild = GRANDCHILD.format(file=str(over_when_written), first=first)
    finished = python(f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {grandchild!r}])", log)
    assert (finished.timed_out, finished.returncode) == (True, -signal.SIGTERM)
    assert gone(number(over_when_written), within_s=2)


def test_child_that_ignores_the_request_to_end_is_killed(log: Path, over_when_written: Path) -> None:
    finished = python(GRANDCHILD.format(file=str(over_when_written), first=STUBBORN), log)
    assert (finished.timed_out, finished.returncode) == (True, -signal.SIGKILL)


def test_children_left_behind_by_a_child_that_ended_are_ended(log: Path, tmp_path: Path) -> None:
    grandchild = GRANDCHILD.format(file=str(tmp_path / "pid"), first="")
    program = (
        f"import pathlib, subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {grandchild!r}])\n"
        f"while not pathlib.Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(0.02)"
    )
    finished = python(program, log)
    assert (finished.returncode, finished.timed_out) == (0, False)
    assert gone(number(tmp_path / "pid"), within_s=2)


def test_interruption_ends_the_child(log: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def interrupt() -> None:
        number(file)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        python(GRANDCHILD.format(file=str(file), first=""), log)
    thread.join()
    assert gone(number(file), within_s=2)


def test_program_that_does_not_exist(log: Path) -> None:
    with pytest.raises(FileNotFoundError):
        children.run(["/no/such/program"], log=log, timeout_s=1)


@pytest.fixture
def call(tmp_path: Path, log: Path) -> Callable[..., tuple[Result, children.Finished]]:
    """Call the worker module, which lies where only the child looks."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "odd_worker.py").write_text(WORKER, encoding="utf-8")

    def run(what: str, **env: str) -> tuple[Result, children.Finished]:
        return children.call(
            "odd_worker",
            Request(what=what),
            Result,
            work=tmp_path / "work",
            log=log,
            timeout_s=LONG_S,
            error=ConversionError,
            env={"PYTHONPATH": str(tmp_path / "modules"), **env},
        )

    return run


def test_call_returns_what_the_worker_made(call: Callable[..., tuple[Result, children.Finished]]) -> None:
    result, finished = call("work", MODE="fast")
    assert result.said == "did work fast"
    assert result.pid != os.getpid()
    assert finished.returncode == 0
    assert finished.memory_peak_mb > 5


def test_error_of_our_own_comes_back_as_itself(call: Callable[..., Any], log: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        call("checkpoint error")
    assert (raised.value.message, raised.value.fix) == ("The folder is empty.", "Give another one.")
    assert "Traceback" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("crash", r"status 1 and no result: .*KeyError: 'int8'$"),
        ("exit", r"status 1 and no result: .*SystemExit: 0$"),
        ("killed", r"SIGKILL \(often: out of memory\): it said nothing$"),
    ],
)
def test_any_other_end_is_the_callers_error_with_the_last_words(
    call: Callable[..., Any], log: Path, what: str, said: str
) -> None:
    call("work")  # whose result is not taken for the next one's
    log.unlink()
    with pytest.raises(ConversionError) as raised:
        call(what)
    assert re.search(said, raised.value.message)
    assert raised.value.fix == f"Its log: {log}"
    assert ("something was said\nTraceback" in log.read_text(encoding="utf-8")) == (what == "crash")


def test_worker_that_takes_too_long(call: Callable[..., Any], over_when_written: Path) -> None:
    with pytest.raises(ConversionError) as raised:
        call(f"sleep {over_when_written}")
    assert "30 s" in raised.value.message
    assert gone(number(over_when_written), within_s=2)


def test_crash_in_the_clean_up_after_the_work_does_no_harm(call: Callable[..., Any]) -> None:
    result, finished = call("crash in the clean-up")
    assert result.said == "did crash in the clean-up "
    assert finished.returncode == 0


def test_unknown_module(tmp_path: Path, log: Path) -> None:
    options: dict[str, Any] = {"work": tmp_path / "work", "log": log, "timeout_s": LONG_S, "error": EvaluationError}
    with pytest.raises(EvaluationError, match=r"status 1 and no result: .*No module named no_such_worker"):
        children.call("no_such_worker", Request(what=""), Result, **options)


PARENT = """\
import sys
from pathlib import Path
from slmops.core import errors
from slmops.processes import children
from slmops.core.values import Frozen

class Request(Frozen):
    what: str

folder = Path(sys.argv[1])
children.call("odd_worker", Request(what=f"sleep {folder / 'pid'}"), Request, work=folder / "work",
             log=folder / "log", timeout_s=60, error=errors.WorkError)
"""


@pytest.fixture
def parent(tmp_path: Path, call: Callable[..., Any]) -> Iterator[subprocess.Popen[bytes]]:  # noqa: ARG001 - its module
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    started = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=env)
    yield started
    started.kill()
    started.wait()


def test_worker_dies_with_a_parent_that_is_killed(parent: subprocess.Popen[bytes], tmp_path: Path) -> None:
    worker = number(tmp_path / "pid")
    assert not gone(worker, within_s=0.2)
    parent.kill()
    assert gone(worker, within_s=5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "it said nothing") for text in (None, "", "\n  \n")),
        ("one\n", "one"),
        ("one\n\n two \n\nthree\nfour\n\n", "two / three / four"),
    ],
)
def test_last_words(log: Path, text: str | None, said: str) -> None:
    if text is not None:
        log.parent.mkdir()
        log.write_text(text, encoding="utf-8")
    assert children.last_words(log) == said


def test_looks_at_memory_take_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long one look takes; in between the resident size is taken, less what was shared."""
    now, looks = [1000.0], []

    class Info:
        rss, pss = 1_000_000_000, 900_000_000

    def exact(_process: psutil.Process) -> type[Info]:
        looks.append(now[0])
        now[0] += 0.04
        return Info

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [])
    monkeypatch.setattr(psutil.Process, "memory_full_info", exact)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _process: Info)
    meter = Meter()
    while now[0] < 1010:
        assert meter.mb(os.getpid()) == 900
        now[0] += 0.1
    assert len(looks) == 5
    Info.rss = 1_200_000_000
    assert meter.mb(os.getpid()) == 1100
