"""Files that come in pieces, late, altered or not at all; which versions are here, and which of them users get."""

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from slmops.core.errors import PrerequisiteError, TrackingError, UsageError
from slmops.core.settings import Settings
from slmops.delivery import installed
from slmops.foundry.versions import VERSION_MANIFEST, Installed, VersionManifest
from slmops.processes import children
from slmops.tracking import download
from tests import pulled, values
from tests.pulled import BIG, FILES, SIZE, Device, contents, digest, names

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
    [(children, "call", pulled.CRASHED, "SIGSEGV"), (installed, "move_aside", PermissionError(13, "in use"), "in use")],
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


def flipped(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        pytest.param({"cuts": [SIZE - 1]}, [0, SIZE - 1], id="before the last byte"),
        pytest.param({"cuts": [SIZE]}, [0, SIZE], id="after the last byte"),
        pytest.param({"cuts": [1] * 20}, list(range(21)), id="twenty times, but a byte further each time"),
        pytest.param({"cuts": [0] * 4 + [10] + [0] * 3}, [0] * 5 + [10] * 4, id="a row begins anew"),
        # Some servers end a broken answer as if it were whole.
        pytest.param({"answers": [FILES[BIG][:4000], FILES[BIG][:9000]]}, [0, 4000, 9000], id="short answers"),
        pytest.param({"answers": [flipped(FILES[BIG])]}, [0, 0], id="altered on the way once"),
        pytest.param({"left": FILES[BIG][:700]}, [700], id="an earlier attempt left a beginning"),
        pytest.param({"left": FILES[BIG]}, [], id="all of it"),
        pytest.param({"left": b"x" * 700}, [700, 0], id="something else"),
        pytest.param({"left": b"x" * SIZE}, [0], id="something else of the same size"),
        pytest.param({"left": FILES[BIG] + b"x"}, [0], id="more"),
        pytest.param({"left": b""}, [0], id="nothing"),
    ],
)
def test_a_file_arrives_whole_from_where_it_stopped(device: Device, case: dict[str, Any], asked: list[int]) -> None:
    device.remote.cuts[BIG] = case.get("cuts", [])
    device.remote.answers[BIG] = case.get("answers", [])
    if "left" in case:
        (device.downloads / f"{BIG}.part").write_bytes(case["left"])
    assert contents(device.install().folder)[BIG] == FILES[BIG]
    assert device.remote.offsets() == asked


def test_it_gives_up_and_the_next_pull_goes_on(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slmops")
    device.remote.cuts[BIG] = [4000, 0, 0, 0, 0]
    device.refuses(TrackingError, rf"^{BIG} of bot version 3 \(int8\) .*The connection is broken\.\n")
    assert not any(device.models.iterdir())
    device.remote.asked.clear()
    device.install()
    # What came before is not asked for again.
    assert "bot version 3 (int8): 4 files to fetch (0 MB), 1 are here" in caplog.messages
    assert device.remote.asked == [(BIG, 4000), *((path, 0) for path in FILES if path not in ("model.onnx", BIG))]


def test_it_waits_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, waited = pulled.Remote(), list[float]()
    remote.cuts[BIG] = [10, 0, 10, 0, 0, 0, 0]
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(download, "read", remote.read)
    with pytest.raises(TrackingError):
        download.fetch(download.Origin(pulled.URI, pulled.LOCATION, "bot"), BIG, SIZE, digest(FILES[BIG]), tmp_path)
    assert waited == [1, 2, 1, 2, 4, 8]


@pytest.mark.parametrize("path", [VERSION_MANIFEST, BIG])
def test_a_file_that_is_gone_is_not_asked_for_again(device: Device, path: str) -> None:
    device.remote.cuts[path] = [download.NotGivenError(f"{path} is gone from the registry.", "Promote again.")]
    assert device.refuses(download.NotGivenError, rf"bot version 3 \(int8\).*{path}").fix == "Promote again."
    assert (device.remote.offsets(path), device.here()) == ([0], [])


def test_two_at_once(device: Device) -> None:
    device.remote.cuts |= {BIG: [3000], VERSION_MANIFEST: [50, 100]}
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: device.install(), range(2)))
    assert both[0] == both[1]
    assert device.remote.offsets() == [0, 3000]
    assert device.remote.offsets(VERSION_MANIFEST)[:3] == [0, 50, 150]
    assert contents(both[0].folder)[BIG] == FILES[BIG]
    assert device.registered == [both[0].foundry_id] * 2


