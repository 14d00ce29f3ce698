"""Machines for a test: processes that share nothing but the servers they are told of.

Where this process may make network and mount namespaces, a machine is one of each, and of process ids: of the network
it sees one address, of the folders of the other machines nothing, and to kill it is to kill all that runs on it at
once. Elsewhere it is a process with folders of its own.
"""

import contextlib
import os
import shlex
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORK = "10.213"
BLOCK = 64 * 1024


@dataclass
class Machine:
    """One of them."""

    name: str
    root: Path  # the only folder that it writes to
    host: str  # where it finds what listens on 127.0.0.1 here
    prefix: tuple[str, ...]  # what a command has to begin with to run there
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Run a command there, in an environment of nothing but ``env``."""
        own = {name: str(self.root / name.lower()) for name in ("HOME", "TMPDIR", "PREFECT_HOME", "SLMOPS_HOME")}
        (self.root / "tmpdir").mkdir(exist_ok=True)
        with (self.root / "log").open("ab") as out:
            child = subprocess.Popen(
                [*self.prefix, *argv],
                cwd=self.root,
                env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", **own, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(child)

    def processes(self, module: str = "") -> list[psutil.Process]:
        """What runs there with this in its command line."""
        named = []
        for one in self.running:
            with contextlib.suppress(psutil.Error):
                leader = psutil.Process(one.pid)
                for process in (leader, *leader.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        named += [process] * (module in " ".join(process.cmdline()))
        return named

    def kill(self) -> None:
        """As if somebody pulled the plug."""
        members = self.processes()
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        for one in self.running:
            one.wait(10)
        psutil.wait_procs(members, 10)
        self.running.clear()

    def said(self) -> str:
        log = self.root / "log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def isolated() -> bool:
    """Whether machines can be more than processes here."""
    if os.geteuid() != 0 or not all(shutil.which(program) for program in ("ip", "unshare", "mount")):
        return False
    name = f"slmops-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        for command in (f"ip netns add {name}", f"ip netns exec {name} unshare --mount --pid --fork true"):
            if subprocess.run(shlex.split(command), capture_output=True, check=False).returncode != 0:
                return False
            stack.callback(_run, f"ip netns del {name}", check=False)
    return True


@contextlib.contextmanager
def machines(
    names: Sequence[str], folder: Path, ports: Sequence[int], hidden: Sequence[Path]
) -> Iterator[list[Machine]]:
    """Set machines up in a folder; afterwards nothing of them is left but their folders.

    Args:
        names: At most 5 letters each.
        ports: What listens on 127.0.0.1 and is to be reached from them.
        hidden: Folders that they must not see.
    """
    roots = {name: folder / name for name in names}
    apart = isolated()
    with contextlib.ExitStack() as stack:
        made = []
        for number, (name, root) in enumerate(roots.items(), 1):
            root.mkdir()
            here, prefix = "127.0.0.1", ()
            if apart:
                here = f"{NETWORK}.{number}.1"
                covers = [*hidden, *(other for other in roots.values() if other != root)]
                prefix = _separate(stack, name, here, f"{NETWORK}.{number}.2", covers)
                for port in ports:
                    stack.enter_context(_forwarded(here, port))
            made.append(Machine(name, root, here, prefix))
            stack.callback(made[-1].kill)
        yield made


def _separate(stack: contextlib.ExitStack, name: str, here: str, there: str, covers: Sequence[Path]) -> tuple[str, ...]:
    """Make a network of two addresses until the stack ends; returns what runs a command at the one over there."""
    space, link = f"slmops-{os.getpid()}-{name}", f"s{os.getpid() % 100000}{name}"
    _run(f"ip netns add {space}")
    stack.callback(_run, f"ip netns del {space}", check=False)
    _run(f"ip link add {link} type veth peer name eth0 netns {space}")
    _run(f"ip addr add {here}/30 dev {link}")
    _run(f"ip link set {link} up")
    for command in (f"addr add {there}/30 dev eth0", "link set eth0 up", "link set lo up"):
        _run(f"ip -n {space} {command}")
    mounts = "".join(f"mount -t tmpfs none {shlex.quote(str(path))} && " for path in covers)
    alone = "unshare --mount --pid --fork --kill-child --mount-proc sh -c"
    return (*shlex.split(f"ip netns exec {space} {alone}"), f'{mounts}exec "$@"', "sh")


def _run(command: str, *, check: bool = True) -> None:
    subprocess.run(shlex.split(command), check=check, capture_output=True)


@contextlib.contextmanager
def _forwarded(host: str, port: int) -> Iterator[None]:
    """What listens on 127.0.0.1, at another address of this machine."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as inside:
                back = threading.Thread(target=_copy, args=(inside, self.request), daemon=True)
                back.start()
                _copy(self.request, inside)
                back.join()

    with socketserver.ThreadingTCPServer((host, port), Handler, bind_and_activate=False) as server:
        server.allow_reuse_address = server.daemon_threads = True
        server.block_on_close = False
        server.server_bind()
        server.server_activate()
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(BLOCK):
            target.sendall(block)
    for one in (source, target):  # half-open connections would keep a client waiting for a server that is gone
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
