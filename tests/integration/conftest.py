"""What several modules need and takes a while to make.

MLflow and Prefect take seconds to import, so only the fixtures that use them do it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Registration, Variant
from slmops.foundry.register import register
from slmops.local import stack
from tests import making
from tests.retraining import HELD_OUT

if TYPE_CHECKING:
    from tests.tracked import Book


@pytest.fixture(scope="session")
def talkative(shared: Path) -> Path:
    """A checkpoint that answers. Nobody alters it."""
    folder = shared / "talkative" / "tiny"
    with FileLock(shared / "talkative.lock"):
        return folder if folder.exists() else making.talkative("llama-tied", folder)


@pytest.fixture(scope="session")
def job(talkative: Path) -> Job:
    return making.job(talkative)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture
def fresh(tmp_path: Path) -> Settings:
    """A home of the test's own."""
    return Settings(home=tmp_path / "home")


@pytest.fixture(scope="module")
def checkpoint(job: Job, home: Settings) -> Checkpoint:
    return making.resolve(job, home)


@pytest.fixture(scope="session")
def stock(shared: Path) -> Settings:
    """A home for variants that are converted once; nothing is registered there, and nobody alters it."""
    return Settings(home=shared / "stock")


@pytest.fixture(scope="module")
def made(job: Job, home: Settings, stock: Settings) -> dict[str, tuple[Variant, Registration]]:
    """Variants that are registered in the home."""
    variants = [making.variant(name, job, stock) for name in ("fp32", "int8")]
    return {variant.name: (variant, register(variant, "tiny", job, home)) for variant in variants}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    making.work_in_process(monkeypatch)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, databases: Path) -> Iterator[Settings]:
    """A home, an MLflow database and a Prefect server for a module of flows."""
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_HOME, temporary_settings
    from prefect.testing import utilities

    folder = tmp_path_factory.mktemp("flow")
    shutil.copy(databases / "mlflow.db", folder)
    harness = folder / "harness"
    harness.mkdir()
    shutil.copy(databases / "prefect.db", harness / "prefect-test.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow without a server puts artifacts below the current folder
        patch.setenv("SLMOPS_HOME", str(folder / "home"))
        patch.setenv("SLMOPS_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        for name, value in stack.QUIET.items():
            patch.setenv(name, value)
        patch.setattr(utilities, "mkdtemp", lambda: str(harness))
        server = utilities.prefect_test_harness(server_startup_timeout=180)
        with temporary_settings({PREFECT_HOME: folder / "prefect"}), server:
            yield Settings()
            # The harness does this at its end without a limit, and was seen to wait for ever.
            EventsWorker.drain_all(timeout=20)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, databases: Path) -> str:
    """A database of MLflow with nothing in it."""
    return f"sqlite:///{shutil.copy(databases / 'mlflow.db', tmp_path_factory.mktemp('mlflow'))}"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model of each test's own."""
    return str(request.node.name).replace("_", "-").partition("[")[0]


@pytest.fixture
def book(database: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Book:
    from tests.tracked import Book

    monkeypatch.chdir(tmp_path)
    return Book(database, name, tmp_path)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """An evaluation set beside nothing."""
    file = tmp_path / "questions.jsonl"
    file.write_text(HELD_OUT)
    return file
