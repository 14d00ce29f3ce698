"""Heavy work in child processes that never outlive us.

Olive, torch, ONNX Runtime and Foundry Local's runtime are loaded in children only: two native GenAI libraries cannot
live in one process, memory does not come back, and a crash must not end the job. Each child leads a session of its own,
so that its whole group can be killed. It watches its standard input: when this process dies, for whatever reason, the
pipe closes and the child kills its group (see :mod:`slmops.processes.child`).
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, TypeVar, get_type_hints

import psutil
from pydantic import BaseModel

from slmops.core import errors, web
from slmops.core.files import scratch_folder
from slmops.processes import tree
from slmops.processes.child import DONE

SAMPLE_EVERY_S = 0.1
GRACE_S = 3.0
LOOKING = 0.02  # share of the time that may go into exact looks at memory
DISK_FULL = os.strerror(errno.ENOSPC)
FREE_SPACE = "Free some space and run again."
HANGS_S = 600.0
"""Seconds without a line of output, and without a second of CPU time, after which a child counts as hung."""

watchers: list[Callable[[float], None]] = []
"""They are told the memory in MB of the children at work, each time that one of them is sampled."""
_taken: dict[int, float] = {}  # MB by process

STEADY_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment of children whose memory or speed is measured; only glibc knows these variables.

By default glibc keeps freed memory in one pool per thread, and decides itself when the system gets it back. Then the
peak grows in steps of a whole key-value cache, and a request whose cache has to be paged in again takes half as long
again to its first token. One pool that keeps what it has is steady from the first requests on.
"""

Request = TypeVar("Request", bound=BaseModel)
Result = TypeVar("Result", bound=BaseModel)


@contextlib.contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that names the ``folder`` on it and the next step."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise errors.PrerequisiteError(f"The disk of {folder} is full.", FREE_SPACE) from None
        raise


@dataclass(frozen=True)
class Finished:
    """How a child ended."""

    returncode: int  # negative is the signal that killed it
    seconds: float
    memory: list[tuple[float, float]] = field(repr=False)  # time.monotonic() and MB of the whole process group
    stopped: str | None = None  # why, if it was

    @property
    def memory_peak_mb(self) -> float:
        """Highest sample, in MB (10^6 bytes)."""
        return max((mb for _, mb in self.memory), default=0.0)


