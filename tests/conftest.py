"""For all tests."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from slmops.core.settings import Settings
from tests import surroundings

LONGEST_FIRST = (
    "e2e/test_demo",
    "e2e/test_faults",
    "integration/test_retrain",
    "integration/test_two_workers",
    "integration/test_convert",
    "integration/test_flow",
    "integration/test_proxy",
    "integration/test_stack",
)
"""So that no test process has a long one left when the other has nothing more to do."""


def pytest_configure() -> None:
    """Make Ctrl-C count: whoever runs the tests in the background has them, and their children, ignore it.

    Test processes that run side by side get a temporary folder each: with it a machine lock of their own. They share
    the cores, on which torch's threads would spend most of their time waiting for each other.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "OLIVE_DISABLE_TELEMETRY": "1"}  # for tests that load them themselves
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(tempfile.gettempdir()) / f"slmops-tests-{os.getppid()}-{worker}"
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all test processes of a run: pytest-xdist gives each a folder below the run's."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def databases(shared: Path) -> Path:
    """The databases of both servers after their migrations, which take seconds; for copies."""
    folder = shared / "databases"
    with FileLock(shared / "databases.lock"):
        if not folder.exists():
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                surroundings.clear(patch, folder)
                patch.setenv("PREFECT_HOME", str(folder))
                opened = f"MlflowClient('sqlite:///{folder / 'mlflow.db'}').search_experiments()"
                for command in (
                    ["-m", "prefect", "server", "database", "upgrade", "--yes"],
                    ["-c", f"from mlflow import MlflowClient; {opened}"],
                ):
                    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def demo_home(shared: Path) -> Settings:
    """A home for the demo checkpoint alone, which is unpacked once. Nobody alters it."""
    return Settings(home=shared / "demo")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    surroundings.clear(monkeypatch, tmp_path)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home, and a machine lock, of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Settings(home=tmp_path / "home")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"tests/{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
