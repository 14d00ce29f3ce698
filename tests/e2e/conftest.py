"""The program as a user has it: the command in a process of its own, with a home and ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.core.job import Job
from slmops.core.settings import Settings
from tests import making
from tests.compose import free_ports

START_S = 300


class Command:
    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLMOPS_", "PREFECT_", "MLFLOW_"))}
        prefect, mlflow = map(str, free_ports(2))
        self.env = {**kept, "SLMOPS_HOME": str(home), "SLMOPS_PREFECT_PORT": prefect, "SLMOPS_MLFLOW_PORT": mlflow}

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        env = {**self.env, **env}
        return subprocess.run(self._argv(arguments), env=env, capture_output=True, text=True, check=False)

    def start(self, *arguments: str) -> Started:
        return Started(self._argv(arguments), self.env)

    def json(self, *arguments: str) -> Any:
        """The JSON that a command prints; it must succeed."""
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _argv(self, arguments: tuple[str, ...]) -> list[str]:
        return [str(Path(sys.executable).with_name("slmops")), *arguments]


class Started:
    """A command under way, its standard error read as it comes."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, said: str) -> None:
        """Until a line on standard error holds ``said``."""
        deadline = time.monotonic() + START_S
        while not any(said in line for line in self.lines):
            assert time.monotonic() < deadline, f"no {said!r} in {self.lines}"
            assert self.process.poll() is None or any(said in line for line in self.lines), self.lines
            time.sleep(0.02)

    def end(self, sig: signal.Signals | None = None) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        if sig is not None:
            self.process.send_signal(sig)
        status = self.process.wait(START_S)
        self._reader.join(10)
        self.process.stdout.close()
        return status

    def _read(self) -> None:
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))


@pytest.fixture(scope="session")
def slmops(tmp_path_factory: pytest.TempPathFactory, databases: Path) -> Iterator[Command]:
    """One home for all end-to-end tests, its servers stopped at the end."""
    command = Command(tmp_path_factory.mktemp("home"))
    making.put_databases(command.home, databases)
    yield command
    command("down")


@pytest.fixture(scope="session")
def comparison(slmops: Command, demo_home: Settings) -> dict[str, Any]:
    """A quick job on the real model, of which nothing is there but the checkpoint."""
    making.resolve(Job(model="demo"), demo_home)
    shutil.copytree(demo_home.checkpoints, slmops.home / "checkpoints", copy_function=os.link, dirs_exist_ok=True)
    done = slmops("run", "--model", "demo", "--precision", "int8", "--precision", "fp32", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)  # nothing but the comparison is on stdout
