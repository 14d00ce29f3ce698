"""Start a process apart from us, and end it with all that it started: the same calls on every system.

On POSIX it leads a session of its own, and signals go to its group, which outlives it. Windows has no such groups:
there Ctrl-Break asks those that share our console, and those are killed that psutil finds below the first.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import psutil

if sys.platform == "win32":
    ASKING = (signal.SIGTERM, signal.SIGBREAK)
else:
    ASKING = (signal.SIGTERM,)
"""Signals that ask a process to end, besides Ctrl-C. Prefect sends Ctrl-Break on Windows."""


def apart(env: dict[str, str], *, console: bool = True) -> dict[str, Any]:
    """Arguments of Popen for a process that Ctrl-C in our terminal does not reach; Python in it speaks UTF-8 at once.

    On Windows one without our ``console`` is not ended when its window is closed, but cannot be asked to end either.
    """
    # From 1.29 on, ONNX Runtime reports its use to Microsoft some seconds after it is imported.
    env = {**env, "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if sys.platform == "win32":
        hidden = 0 if console else subprocess.CREATE_NO_WINDOW
        return {"env": env, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | hidden}
    return {"env": env, "start_new_session": True}


def members(pid: int) -> list[psutil.Process]:
    """A process with all that it started and that has not lost its parent; none if it is gone itself."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def ask_to_end(pid: int) -> list[psutil.Process]:
    """Ask a process that was started apart, and its group, to end; returns who is to be killed if it stays.

    One that is gone is no error.
    """
    there: list[psutil.Process] = []
    with contextlib.suppress(OSError):
        if sys.platform != "win32":
            os.killpg(pid, signal.SIGTERM)
        elif there := members(pid):  # for a group that is gone Windows may ask all of our console, us too
            os.kill(pid, signal.CTRL_BREAK_EVENT)
    return there


def kill(pid: int, known: Iterable[psutil.Process] = ()) -> None:
    """Kill a process that was started apart with all that it started; on Windows also those that are ``known``.

    These it may have left behind: whose children they were cannot be asked when their parent is gone.
    """
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    else:
        _kill({*known, *members(pid)})


def kill_own() -> NoReturn:
    """Kill this process with all that it started."""
    if sys.platform == "win32":
        _kill(members(os.getpid())[1:])
    elif os.getpgrp() == os.getpid():
        kill(os.getpid())
    os._exit(1)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()  # psutil refuses if the process id is another process by now


def in_session(pid: int, leader: int) -> bool:
    """Whether a process may belong to the session of a ``leader`` that may be gone; an OSError if it is gone itself.

    Windows has no sessions: any may.
    """
    return sys.platform == "win32" or os.getsid(pid) == leader
