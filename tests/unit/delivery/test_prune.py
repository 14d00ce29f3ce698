"""What is removed from a home, and what stays, whatever happens."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.core import locks
from slmops.core.errors import BusyError, TrackingError, UsageError
from slmops.core.settings import Settings
from slmops.delivery import prune
from tests import values

DEPLOYED = "foundry/models/slmops"


class Home:
    """Variants ``old``, ``champion``, ``previous`` and ``latest``, in the store and in Foundry Local, and leftovers."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.refused = settings, False
        for name in ("old", "champion", "previous", "latest"):
            made = values.write_variant(settings.variants / name, name, {"model.onnx.data": name * 1000})
            blob = settings.blobs / (name * 10)
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.hardlink_to(made.path / "model.onnx.data")
            shutil.copytree(made.path, settings.home / DEPLOYED / f"bot-{name}-generic-cpu-1", copy_function=os.link)
        for path in ("work/killed/half", "logs/gone/x.log", "logs/bot/y.log", "checkpoints/c/w", "deployed/m/bot/w"):
            (settings.home / path).parent.mkdir(parents=True, exist_ok=True)
            (settings.home / path).write_text("something")
        (settings.home / DEPLOYED / "theirs").mkdir()
        for keys in ('"old"', '"latest"', '"latest", "old"'):
            settings.measurements.mkdir(exist_ok=True)
            text = f'{{"measured": "2026-01-02T00:00:00Z", "keys": [{keys}], "variants": {{}}}}'
            (settings.measurements / f"speed-{len(keys)}.json").write_text(text)
        (settings.blobs / "alone").write_text("x" * 500)
        for kind in ("Registry", "Tracker"):
            monkeypatch.setattr(prune, kind, lambda _uri: self)
        monkeypatch.setattr(prune.installed, "forget", self.forget)

    def models(self) -> list[str]:
        return ["bot", "unfinished"]

    def versions(self, name: str) -> list[Any]:
        aliases = {"old": (), "champion": ("champion",), "previous": ("previous", "int8")}
        found = [
            values.model_version(number, aliases=of, tags={"slmops.key": key})
            for number, (key, of) in enumerate(aliases.items(), 1)
        ]
        return found if name == "bot" else []

    def latest(self, name: str) -> Any:
        if name != "bot":
            raise UsageError("There is no finished comparison.")
        result = values.result("latest", 1).model_copy(update={"path": self.settings.variants / "latest"})
        return values.comparison(result, values.failed("int8", "It broke."))

    def forget(self, foundry_ids: list[str], home: Path, _settings: Settings) -> tuple[str, ...]:
        assert home == self.settings.foundry
        return () if self.refused else tuple(foundry_ids)

    @property
    def files(self) -> set[str]:
        paths = (path for path in self.settings.home.rglob("*") if path.is_file() and path.parent.name != "locks")
        return {path.relative_to(self.settings.home).as_posix() for path in paths}

    @property
    def taken(self) -> int:
        return sum({stat.st_ino: stat.st_size for stat in prune._files(self.settings.home)}.values())


@pytest.fixture
def home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(settings, monkeypatch)


def under(files: set[str], *parts: str) -> set[str]:
    return {file for file in files if file.startswith(parts)}


def test_only_what_nothing_refers_to_is_removed_and_only_if_asked(home: Home) -> None:
    before, taken = home.files, home.taken
    said = prune.prune(home.settings, "uri", remove=False)
    assert home.files == before
    referred = {one.path.name: one.referred_by for one in said.things}
    assert referred["champion"] == referred["bot-champion-generic-cpu-1"] == ("bot version 2 (champion)",)
    assert referred["previous"] == ("bot version 3 (previous, int8)",)
    assert referred["latest"] == ("the latest comparison of bot",)
    assert referred["old"] == referred["bot-old-generic-cpu-1"] == referred["killed"] == referred["gone"] == ()
    assert "slmops prune --yes" in said.text
    assert not said.removed

    done = prune.prune(home.settings, "uri", remove=True)
    lost = ("variants/old/", f"{DEPLOYED}/bot-old-", "work/", "logs/gone/", "checkpoints/", "blobs/old", "blobs/alone")
    measured = ("measurements/speed-5.json", "measurements/speed-15.json")
    assert before - home.files == under(before, *lost, *measured)
    assert done.freed_mb == said.freed_mb == pytest.approx((taken - home.taken) / 1e6)
    assert done.removed
    again = prune.prune(home.settings, "uri", remove=True)
    assert (again.freed_mb, home.taken) == (0, taken - round(done.freed_mb * 1e6))


def test_the_checkpoint_of_a_variant_that_stays_does_too(home: Home) -> None:
    manifest = home.settings.variants / "latest" / "variant.json"
    text = manifest.read_text().replace("/checkpoints/tiny", str(home.settings.checkpoints / "c"))
    manifest.unlink()
    manifest.write_text(text)
    prune.prune(home.settings, "uri", remove=True)
    assert "checkpoints/c/w" in home.files


def test_nothing_is_removed_if_mlflow_does_not_answer(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_name: str) -> Any:
        raise TrackingError("MLflow at uri failed: it cannot be reached")

    before = home.files
    monkeypatch.setattr(home, "latest", away)
    with pytest.raises(TrackingError, match="cannot be reached"):
        prune.prune(home.settings, "uri", remove=True)
    assert home.files == before


@pytest.mark.parametrize("lock", ["run-bot", "pull-bot", "retrain-bot", "checkpoint-0123", "foundry"])
def test_nothing_is_removed_while_something_works_here(home: Home, lock: str) -> None:
    before = home.files
    with locks.exclusive(home.settings.locks / f"{lock}.lock", "work", wait=False):
        with pytest.raises(BusyError, match=f"{lock} in this home"):
            prune.prune(home.settings, "uri", remove=True)
        assert home.files == before
        assert prune.prune(home.settings, "uri", remove=False).things


def test_a_folder_that_foundry_local_holds_on_to_stays(home: Home) -> None:
    home.refused, taken = True, home.taken
    done = prune.prune(home.settings, "uri", remove=True)
    assert done.freed_mb == pytest.approx((taken - home.taken) / 1e6)
    assert under(home.files, f"{DEPLOYED}/bot-old-")
    assert (home.settings.home / DEPLOYED / "theirs").is_dir()


def test_an_empty_home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(settings, monkeypatch)
    shutil.rmtree(home.settings.home)
    done = prune.prune(settings, "uri", remove=True)
    assert done.freed_mb == 0
    assert all(one.mb == 0 for one in done.things)
    assert isinstance(Path(done.model_dump(mode="json")["home"]), Path)
