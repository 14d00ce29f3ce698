"""Let the stack of docker-compose.yml work for a while, kill a part of it each minute, and print what was lost.

    python -m benchmarks.soak [MINUTES [SEED]]        from the root of the checkout, where a Docker engine answers

Two workers retrain a tiny model every five minutes and promote what comes out of it, and every seven minutes somebody
rolls back. Four clients ask the endpoint without a pause, and two devices pull the champion every half minute. What is
killed, by SIGKILL to all processes of a container, is drawn from a list with the seed. In the end all runs are waited
for. The list of kills goes to standard error, the table to standard output.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx

from slmops.core import machine
from slmops.evaluation import statistics
from slmops.tracking.registry import Registry
from tests import docker, making
from tests.docker import NAME, Containers

PARTS = ("worker", "prefect", "mlflow", "serve", "runtime")
KILL_S, RETRAIN_S, ROLL_BACK_S, PULL_S, SAMPLE_S = 60, 300, 420, 30, 10
CLIENTS, DEVICES = 4, 2
LAST_S = 1800.0  # for the last runs; one that is silent takes five minutes to be seen
RUNTIME = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if b"service_worker" in (process / "cmdline").read_bytes() and process.name != str(os.getpid()):
        os.kill(int(process.name), signal.SIGKILL)
"""