@pytest.mark.parametrize(
    ("content", "requests"),
    [
        pytest.param(flipped(FILES[BIG]), [0, 0], id="a bit"),
        pytest.param(FILES[BIG][:-1], [0, SIZE - 1, 0, SIZE - 1], id="shorter"),
        pytest.param(FILES[BIG] + b"x", [0, 0], id="longer by a byte"),
        pytest.param(FILES[BIG] * 100, [0, 0], id="much longer"),
    ],
)
def test_an_altered_file_is_refused(device: Device, content: bytes, requests: list[int]) -> None:
    device.remote.files[BIG] = content
    device.refuses(TrackingError, rf"^{BIG} of bot version 3 \(int8\) was altered")
    assert device.remote.offsets() == requests  # from the start once more, then no more
    assert device.remote.given[BIG] < 2 * SIZE + 3 * pulled.BLOCK  # so no file fills the disk
    assert not any(device.models.iterdir())
    assert not any(name.startswith(BIG) for name in names(device.downloads))


def test_a_part_that_is_linked_elsewhere_is_not_written_to(device: Device, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(FILES[BIG][:700])  # whole when it was linked, and shortened since
    (device.downloads / f"{BIG}.part").hardlink_to(elsewhere)
    device.install()
    assert (elsewhere.read_bytes(), device.remote.offsets()) == (FILES[BIG][:700], [0])


def test_not_enough_disk(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=SIZE))  # the small files are too much
    device.refuses(PrerequisiteError, r"bot version 3 \(int8\)")
    assert device.remote.paths == {VERSION_MANIFEST}
    (device.downloads / f"{BIG}.part").write_bytes(FILES[BIG][:700])  # which is not needed once more
    device.install()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full disk is /dev/full")
def test_the_disk_fills_up_or_cannot_be_written(device: Device) -> None:
    (device.downloads / f"{BIG}.part").symlink_to("/dev/full")
    assert device.refuses(PrerequisiteError, os.strerror(errno.ENOSPC)).fix == children.FREE_SPACE
    assert device.here() == []
    shutil.rmtree(device.settings.deployed)
    device.settings.deployed.write_text("a file")
    assert "SLMOPS_HOME" in str(device.refuses(PrerequisiteError, "Not a directory").fix)


def test_files_of_a_variant_made_here_and_of_other_versions_are_linked_unless_they_were_altered(device: Device) -> None:
    made = values.write_variant(device.settings.variants / "int8-0123", "int8", {BIG: "same", "empty.txt": ""})
    (made.path / BIG).write_text("emas")
    (device.settings.variants / "broken").mkdir()
    (device.settings.variants / "broken" / "variant.json").write_text("[]")
    device.serve(**{BIG: b"same"})
    first = device.install()
    assert (first.folder / "model.onnx").samefile(made.path / "model.onnx")
    assert contents(first.folder)[BIG] == b"same"
    assert {BIG, "model.onnx", "adapters/one/weights.bin"} & device.remote.paths == {BIG, "adapters/one/weights.bin"}
    device.serve(number=4, **{BIG: b"same", "model.onnx": b"a better graph"})
    second = device.install()
    assert device.remote.paths == {VERSION_MANIFEST, "model.onnx"}
    assert (second.folder / BIG).samefile(first.folder / BIG)
    found = [contents(version.folder)["model.onnx"] for version in (first, second)]
    assert found == [b"graph", b"a better graph"]


@pytest.mark.parametrize(
    ("damaged", "content", "fetched"),
    [
        (BIG, bytes(SIZE), {VERSION_MANIFEST, BIG}),
        (VERSION_MANIFEST, b"{}", {VERSION_MANIFEST}),  # the files are linked once more
        ("inference_model.json", b"{", {VERSION_MANIFEST}),
        ("inference_model.json", b'{"Name": "other:1"}', {VERSION_MANIFEST}),
    ],
)
def test_an_installed_version_that_was_damaged_is_repaired(
    device: Device, damaged: str, content: bytes, fetched: set[str]
) -> None:
    first = device.install()
    before = contents(first.folder)
    (first.folder / damaged).write_bytes(content)
    device.remote.asked.clear()
    assert (device.install(), device.remote.paths) == (first, fetched)
    assert contents(first.folder) == before
    assert names(device.settings.deployed / "aside") == set()


def test_again_nothing_is_downloaded_unless_the_registry_began_anew(device: Device) -> None:
    first = device.install()
    device.remote.asked.clear()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert (device.install(), device.remote.asked) == (first, [])
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert device.registered == [first.foundry_id] * 2  # it may have been taken out of the catalog
    device.serve(**{BIG: b"other weights", "copy.data": b"other weights"})  # the number counts from one again
    assert device.install() == first
    assert contents(first.folder)[BIG] == contents(first.folder)["copy.data"] == b"other weights"
    assert installed.versions("bot", device.settings) == [first]
