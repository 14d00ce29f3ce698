"""When a variant is made, when the one that is there is used: Olive is played by a function."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import convert as conversion
from slmops.conversion import store
from slmops.conversion.convert import convert
from slmops.core import machine
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Recipe, Weights
from slmops.processes import children
from slmops.processes.children import Finished
from tests.values import CONTENTS, checkpoint, write_variant

RECIPE = Recipe(name="int4", config={"passes": {"a": {"type": "Rtn"}}}, bits=4)
FOUND = Weights(bits_per_weight=4.5, by_bits={"4": 1000}, quantized_ops={})


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home, and a machine lock, of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Settings(home=tmp_path / "home")


def play_olive(monkeypatch: pytest.MonkeyPatch, before: Callable[[], object] = lambda: None) -> list[str]:
    """Let a function do what the child processes do; returns a list to which it adds the path of each conversion."""
    conversions: list[str] = []

    def call(module: str, request: Any, result: type[Any], **how: Any) -> tuple[Any, Finished]:
        if module.endswith("olive_worker"):
            before()
            made = Path(request.config["output_dir"])
            conversions.append(str(made))
            made.mkdir(parents=True)
            how["log"].parent.mkdir(parents=True, exist_ok=True)
            how["log"].write_text("said")
            for name, text in CONTENTS.items():
                (made / name).write_text(f"{text}, {len(conversions)}")
            return result(), Finished(0, 1.0, [], timed_out=False)
        return result(weights=FOUND, export_error=None), Finished(0, 1.0, [], timed_out=False)

    monkeypatch.setattr(children, "call", call)
    return conversions


def test_two_names_over_one_checkpoint_at_once_convert_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_looked = threading.Barrier(2)

    def look(folder: Path) -> Any:
        found = load(folder)
        if len(looks) < 2:
            looks.append(folder)
            both_looked.wait(10)  # neither has found it
        return found

    looks: list[Path] = []
    load = store.load
    monkeypatch.setattr(conversion.store, "load", look)
    conversions = play_olive(monkeypatch)
    job = Job(model="m")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda name: convert(RECIPE, checkpoint(), job, name, settings), ("one", "other"))
    assert len(conversions) == 1
    assert one == other == store.load(one.path)


def test_files_of_a_faster_machine_with_the_same_home_are_what_is_described(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = settings.variants / store.key(RECIPE, checkpoint(), machine.versions())
    play_olive(monkeypatch, before=lambda: write_variant(target))
    made = convert(RECIPE, checkpoint(), Job(model="m"), "bot", settings)
    assert made == store.load(target)


def test_an_incomplete_folder_is_made_again_and_a_complete_one_is_used(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = settings.variants / store.key(RECIPE, checkpoint(), machine.versions())
    target.mkdir(parents=True)
    (target / "stale").write_text("of the old folder")
    conversions = play_olive(monkeypatch)
    made = [convert(RECIPE, checkpoint(), Job(model="m"), name, settings) for name in ("one", "other")]
    assert made[0] == made[1] == store.load(target)
    assert len(conversions) == 1
    assert [record.levelname for record in caplog.records if str(target) in record.getMessage()] == ["WARNING"]
    assert not (target / "stale").exists()