def run(
    argv: Sequence[str],
    *,
    log: Path,
    timeout_s: float,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Finished:
    """Run ``argv`` to its end, or kill its whole group; its output is added to ``log``, its memory sampled.

    ``env`` is added to this process's own variables; ``on_line`` is called with each line of output as it comes. If the
    log cannot be written, for example because the disk is full, the child is stopped: a PrerequisiteError.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    return _watch(_start(argv, env, cwd), log, timeout_s, on_line)


def _start(argv: Sequence[str], env: dict[str, str] | None, cwd: Path | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        **tree.apart({**os.environ, **web.past_proxies(), **(env or {})}),
    )


def _watch(
    process: subprocess.Popen[bytes], log: Path, timeout_s: float, on_line: Callable[[str], None] | None
) -> Finished:
    """Wait until the child has ended, which it is made to in time, or says that a call is done."""
    started = active = time.monotonic()
    memory: list[tuple[float, float]] = []
    signs = 0
    stopped: str | None = None
    meter = Meter()
    output = _Output(process, log, on_line)
    output.start()
    try:
        while not output.done and process.poll() is None and output.failure is None and stopped is None:
            memory.append((now := time.monotonic(), meter.mb(process.pid)))
            _taken[process.pid] = memory[-1][1]
            for watcher in watchers:
                watcher(sum([*_taken.values()]))
            before, signs = signs, output.lines + meter.cpu_s()
            active = active if signs == before else now
            if now - started > timeout_s:
                stopped = f"It took longer than {timeout_s:g} s and was stopped."
            elif now - active > HANGS_S:
                stopped = f"It neither said nor did anything for {HANGS_S:g} s and was stopped."
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_EVERY_S)
    finally:
        _taken.pop(process.pid, None)
        if not output.done:
            _end(process, meter.members)
        output.join(GRACE_S)
    if output.failure is not None:
        raise errors.PrerequisiteError(f"{log} cannot be written: {output.failure.strerror}.", FREE_SPACE)
    return Finished(process.returncode or 0, time.monotonic() - started, memory, stopped)


def _end(process: subprocess.Popen[bytes], seen: Sequence[psutil.Process] = ()) -> None:
    known = [*seen, *tree.ask_to_end(process.pid)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    tree.kill(process.pid, known)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()


class Child:
    """A process for one call after the other, so that what they import and load is there once.

    A call during which it ends, or is stopped, costs nothing but itself: the next one has a new process. One that
    needs other variables has, too. The process ends with the ``with`` block.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._env: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            _end(self._process)
            if self._process.stdout is not None:
                self._process.stdout.close()

    def ask(self, label: Sequence[str], env: dict[str, str], cwd: Path | None, **call: Any) -> subprocess.Popen[bytes]:
        """Have a process do a call; a new one has the ``label`` in its command line."""
        if self._process is None or self._process.poll() is not None or env != self._env:
            self.__exit__()
            self._process, self._env = _start([sys.executable, "-m", "slmops.processes.child", *label], env, cwd), env
        assert self._process.stdin is not None  # noqa: S101 - for the type checker: it is a pipe
        with contextlib.suppress(OSError):  # it has just ended, as whoever waits for it will see
            self._process.stdin.write(json.dumps({**call, "cwd": str(cwd or Path.cwd())}).encode() + b"\n")
            self._process.stdin.flush()
        return self._process


def call(
    handle: Callable[[Request], Result],
    request: Request,
    *,
    log: Path,
    timeout_s: float,
    error: type[errors.WorkError],
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    within: Child | None = None,
) -> tuple[Result, Finished]:
    """Run a function of a worker module on ``request`` in a child, by default one of its own; return its result.

    A SlmopsError that the child raised is raised here; a full disk is a PrerequisiteError. If the child crashed, was
    killed, hung or took too long, ``error`` is raised with the end of the log. What is given back of a child that stays
    is the memory, before the call is done.
    """
    # torch's threads wait for each other by spinning, which takes two to four times the CPU time on a busy machine.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **(env or {})}
    with scratch_folder(log.parent, log.stem) as work, contextlib.ExitStack() as held:
        asked = within or held.enter_context(Child())
        request_file, result_file = work / "request.json", work / "result.json"
        request_file.write_text(request.model_dump_json(), encoding="utf-8")
        worker = f"{handle.__module__}:{handle.__name__}"
        files = {"request": str(request_file), "result": str(result_file)}
        process = asked.ask((worker, str(log)), env, cwd, worker=worker, **files, stays=within is not None)
        finished = _watch(process, log, timeout_s, on_line)
        text = result_file.read_text(encoding="utf-8") if result_file.exists() else None
    if finished.stopped is not None:
        raise error(finished.stopped, f"Its log: {log}")
    if text is None:
        said = last_words(log)
        if DISK_FULL in said:
            raise errors.PrerequisiteError(f"The disk of {log} is full.", FREE_SPACE)
        nothing = " and no result" if finished.returncode >= 0 else ""
        raise error(f"{died(finished.returncode)}{nothing}: {said}", f"Its log: {log}")
    answer = json.loads(text)
    if "error" in answer:
        raise errors.BY_NAME.get(answer["error"], error)(answer["message"], answer["fix"])
    result: type[Result] = get_type_hints(handle)["return"]
    return result.model_validate(answer["result"]), finished


def last_words(log: Path, lines: int = 3) -> str:
    """The last lines of a log that say something."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(said[-lines:]) or "it said nothing"


def died(returncode: int) -> str:
    """How a child ended, as the beginning of a sentence."""
    if returncode >= 0:
        return f"The process ended with status {returncode}"
    name = signal.Signals(-returncode).name
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"The process was killed by {name}{hint}"


class _Output(threading.Thread):
    """Copies what a process says into a log, until it ends or says that a call is done."""

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, on_line: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(daemon=True)
        self._stream, self._log, self._on_line = process.stdout, log, on_line
        self.done = False
        self.failure: OSError | None = None
        self.lines = 0

    def run(self) -> None:
        """Read to the end."""
        assert self._stream is not None  # noqa: S101 - for the type checker: it is a pipe
        try:
            with self._log.open("a", encoding="utf-8") as out:
                for raw in self._stream:
                    if raw != DONE:
                        self._take(raw.removesuffix(DONE), out)
                    if raw.endswith(DONE):
                        self.done = True
                        return
        except OSError as error:
            self.failure = error
        self._stream.close()

    def _take(self, raw: bytes, out: IO[str]) -> None:
        # A progress bar rewrites its line with carriage returns: keep the last state only.
        line = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]
        out.write(line + "\n")
        out.flush()
        self.lines += 1
        if self._on_line is not None:
            self._on_line(line)


class Meter:
    """Memory of a process group.

    For the proportional set size, which counts shared pages once, the kernel walks through all pages of a process, and
    the process waits meanwhile if it asks for memory: 40 ms for 1.5 GB, and ten such looks a second slowed a training
    on two cores by 40 %. So exact looks are rare. In between the resident size is taken, which costs nothing, less what
    was shared at the last exact look.
    """

    def __init__(self) -> None:
        self.members: list[psutil.Process] = []
        self._shared = 0
        self._next_look = 0.0

    def mb(self, pid: int) -> float:
        """Memory in MB (10^6 bytes) of the process and its children now; 0 if it is gone."""
        began = time.monotonic()
        if began >= self._next_look:
            self._shared = self._look(pid)
            self._next_look = began + (time.monotonic() - began) / LOOKING
        resident = sum(_size(member, exact=False)[0] for member in self.members)
        return max(0, resident - self._shared) / 1e6

    def cpu_s(self) -> int:
        """Whole seconds of CPU time that those have taken who were there at the last exact look."""
        return int(sum(_cpu(member) for member in self.members))

    def _look(self, pid: int) -> int:
        """Bytes of the resident size that count for other processes."""
        self.members = tree.members(pid) or self.members  # those that it leaves behind stay known
        sizes = [_size(member, exact=True) for member in self.members]
        return sum(resident - proportional for resident, proportional in sizes)


def _size(process: psutil.Process, *, exact: bool) -> tuple[int, int]:
    """Resident and proportional set size in bytes, which differ only if ``exact``. A process that is gone has none."""
    try:
        info = process.memory_full_info() if exact else process.memory_info()
    except psutil.Error:
        return 0, 0
    return info.rss, getattr(info, "pss", info.rss)


def _cpu(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
