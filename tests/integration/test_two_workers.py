"""A job on two machines, of which one is lost in the middle, while the servers are restarted.

The servers are those of docker-compose.yml, on PostgreSQL. Where this process may make network and mount namespaces, a
machine is one of each, and of process ids: of the network it sees one address, of the folders of the other machines
nothing, and to kill it is to kill all that runs on it at once. Elsewhere it is a process with folders of its own.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from slmops.conversion import store
from slmops.core.values import Comparison
from tests import making
from tests.compose import ROOT, Compose

pytestmark = pytest.mark.integration

NAME, POOL = "tiny", "many"
PATIENCE_S = 300.0
NETWORK = "10.213"
BLOCK = 64 * 1024


@dataclass
class Machine:
    name: str
    root: Path  # the only folder that it writes to
    host: str  # where it finds what listens on 127.0.0.1 here
    prefix: tuple[str, ...]  # what a command has to begin with to run there

    def start(self, prefect: int, mlflow: int) -> None:
        """Run a worker there, in an environment of its own."""
        command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", "1"]
        command += ["--name", self.name, "--install-policy", "never"]
        own = {name: str(self.root / name.lower()) for name in ("HOME", "TMPDIR", "PREFECT_HOME", "SLMOPS_HOME")}
        (self.root / "tmpdir").mkdir()
        with (self.root / "log").open("wb") as out:
            self.worker = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", *command],
                cwd=self.root,
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONUNBUFFERED": "1",
                    "PREFECT_API_URL": f"http://{self.host}:{prefect}/api",
                    "SLMOPS_TRACKING_URI": f"http://{self.host}:{mlflow}",
                    "PREFECT_WORKER_QUERY_SECONDS": "1",
                    "DO_NOT_TRACK": "true",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    **own,
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, module: str = "") -> list[psutil.Process]:
        """What runs there with this in its command line."""
        named = []
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(self.worker.pid)
            for process in (leader, *leader.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    named += [process] * (module in " ".join(process.cmdline()))
        return named

    def kill(self) -> None:
        members = self.processes() if self.worker.returncode is None else []  # or others may have its number
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        self.worker.wait(10)
        psutil.wait_procs(members, 10)

    def said(self) -> str:
        return (self.root / "log").read_text(encoding="utf-8", errors="replace")


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
    """Set machines up (at most 5 letters each) in a folder, which stays; they reach ``ports`` of 127.0.0.1 here."""
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


@pytest.fixture(scope="module")
def servers() -> Iterator[Compose]:
    with Compose({"POSTGRES_PASSWORD": "secret"}) as compose:
        compose.services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"] += f",{NETWORK}.*"
        compose.up("prefect", "mlflow")
        yield compose


@dataclass
class Finished:
    """What the job has printed, and what Prefect has of its parts."""

    comparison: Comparison
    parts: list[dict[str, Any]]
    home: Path
    workers: list[Machine]
    lost: Machine


@pytest.fixture(scope="module")
def finished(servers: Compose, talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("machines")
    job = folder / "job"
    job.mkdir()
    ports = [servers.ports[name] for name in ("prefect", "mlflow")]
    with machines(("one", "two"), folder, ports, [job, talkative.parent]) as workers:
        for worker in workers:
            worker.start(*ports)
            until(lambda: POOL in [one["name"] for one in servers.ask("/work_pools/filter", {})], "the pool is there")
        child = start_job(servers, talkative, job)
        try:
            lost = until(lambda: in_a_second_conversion(workers), "a machine converts for the second time")
            lost.kill()
            for service in ("postgres", "prefect", "mlflow"):
                servers.stop(service)
                servers.start(service)
            out, _ = child.communicate(timeout=PATIENCE_S)
        finally:
            child.kill()
        log = (job / "log").read_text(encoding="utf-8")
        assert child.returncode == 0, "\n".join([log, *(f"--- {one.name}\n{one.said()}" for one in workers)])
        parts = servers.ask("/flow_runs/filter", {"flows": {"name": {"any_": ["variant"]}}})
        yield Finished(Comparison.model_validate_json(out), parts, job / "home", workers, lost)


def start_job(servers: Compose, model: Path, folder: Path) -> subprocess.Popen[bytes]:
    """``slmops run`` as its user would start it."""
    asked_for = ["--model", str(model), "--name", NAME, "--precision", "int8", "--precision", "int4", "--quick"]
    given = ["--evaluation-set", str(making.evaluation_set(folder))]
    (folder / "tmp").mkdir()
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("slmops")), "run", *asked_for, *given, "--json"],
            cwd=ROOT,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                "TMPDIR": str(folder / "tmp"),
                "SLMOPS_HOME": str(folder / "home"),
                "SLMOPS_POOLS": json.dumps([{"name": POOL, "memory_gb": 1}, {"name": "larger", "memory_gb": 64}]),
                **dict.fromkeys(("PREFECT_API_URL", "SLMOPS_PREFECT_API_URL"), servers.prefect_api_url),
                **dict.fromkeys(("MLFLOW_TRACKING_URI", "SLMOPS_TRACKING_URI"), servers.tracking_uri),
            },
            stdout=subprocess.PIPE,
            stderr=log,
        )


def in_a_second_conversion(workers: list[Machine]) -> Machine | None:
    """The machine that has converted and does so again."""
    for worker in workers:
        said = worker.said()  # both may submit the same run, and one of them gives it up
        began = said.count("submitting flow run") - said.count("Aborted submission")
        if began == 2 and worker.processes("olive_worker"):
            return worker
    return None


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def test_the_job_finishes_as_if_nothing_had_happened(finished: Finished) -> None:
    results = {result.name: result for result in finished.comparison.variants}
    assert {name: result.status for name, result in results.items()} == dict.fromkeys(("fp32", "int8", "int4"), "ok")
    for result in results.values():
        assert result.reason is None
        assert result.metrics.keys() == {*making.UNITS, *making.RELATIVE_UNITS}
        assert result.path.parent == finished.home / "variants"
        assert store.load(result.path).name == result.name
        assert [log.name for log in (finished.home / "logs" / NAME).glob(f"{result.name}.olive.log")]


def test_both_machines_took_part_and_what_was_lost_was_done_again(finished: Finished, servers: Compose) -> None:
    for worker in finished.workers:
        assert "Finished in state Completed()" in worker.said()
        assert list((worker.root / "slmops_home" / "variants").iterdir())
        assert not list((worker.root / "slmops_home").glob("work/.*")) or worker is finished.lost
    states: dict[str, list[str]] = {}
    for part in finished.parts:
        assert part["parent_task_run_id"] is not None
        states.setdefault(part["name"], []).append(part["state_name"])
    crashed = [part for part in finished.parts if part["state_name"] == "Crashed"]
    # On a busy machine the restart of the servers may take another part's signs of life, too.
    [lost] = [part for part in crashed if part["labels"]["prefect.worker.name"] == finished.lost.name]
    assert lost["name"].startswith("convert ")
    assert lost["state"]["message"].startswith("There was no sign of life for 6")
    wanted = {f"{stage} {name} of {NAME}" for stage in ("convert", "measure") for name in ("fp32", "int8", "int4")}
    assert states.keys() == wanted
    assert all(found.count("Completed") == 1 for found in states.values())

    # The files on their way are gone.
    client = MlflowClient(servers.tracking_uri)
    experiment = client.get_experiment_by_name(NAME)
    files = client.search_runs([experiment.experiment_id], "tags.`slmops.kind` = 'files'", ViewType.ALL)
    assert [run.info.lifecycle_stage for run in files] == ["deleted"]
    assert files[0].data.tags["mlflow.parentRunId"] == finished.comparison.run_id
    versions = {version.tags["slmops.variant"] for version in client.search_model_versions(f"name = '{NAME}'")}
    assert finished.comparison.choice.variant in versions


@pytest.mark.skipif(not isolated(), reason="no namespaces can be made here: the machines are plain processes")
def test_the_machines_see_nothing_of_each_other(finished: Finished) -> None:
    [survivor] = [worker for worker in finished.workers if worker is not finished.lost]
    seen = f"ls -A {finished.lost.root} {finished.home.parent}; cat /proc/net/dev /proc/net/tcp"
    shown = subprocess.run([*survivor.prefix, "sh", "-c", seen], capture_output=True, text=True, check=True).stdout
    assert "log" not in shown.split()
    assert f"{finished.lost.name}" not in shown.split()
