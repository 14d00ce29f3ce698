"""A server process of ours that goes on when we end. Any later process can find it, ask it and stop it.

It leads a session of its own. Its process id and the time of its creation identify it, so that another process that got
the same id later is never touched.
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import psutil

from slmops.core.errors import PrerequisiteError
from slmops.core.files import keep_log
from slmops.core.values import Frozen
from slmops.processes import tree

HOST = "127.0.0.1"
MARK = "SLMOPS_STACK"
HEALTH_S = 3.0
STOP_S = 10.0
PORTS_TRIED = 100

_children: list[subprocess.Popen[bytes]] = []  # started by this process, which must reap them when they end


class Daemon(Frozen):
    """A detached server, in a form that can be written down."""

    pid: int
    created: float
    url: str
    mark: str = ""  # in its environment, and that of all that it starts

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def spawn(argv: Sequence[str], *, port: int, mark: str, env: dict[str, str], log: Path) -> Daemon:
    """Start a server detached from this process and its terminal, with ``env`` as its whole environment.

    By the ``mark`` in its environment it and its offspring are known. The ``log`` before is kept, with ``.1`` added.
    """
    keep_log(log)
    with log.open("wb") as out:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=log.parent,  # not the user's folder, whose .env and prefect.toml Prefect would read
            **tree.apart({**env, MARK: mark}, console=False),
        )
    _children.append(child)
    return of(child, url=f"http://{HOST}:{port}", mark=mark)


def of(child: subprocess.Popen[bytes], *, url: str, mark: str = "") -> Daemon:
    """The daemon whose first process was just started."""
    return Daemon(pid=child.pid, created=psutil.Process(child.pid).create_time(), url=url, mark=mark)


def leader(daemon: Daemon) -> psutil.Process | None:
    """Its first process, if it is alive."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(daemon.pid)
        # Seconds, not equality: the creation time moves with the system clock when that is set.
        if abs(first.create_time() - daemon.created) < 2 and _lives(first):
            return first
    return None


def healthy(daemon: Daemon, path: str, body: str) -> bool:
    """Whether this server itself answers ``body`` at ``path``, and not another one at its port."""
    first = leader(daemon)
    return first is not None and _listens(first, daemon.port) and problem(daemon.url + path, body) is None


def problem(url: str, body: str, *, given: bool = False) -> str | None:
    """Why the server cannot be used that answers ``body`` at ``url`` when it is healthy; None if it can.

    If the user has ``given`` it, the proxy settings of the environment apply to it. If it then wants to know who we
    are, it is healthy: the client that comes later has the key.
    """
    import httpx

    try:
        response = httpx.get(url, timeout=HEALTH_S, trust_env=given)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    if given and response.status_code in (401, 403):
        return None
    if response.status_code != 200 or response.text.strip() != body:
        return f"{url} answers with status {response.status_code}, but not like such a server"
    return None


def stop(daemon: Daemon) -> bool:
    """End it and all that belongs to it, with force after a while; returns whether there was anything.

    The offspring goes first. A worker that is stopped kills its flow runs, which then stay "running" for ever; a flow
    run that is asked to end tells the server.
    """
    members = _members(daemon)
    offspring = [member for member in members if member.pid != daemon.pid]
    ask = psutil.Process.terminate  # on Windows it is an end by force, too
    for end, group in ((ask, offspring), (ask, members), (psutil.Process.kill, members)):
        living = [member for member in group if _lives(member)]
        for member in living:
            with contextlib.suppress(psutil.Error):
                end(member)  # psutil refuses if the process id is another process by now
        deadline = time.monotonic() + STOP_S
        while any(_lives(member) for member in living) and time.monotonic() < deadline:
            time.sleep(0.05)
    _children[:] = [child for child in _children if child.poll() is None]
    return bool(members)


def free_port(first: int, taken: Collection[int]) -> int:
    """The first free port from ``first`` on that is not in ``taken``; a PrerequisiteError if none of a hundred is."""
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        if port in taken:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As the servers do: a port is free even if connections to its last owner have not timed out yet. Windows
            # does not wait for these, and with this option it gives a port that somebody listens at.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(sys.platform != "win32"))
            probe.bind((HOST, port))
            return port
    advice = "Set SLMOPS_PREFECT_PORT and SLMOPS_MLFLOW_PORT to a free range."
    raise PrerequisiteError(f"No port is free from {first} on.", advice)


def _listens(first: psutil.Process, port: int) -> bool:
    with contextlib.suppress(psutil.Error):
        connections = (one for member in tree.members(first.pid) for one in member.net_connections("tcp"))
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)
    return False


def _members(daemon: Daemon) -> list[psutil.Process]:
    """Its first process with all offspring (a worker's flow runs have sessions of their own), and its session.

    The session outlives a leader that was killed, and such orphans still hold the port and the database. The number of
    the session does not prove that they are ours; the mark in their environment does.
    """
    members = tree.members(daemon.pid) if leader(daemon) else []
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            near = other not in members and tree.in_session(other.pid, daemon.pid)
            if near and other.environ().get(MARK) == daemon.mark:
                members.append(other)
    return members


def _lives(member: psutil.Process) -> bool:
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
