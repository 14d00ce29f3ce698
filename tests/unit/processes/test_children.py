"""Child processes, with real ones of a few lines each."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slmops.core.errors import CheckpointError, ConversionError, PrerequisiteError
from slmops.processes import children, daemon, tree
from slmops.processes.children import Finished
from slmops.processes.daemon import Daemon
from tests.unit.processes import odd_worker
from tests.unit.processes.odd_worker import Request, Result

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[3]
LONG_S = 30.0
ON_WINDOWS = sys.platform == "win32"
KILL = getattr(signal, "SIGKILL", 0)
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "GRACE_S", 0.3)


@pytest.fixture(params=["win32"] if ON_WINDOWS else ["linux", "win32"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Here, or as on Windows, where there are no groups: SIGTERM stands in for Ctrl-Break, and goes to one process."""
    if request.param == "win32" and not ON_WINDOWS:
        monkeypatch.setattr(tree, "apart", lambda env: {"env": env})
        monkeypatch.setattr(tree, "sys", SimpleNamespace(platform="win32"))
        monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM, raising=False)
        monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("there are no groups"))
        monkeypatch.setattr(children, "LOOKING", 1.0)  # those that it leaves behind must have been seen
    return str(request.param)


def python(program: str, log: Path, **options: Any) -> Finished:
    return children.run([sys.executable, "-S", "-c", program], log=log, timeout_s=LONG_S, **options)


def sleeping(file: Path) -> str:
    """A program that writes its process number and sleeps."""
    return f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"


def starting(start: str, program: str) -> str:
    """A program that starts another one with ``run`` or ``Popen``."""
    return f"import subprocess, sys; subprocess.{start}([sys.executable, '-S', '-c', {program!r}]); "


