"""No command starts a server or a flow here: stand-ins note what they are asked."""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.cli import deploy, jobs
from slmops.cli.command import run
from slmops.tracking.tracker import Tracker
from tests import values

Slmops = Callable[[str], tuple[int, str, str]]
FLOWS = {
    "optimize": ["optimize"],
    "retrain": ["retrain"],
    "remeasure": ["measure", "remeasure", "soak"],
    "sweep": ["sweep"],
    "promote": ["promote", "rollback"],
    "deploy": ["deploy", "undeploy"],
}


class Flows:
    """Stand in for the flows: each notes its name and request, and returns, or raises, the answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answer: Any = values.comparison(values.result("int4", 114.0), chosen="int4")

    def stand_in(self, name: str) -> Callable[[Any], Any]:
        def flow(request: Any) -> Any:
            self.asked.append((name, request))
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

        return flow

    @property
    def options(self) -> dict[str, Any]:
        """The options of the one request that differ from the defaults."""
        [(_, request)] = self.asked
        return request.model_dump(mode="json", exclude_defaults=True, exclude_unset=True)


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch) -> Flows:
    made = Flows()
    for module, names in FLOWS.items():
        functions = {name: made.stand_in(name) for name in names}
        monkeypatch.setitem(sys.modules, f"flows.{module}", SimpleNamespace(**functions))
    servers = SimpleNamespace(tracking_uri="http://mlflow")
    for commands in (jobs, deploy):
        monkeypatch.setattr(commands, "prefect_running", lambda: nullcontext(servers))
    monkeypatch.setattr(Tracker, "run_url", lambda *_: "http://mlflow/run")
    monkeypatch.setattr(jobs.preflight, "check", lambda job, _: job)
    return made


@pytest.fixture
def slmops(capsys: pytest.CaptureFixture[str]) -> Slmops:
    """Run a command line; returns its exit code, and what it printed on stdout and on stderr."""
    return lambda arguments: (run(arguments.split()), *capsys.readouterr())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that does not exist yet; the logger that a command changes is put back."""
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # no .env of a developer's
    logger = logging.getLogger("slmops")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    return tmp_path / "home"
