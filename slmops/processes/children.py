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
from typing import IO, TypeVar, get_type_hints

import psutil
from pydantic import BaseModel

from slmops.core import errors, web
from slmops.core.files import scratch_folder

SAMPLE_EVERY_S = 0.1
GRACE_S = 3.0
LOOKING = 0.02  # share of the time that may go into exact looks at memory
DISK_FULL = os.strerror(errno.ENOSPC)
FREE_SPACE = "Free some space and run again."

watchers: list[Callable[[float], None]] = []
"""They are told the memory of a child in MB each time that it is sampled."""

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
    timed_out: bool

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
    started = time.monotonic()
    memory: list[tuple[float, float]] = []
    timed_out = False
    meter = Meter()
    child = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **web.past_proxies(), **(env or {})},
        cwd=cwd,
        start_new_session=True,
    )
    assert child.stdin is not None  # noqa: S101 - for the type checker: both are pipes
    assert child.stdout is not None  # noqa: S101
    failures: list[OSError] = []
    reader = threading.Thread(target=_copy_output, args=(child.stdout, log, on_line, failures), daemon=True)
    reader.start()
    try:
        while child.poll() is None and not failures and not timed_out:
            memory.append((time.monotonic(), meter.mb(child.pid)))
            for watcher in watchers:
                watcher(memory[-1][1])
            timed_out = time.monotonic() - started > timeout_s
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(SAMPLE_EVERY_S)
    finally:
        for sig in (signal.SIGTERM, signal.SIGKILL):  # to all that it started, too
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
        with contextlib.suppress(OSError):
            child.stdin.close()
        reader.join(GRACE_S)
    if failures:
        raise errors.PrerequisiteError(f"{log} cannot be written: {failures[0].strerror}.", FREE_SPACE)
    return Finished(child.returncode, time.monotonic() - started, memory, timed_out)


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
) -> tuple[Result, Finished]:
    """Run a function of a worker module on ``request`` in a child and return its result.

    A SlmopsError that the child raised is raised here; a full disk is a PrerequisiteError. If the child crashed, was
    killed or took too long, ``error`` is raised with the end of the log.
    """
    # torch's threads wait for each other by spinning, which takes two to four times the CPU time on a busy machine.
    env = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE", **(env or {})}
    with scratch_folder(log.parent, log.stem) as work:
        request_file, result_file = work / "request.json", work / "result.json"
        request_file.write_text(request.model_dump_json(), encoding="utf-8")
        worker = f"{handle.__module__}:{handle.__name__}"
        argv = [sys.executable, "-m", "slmops.processes.child", worker, str(request_file), str(result_file)]
        finished = run(argv, log=log, timeout_s=timeout_s, env=env, cwd=cwd, on_line=on_line)
        text = result_file.read_text(encoding="utf-8") if result_file.exists() else None
    if finished.timed_out:
        raise error(f"It took longer than {timeout_s:.0f} s and was stopped.", f"Its log: {log}")
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


def _copy_output(stream: IO[bytes], log: Path, on_line: Callable[[str], None] | None, failures: list[OSError]) -> None:
    try:
        with stream, log.open("a", encoding="utf-8") as out:
            for raw in stream:
                # A progress bar rewrites its line with carriage returns: keep the last state only.
                line = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]
                out.write(line + "\n")
                out.flush()
                if on_line is not None:
                    on_line(line)
    except OSError as error:
        failures.append(error)


class Meter:
    """Memory of a process group.

    For the proportional set size, which counts shared pages once, the kernel walks through all pages of a process, and
    the process waits meanwhile if it asks for memory: 40 ms for 1.5 GB, and ten such looks a second slowed a training
    on two cores by 40 %. So exact looks are rare. In between the resident size is taken, which costs nothing, less what
    was shared at the last exact look.
    """

    def __init__(self) -> None:
        self._members: list[psutil.Process] = []
        self._shared = 0
        self._next_look = 0.0

    def mb(self, pid: int) -> float:
        """Memory in MB (10^6 bytes) of the process and its children now; 0 if it is gone."""
        began = time.monotonic()
        if began >= self._next_look:
            self._shared = self._look(pid)
            self._next_look = began + (time.monotonic() - began) / LOOKING
        resident = sum(_size(member, exact=False)[0] for member in self._members)
        return max(0, resident - self._shared) / 1e6

    def _look(self, pid: int) -> int:
        """Bytes of the resident size that count for other processes."""
        try:
            leader = psutil.Process(pid)
            self._members = [leader, *leader.children(recursive=True)]
        except psutil.Error:
            self._members = []
        sizes = [_size(member, exact=True) for member in self._members]
        return sum(resident - proportional for resident, proportional in sizes)


def _size(process: psutil.Process, *, exact: bool) -> tuple[int, int]:
    """Resident and proportional set size in bytes, which differ only if ``exact``. A process that is gone has none."""
    try:
        info = process.memory_full_info() if exact else process.memory_info()
    except psutil.Error:
        return 0, 0
    return info.rss, getattr(info, "pss", info.rss)