def gone(pid: int, within_s: float) -> bool:
    """Has the process ended? One that nobody has reaped yet has."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
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
    assert (finished.returncode, finished.stopped) == (0, None)
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full disk is /dev/full")
def test_a_log_that_cannot_be_written_ends_the_child(log: Path, tmp_path: Path) -> None:
    log.parent.mkdir()
    log.symlink_to("/dev/full")
    with pytest.raises(PrerequisiteError, match=r"child\.log cannot be written: No space left") as caught:
        python("print('x', flush=True); " + sleeping(tmp_path / "pid"), log)
    assert caught.value.fix == children.FREE_SPACE


@pytest.mark.parametrize("held_by", ["the child", "its child"])
def test_memory_of_the_whole_group_is_sampled(log: Path, held_by: str) -> None:
    program = "import time; x = b'x' * 60_000_000; time.sleep(3); raise SystemExit(7)"
    before = time.monotonic()
    finished = python(starting("run", program) if held_by == "its child" else program, log)
    assert 60 < finished.memory_peak_mb < 300
    assert finished.memory_peak_mb == max(mb for _, mb in finished.memory)
    assert len(finished.memory) >= 3
    assert finished.returncode == (7 if held_by == "the child" else 0)
    assert 3 <= finished.seconds < 60
    times = [at for at, _ in finished.memory]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= before + finished.seconds + 1


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize(
    ("program", "ended_by"),
    [
        (lambda sleep: starting("run", sleep), signal.SIGTERM),
        (lambda sleep: starting("run", STUBBORN + sleep), signal.SIGTERM),
        (lambda sleep: STUBBORN + sleep, KILL),
    ],
)
def test_a_child_whose_time_is_over_ends_and_its_children_too(
    log: Path, over_when_written: Path, program: Callable[[str], str], ended_by: int
) -> None:
    finished = python(program(sleeping(over_when_written)), log)
    assert ON_WINDOWS or finished.returncode == -ended_by
    assert finished.stopped == "It took longer than 30 s and was stopped."
    assert gone(number(over_when_written), within_s=2)


@pytest.mark.usefixtures("system")
def test_children_left_behind_by_a_child_that_ended_are_ended(log: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(file)!r}).exists(): time.sleep(0.02)\ntime.sleep(1)"
    finished = python(starting("Popen", sleeping(file)) + wait, log)
    assert (finished.returncode, finished.stopped) == (0, None)
    assert gone(number(file), within_s=2)


@pytest.mark.skipif(ON_WINDOWS, reason="os.kill sends no Ctrl-C there")
def test_interruption_ends_the_child(log: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def interrupt() -> None:
        number(file)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        python(sleeping(file), log)
    thread.join()
    assert gone(number(file), within_s=2)


Call = Callable[..., tuple[Result, Finished]]


@pytest.fixture
def call(log: Path) -> Call:
    def run(do: str, **env: str) -> tuple[Result, Finished]:
        env = {"PYTHONPATH": str(ROOT), **env}
        return children.call(
            odd_worker.handle, Request(do=do), log=log, timeout_s=LONG_S, error=ConversionError, env=env
        )

    return run


@pytest.mark.parametrize("do", ["pass", "import atexit; atexit.register(os.abort)"])
def test_call_returns_what_the_worker_made_though_its_clean_up_crashes(call: Call, do: str) -> None:
    result, finished = call(do, MODE="fast")
    assert result.mode == "fast"
    assert result.pid != os.getpid()
    assert finished.returncode == 0
    assert finished.memory_peak_mb > 0


def test_error_of_our_own_comes_back_as_itself(call: Call, log: Path) -> None:
    do = "from slmops.core import errors; raise errors.CheckpointError('The folder is empty.', 'Give another one.')"
    with pytest.raises(CheckpointError) as raised:
        call(do)
    assert (raised.value.message, raised.value.fix) == ("The folder is empty.", "Give another one.")
    assert "Traceback" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("print('something was said'); raise KeyError('int8')", r"status 1 and no result: .*KeyError: 'int8'$"),
        ("raise SystemExit(0)", r"status 1 and no result: .*SystemExit: 0$"),
        pytest.param(
            "import signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"SIGKILL \(often: out of memory\): it said nothing$",
            marks=pytest.mark.skipif(ON_WINDOWS, reason="no status tells of a kill"),
        ),
    ],
)
def test_any_other_end_is_the_callers_error_with_the_last_words(call: Call, log: Path, do: str, said: str) -> None:
    with pytest.raises(ConversionError) as raised:
        call(do)
    assert re.search(said, raised.value.message)
    assert raised.value.fix == f"Its log: {log}"
    assert ("something was said\nTraceback" in log.read_text(encoding="utf-8")) == ("said" in do)


def test_worker_that_takes_too_long(call: Call, over_when_written: Path) -> None:
    with pytest.raises(ConversionError, match="30 s"):
        call(sleeping(over_when_written))
    assert gone(number(over_when_written), within_s=2)


PARENT = """\
import sys
from pathlib import Path
from slmops.core.errors import WorkError
from slmops.processes import children
from tests.unit.processes.odd_worker import Request, handle