class Soak:
    """What goes on at the same time, and what came of it."""

    def __init__(self, stack: Containers, folder: Path, seed: int) -> None:
        self.stack = stack
        self.folder = folder
        self.kills: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.pulls: Counter[str] = Counter()
        self.started: list[str] = []
        self.memory: dict[str, list[float]] = defaultdict(list)
        self._random = random.Random(seed)  # noqa: S311 - so that it can be repeated
        self._over = threading.Event()

    def go_on(self, seconds: float) -> None:
        """Do all of it for a while."""
        tasks = [self._every(KILL_S, self._kill), self._every(SAMPLE_S, self._sample)]
        tasks += [self._every(RETRAIN_S, self._retrain, at_once=True), self._every(ROLL_BACK_S, self._roll_back)]
        tasks += [self._every(0, self._ask) for _ in range(CLIENTS)]
        tasks += [self._every(PULL_S, partial(self._pull, device)) for device in range(DEVICES)]
        threads = [threading.Thread(target=task) for task in tasks]
        for thread in threads:
            thread.start()
        self._over.wait(seconds)
        self._over.set()
        for thread in threads:
            thread.join()

    def _every(self, seconds: float, do: Callable[[], None], *, at_once: bool = False) -> Callable[[], None]:
        def task() -> None:
            if at_once:
                do()
            while not self._over.wait(seconds):
                do()

        return task

    def _kill(self) -> None:
        part = self._random.choice(PARTS)
        print(f"{time.strftime('%H:%M:%S')} kill {part}", file=sys.stderr)
        with suppress(AssertionError, IndexError):  # it is just starting again from the last time
            if part == "runtime":
                self.stack("exec", "-T", "serve", "python", "-c", RUNTIME)
            else:
                self.stack.crash(self._random.choice(sorted(self.stack.running(part))))
            self.kills[part] += 1

    def _retrain(self) -> None:
        self._start(lambda: self.stack.retrain(100 + len(self.started)))

    def _roll_back(self) -> None:
        self._start(lambda: self.stack.start("rollback", {"name": NAME}))

    def _start(self, start: Callable[[], str]) -> None:
        """Start a run, once Prefect answers."""
        while not self._over.is_set():
            with suppress(httpx.HTTPError, AssertionError):
                self.started.append(start())
                return
            self._over.wait(2)

    def _ask(self) -> None:
        try:
            status = self.stack.answer().status_code
            self.answers["answered" if status == 200 else f"status {status}"] += 1
        except httpx.TimeoutException:
            self.answers["without an answer in time"] += 1
        except httpx.TransportError:
            self.answers["killed connections"] += 1
            self._over.wait(0.5)

    def _pull(self, device: int) -> None:
        home = str(self.folder / f"device-{device}")
        env = {**os.environ, "SLMOPS_HOME": home, "SLMOPS_TRACKING_URI": self.stack.mlflow}
        command = [sys.executable, "-m", "slmops.cli", "pull", NAME]
        ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        last = ended.stderr.strip().splitlines()[-2:] if ended.returncode else ["pulled"]
        self.pulls[" ".join(last)[:200]] += 1

    def _sample(self) -> None:
        """Memory of each container in MB, without the page cache."""
        with suppress(AssertionError):
            for line in docker.docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}").splitlines():
                name, used = line.split()[:2]
                if name.startswith(self.stack.project):
                    self.memory[name.removeprefix(f"{self.stack.project}-")].append(megabytes(used))

    def report(self, minutes: float) -> str:
        """Wait for all runs, and say in a table of Markdown what came of it."""
        self.stack("--profile", "serve", "up", "--detach", "--wait", "--scale", "worker=2")
        making.until(lambda: not self._unfinished(), "all runs have ended", LAST_S)
        states = Counter(self.stack.state(run) for run in self.started)
        registry = Registry(self.stack.mlflow)
        whole = registry.versions(NAME)
        url = f"{self.stack.mlflow}/api/2.0/mlflow/model-versions/search"
        found = httpx.get(url, params={"filter": f"name='{NAME}'", "max_results": 10000}, trust_env=False).json()
        failed = self.answers.total() - self.answers["answered"] - self.answers["killed connections"]
        rows = {
            "minutes": f"{minutes:.0f}",
            "killed": _counts(self.kills),
            "runs started": f"{len(self.started)}: {_counts(states)}",
            "runs lost": str(len(self.started) - states["COMPLETED"] - states["FAILED"]),
            "versions": str(len(found["model_versions"])),
            "versions half registered": str(len(found["model_versions"]) - len(whole)),
            "requests answered": str(self.answers["answered"]),
            "requests failed": f"{failed} ({_counts(self.answers)})",
            "pulls": _counts(self.pulls),
            "slots taken at the end": str(self.stack.slots_taken()),
        }
        for name, samples in sorted(self.memory.items()):
            with suppress(ValueError):  # too few
                slope = statistics.slope(samples, "MB")
                each = len(samples) * 60 / minutes  # a sample takes seconds by itself
                interval = f"{(slope.low or 0) * each:+.0f} to {(slope.high or 0) * each:+.0f}"
                rows[f"memory of {name}"] = f"{samples[-1]:.0f} MB, {slope.value * each:+.1f} MB/h ({interval})"
        return "\n".join(["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows.items())])

    def failures(self) -> list[str]:
        """What the runs that have failed said."""
        return [self.stack.told(run) for run in self.started if self.stack.state(run) != "COMPLETED"]

    def _unfinished(self) -> list[str]:
        try:
            return [run for run in self.started if self.stack.state(run) not in ("COMPLETED", "FAILED")]
        except (httpx.HTTPError, AssertionError):
            return ["?"]


def megabytes(text: str) -> float:
    """Docker's ``1.5GiB`` in MB (10^6 bytes)."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
    unit = next(unit for unit in units if text.endswith(unit))
    return float(text.removesuffix(unit)) * units[unit] / 1e6


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.most_common()) or "none"


def main(minutes: float, seed: int) -> int:
    """Set up, soak, print, clean up; returns the exit status."""
    if reason := docker.missing():
        print(f"A Docker engine is needed: {reason}", file=sys.stderr)
        return 2
    docker.build()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        folder.chmod(0o755)
        stack = Containers(f"slmops-soak-{os.getpid()}", folder)
        try:
            stack.up("--scale", "worker=2")
            stack.finish(stack.start("deploy", stack.retraining(1)))
            stack.finish(stack.retrain(1))
            stack("--profile", "serve", "up", "--detach", "--wait", "--scale", "worker=2")
            soak = Soak(stack, folder, seed)
            soak.go_on(minutes * 60)
            here = machine.hardware()
            print(f"{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}, seed {seed}\n")
            print(soak.report(minutes))
            print("\n\n".join(soak.failures()), file=sys.stderr)
        finally:
            stack("--profile", "*", "down", "--volumes", "--remove-orphans")
    return 0


if __name__ == "__main__":
    given = [float(argument) for argument in sys.argv[1:]]
    sys.exit(main(given[0] if given else 60, int(given[1]) if given[1:] else 0))
