"""A job on two machines, of which one is lost in the middle, while the servers are restarted.

The servers are those of docker-compose.yml, on PostgreSQL. A machine is a process with folders of its own; where this
process may make namespaces, it sees nothing of the folders of the others.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
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
SILENT_S = 75  # without a heartbeat, of which there is one in 30 seconds


@dataclass
class Machine:
    name: str
    root: Path  # the only folder that it writes to
    prefix: tuple[str, ...]  # what a command has to begin with to run there

    def start(self, servers: Compose) -> None:
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
                    "PREFECT_API_URL": servers.prefect_api_url,
                    "SLMOPS_TRACKING_URI": servers.tracking_uri,
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


def apart(covers: Sequence[Path]) -> tuple[str, ...]:
    """What runs a command where these folders are empty and no other process is seen; nothing if that needs root."""
    mounts = "".join(f"mount -t tmpfs none {shlex.quote(str(path))} && " for path in covers)
    prefix = (*shlex.split("unshare --mount --pid --fork --kill-child --mount-proc sh -c"), f'{mounts}exec "$@"', "sh")
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return ()


@contextlib.contextmanager
def machines(names: Sequence[str], folder: Path, hidden: Sequence[Path]) -> Iterator[list[Machine]]:
    """Machines in a folder, which stays; each sees neither the others' folders nor the ``hidden`` ones."""
    roots = {name: folder / name for name in names}
    for root in roots.values():
        root.mkdir()
    made = [
        Machine(name, root, apart([*hidden, *(other for other in roots.values() if other != root)]))
        for name, root in roots.items()
    ]
    try:
        yield made
    finally:
        for machine in made:
            machine.kill()


@pytest.fixture(scope="module")
def servers() -> Iterator[Compose]:
    with Compose({"POSTGRES_PASSWORD": "secret"}) as compose:
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
    with machines(("one", "two"), folder, [job, talkative.parent]) as workers:
        for worker in workers:
            worker.start(servers)
            making.until(partial(has_pool, servers), "the pool is there", PATIENCE_S)
        child = start_job(servers, talkative, job)
        try:
            making.until(partial(watches_closely, servers), "the job has Prefect look for lost runs", PATIENCE_S)
            twice = partial(in_a_second_conversion, workers)
            lost = making.until(twice, "a machine converts for the second time", PATIENCE_S)
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


def has_pool(servers: Compose) -> bool:
    return POOL in [one["name"] for one in servers.ask("/work_pools/filter", {})]


def watches_closely(servers: Compose) -> bool:
    """Whether Prefect looks for silent runs; if so, it has to notice them sooner from now on."""
    for one in servers.ask("/automations/filter", {}):
        if one["name"] == "slmops: silent runs crash":
            one["trigger"]["within"] = SILENT_S
            body = {name: one[name] for name in ("name", "description", "enabled", "trigger", "actions")}
            url = f"{servers.prefect_api_url}/automations/{one['id']}"
            return httpx.put(url, json=body, timeout=30, trust_env=False).raise_for_status().is_success
    return False


def in_a_second_conversion(workers: list[Machine]) -> Machine | None:
    """The machine that has converted and does so again."""
    for worker in workers:
        said = worker.said()  # both may submit the same run, and one of them gives it up
        began = said.count("submitting flow run") - said.count("Aborted submission")
        if began == 2 and worker.processes("olive_worker"):
            return worker
    return None


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
    assert lost["state"]["message"] == "Its process gives no sign of life any more."
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