children.call(handle, Request(do=sys.argv[2]), log=Path(sys.argv[1]) / "log", timeout_s=60, error=WorkError)
"""


AS_ON_WINDOWS = """\
from types import SimpleNamespace
from slmops.processes import tree
tree.sys = SimpleNamespace(platform="win32")
"""


@pytest.mark.parametrize("before", ["", AS_ON_WINDOWS])
@pytest.mark.parametrize("member", ["the worker", "its child"])
def test_a_worker_and_its_child_die_with_a_parent_that_is_killed(tmp_path: Path, before: str, member: str) -> None:
    sleep = sleeping(tmp_path / "pid")
    do = before + (starting("run", sleep) if member == "its child" else sleep)
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), do], cwd=ROOT) as parent:
        worker = number(tmp_path / "pid")
        assert not gone(worker, within_s=0.2)
        parent.kill()
    assert gone(worker, within_s=5)


FULL = "import builtins; held = [bytes(1000) for _ in range(200_000)]; builtins.last = bytes(1000); "


def test_a_child_that_stays_does_all_calls_until_one_kills_it_each_with_its_own_log_and_memory(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(ROOT)}

    def ask(name: str, do: str) -> tuple[Result, Finished]:
        asked, how = Request(do=do), {"timeout_s": LONG_S, "error": ConversionError, "env": env, "within": child}
        return children.call(odd_worker.handle, asked, log=tmp_path / name, **how)

    with children.Child() as child:
        first, large = ask("one", FULL + "print('a line'); print('half a line', end=''); time.sleep(0.5)")
        second, small = ask("two", "import builtins; assert builtins.last; print('two'); time.sleep(0.5)")
        with pytest.raises(CheckpointError):
            ask("three", "from slmops.core import errors; raise errors.CheckpointError('Empty.')")
        third, _ = ask("four", "")
        assert first.pid == second.pid == third.pid
        assert large.memory_peak_mb - small.memory_peak_mb > 150  # it was given back
        for end in ("os.kill(os.getpid(), 9)", "raise KeyError('lost')"):
            with pytest.raises(ConversionError, match=r"SIGKILL|status 9|KeyError: 'lost'"):
                ask("five", end)
            assert gone(third.pid, within_s=2)
            anew, _ = ask("six", "print('six')")
            assert anew.pid != third.pid
            third = anew
    assert gone(third.pid, within_s=2)
    logs = [(tmp_path / name).read_text(encoding="utf-8") for name in ("one", "two", "four", "six")]
    assert logs == ["a line\nhalf a line\n", "two\n", "", "six\n" * 2]


def test_a_child_that_neither_says_nor_does_anything_is_stopped(log: Path, over_when_written: Path) -> None:
    asked, how = Request(do=sleeping(over_when_written)), {"timeout_s": 7200, "error": ConversionError}
    with pytest.raises(ConversionError, match="It neither said nor did anything for 600 s and was stopped"):
        children.call(odd_worker.handle, asked, log=log, env={"PYTHONPATH": str(ROOT)}, **how)
    assert gone(number(over_when_written), within_s=2)


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
    meter = children.Meter()
    while now[0] < 1010:
        assert meter.mb(os.getpid()) == 900
        now[0] += 0.1
    assert len(looks) == 5
    Info.rss = 1_200_000_000
    assert meter.mb(os.getpid()) == 1100


def test_on_windows_a_process_has_a_group_for_ctrl_break_and_a_server_outlives_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tree.apart({"A": "b"})
    told = {"ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    assert given == {"env": {"A": "b", **told}, "start_new_session": True}
    monkeypatch.setattr(tree, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    assert tree.apart({"A": "b"}) == {"env": given["env"], "creationflags": 0x200}
    assert tree.apart({}, console=False)["creationflags"] == 0x08000200


@pytest.mark.parametrize("end", [tree.ask_to_end, tree.kill])
def test_to_end_a_process_that_is_gone_is_nothing(
    system: str, end: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If asked to end a group that is gone, Windows may ask all that share the console."""
    with subprocess.Popen([sys.executable, "-S", "-c", "pass"]) as child:
        child.wait()
    if system == "win32":
        monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("somebody was asked"))
    end(child.pid)


@pytest.mark.skipif(ON_WINDOWS, reason="it plays Windows")
def test_a_server_whose_first_process_was_killed_is_ended_by_its_mark_where_there_are_no_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str) -> tuple[Daemon, int]:
        file = tmp_path / f"{name}.pid"
        argv = [sys.executable, "-S", "-c", starting("run", sleeping(file))]
        started = daemon.spawn(argv, port=9, mark=str(file), env=dict(os.environ), log=tmp_path / name)
        return started, number(file)

    (server, left), (other, its) = start("server"), start("other")
    psutil.Process(server.pid).kill()
    monkeypatch.setattr(tree, "sys", SimpleNamespace(platform="win32"))
    assert not gone(left, within_s=0.2)
    assert daemon.stop(server)
    assert gone(left, within_s=2)
    assert not gone(its, within_s=0.2)
    assert daemon.stop(other)
    assert gone(its, within_s=2)
