"""Which versions are on a device, and which of them its users get."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from slmops.core.errors import TrackingError, UsageError
from slmops.core.settings import Settings
from slmops.delivery import installed
from slmops.foundry.versions import VERSION_MANIFEST, Installed, VersionManifest
from slmops.processes import children
from tests.pulled import BIG, CRASHED, FILES, Device

Versions = dict[int, Installed]


@pytest.fixture
def versions(device: Device) -> Versions:
    """Four, of which the first two became current one after the other."""
    made = {}
    for number in range(1, 5):
        device.serve(number=number, **{"model.onnx": b"graph %d" % number})
        made[number] = device.install()
        if number < 3:
            installed.make_current(made[number], device.settings)
    assert device.forgotten == []
    return made


def state(device: Device) -> tuple[str, str | None]:
    """Ends of the ids of what is current and previous, as written down."""
    written = json.loads((device.settings.deployed / "bot.json").read_text())
    return written["current"][-1], written["previous"] and written["previous"][-1]


def test_current_and_previous_stay_and_the_others_go(device: Device, versions: Versions) -> None:
    assert installed.current("bot", device.settings) == versions[2]
    assert installed.versions("bot", device.settings) == [versions[number] for number in (4, 3, 2, 1)]
    installed.make_current(versions[4], device.settings)
    assert state(device) == ("4", "2")
    assert (installed.current("bot", device.settings), device.here()) == (versions[4], [4, 2])
    assert sorted(device.forgotten) == ["bot-int8-generic-cpu:1", "bot-int8-generic-cpu:3"]
    assert {path.name for path in device.models.iterdir()} == {"bot-int8-generic-cpu-2", "bot-int8-generic-cpu-4"}
    installed.make_current(versions[4], device.settings)  # twice changes nothing
    assert state(device) == ("4", "2")
    installed.make_current(versions[2], device.settings)  # a rollback
    assert (state(device), device.here()) == (("2", "4"), [4, 2])


def test_what_stays_in_the_catalog_is_named_or_is_what_users_get_keeps_its_files(
    device: Device, versions: Versions
) -> None:
    device.kept = {"bot-int8-generic-cpu:3"}
    installed.make_current(versions[4], device.settings)
    assert device.here() == [4, 3, 2]
    device.kept = set()
    for named, here in (([versions[3].foundry_id], [4, 3, 2]), ([], [4, 2])):
        installed.tidy("bot", named, device.settings)
        assert (device.here(), state(device)) == (here, ("4", "2"))


@pytest.mark.parametrize(
    ("place", "name", "error", "said"),
    [(children, "call", CRASHED, "SIGSEGV"), (installed, "move_aside", PermissionError(13, "in use"), "in use")],
)
def test_tidying_that_fails_harms_nothing(
    device: Device, versions: Versions, caplog: pytest.LogCaptureFixture, place: Any, name: str, error: Any, said: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, Mock(side_effect=error))
        installed.make_current(versions[4], device.settings)
    assert (installed.current("bot", device.settings), device.here()) == (versions[4], [4, 3, 2, 1])
    assert said in caplog.text


def test_only_old_versions_and_downloads_of_the_same_model_go(device: Device, versions: Versions) -> None:
    for name in ("bot-int4-generic-cpu-9", "bot-copy", "bot-int8-generic-cpu-9x"):
        shutil.copytree(versions[4].folder, device.models / name)
    assert device.here() == [4, 3, 2, 1]
    device.serve("bot-two", number=1)
    other = device.install()
    installed.make_current(other, device.settings)
    for name in ("bot", "bot-two"):
        device.serve(name, number=9, **{BIG: FILES[BIG][::-1]})
        device.remote.cuts[BIG] = [1000, 0, 0, 0, 0]
        device.refuses(TrackingError, "broken")
    folders = device.settings.deployed / "downloads"
    assert len(list(folders.iterdir())) == 2
    installed.make_current(versions[4], device.settings)
    [kept] = [VersionManifest.from_file(folder / f"{VERSION_MANIFEST}.part") for folder in folders.iterdir()]
    assert kept.model == "bot-two"
    assert installed.versions("bot-two", device.settings) == [other]
    assert (installed.current("bot-two", device.settings), device.here()) == (other, [4, 2])


def shorten(folder: Path) -> None:
    (folder / BIG).unlink()  # not in place, where other versions have it too
    (folder / BIG).write_bytes(FILES[BIG][:-1])


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        shorten,
        lambda folder: (folder / VERSION_MANIFEST).write_text((folder / VERSION_MANIFEST).read_text()[:100]),
        lambda folder: (folder / "inference_model.json").unlink(),
        lambda folder: folder.rename(folder.with_name(f"bot-int8-generic-cpu-0{folder.name[-1]}")),
    ],
)
def test_a_current_version_that_is_gone_gives_way_to_the_one_before(
    device: Device, versions: Versions, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    damage(versions[2].folder)
    assert (device.here(), installed.current("bot", device.settings)) == ([4, 3, 1], versions[1])
    assert "bot-int8-generic-cpu:2" in caplog.text
    damage(versions[1].folder)
    assert installed.current("bot", device.settings) is None


def test_a_home_that_moved(device: Device, versions: Versions, tmp_path: Path) -> None:
    moved = Settings(home=tmp_path / "elsewhere")
    device.settings.home.rename(moved.home)
    assert (found := installed.current("bot", moved)) is not None
    assert (found.foundry_id, found.folder.is_dir()) == (versions[2].foundry_id, True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"current": 3}'])
def test_a_note_that_cannot_be_read_does_not_count(device: Device, versions: Versions, text: str) -> None:
    (device.settings.deployed / "bot.json").write_text(text)
    assert installed.current("bot", device.settings) is None
    installed.make_current(versions[4], device.settings)
    assert state(device) == ("4", None)


@pytest.mark.parametrize("name", ["", "../bot", "a/b", "*", "bot\n"])
@pytest.mark.parametrize("ask", [installed.versions, installed.current])
def test_a_name_that_would_be_a_path(device: Device, name: str, ask: Callable[[str, Settings], Any]) -> None:
    assert not ask("bot", device.settings)  # nothing is here
    assert not device.settings.home.exists()
    with pytest.raises(UsageError, match=re.escape(repr(name))):
        ask(name, device.settings)
