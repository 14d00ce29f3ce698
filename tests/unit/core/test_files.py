"""Nothing half-written is ever where a reader looks."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from slmops.core import files
from slmops.core.files import folder_appears_whole, link_or_copy, remove_scratch, scratch_folder, sha256, write_atomic

# Processes have smaller numbers: Linux's largest is 2^22.
DEAD = 2**22 + 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_makes_folders_and_replaces_or_if_it_fails_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    write_atomic(path, "old and longer")
    write_atomic(path, "neü")
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "newer")
    assert path.read_bytes() == "neü".encode()
    assert sha256(path) == hashlib.sha256("neü".encode()).hexdigest()
    assert names(path.parent) == ["x.json"]


def refusing(times: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As on Windows: what somebody has open is not moved, so many times; returns what was tried."""
    replace, tried = Path.replace, list[Path]()

    def refuse(source: Path, target: Path) -> Path:
        tried.append(source)
        if len(tried) <= times:
            raise PermissionError(13, "The process cannot access the file")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))
    return tried


def test_while_somebody_has_the_file_open_it_is_moved_later_and_once_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = refusing(2, monkeypatch)
    write_atomic(tmp_path / "x", "{% a %}\n")
    assert (tmp_path / "x").read_bytes() == b"{% a %}\n"
    assert len(tried) == 3
    refusing(3, monkeypatch)
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "x", "new")
    assert (names(tmp_path), (tmp_path / "x").read_text(encoding="utf-8")) == (["x"], "{% a %}\n")


@pytest.mark.parametrize(("times", "kept"), [(0, ["log.1"]), (3, ["log"])])
def test_the_log_before_is_kept_unless_somebody_writes_it(
    tmp_path: Path, times: int, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.keep_log(tmp_path / "a" / "log")
    (tmp_path / "a" / "log").write_text("old", encoding="utf-8")
    refusing(times, monkeypatch)
    files.keep_log(tmp_path / "a" / "log")
    assert names(tmp_path / "a") == kept


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        *((name, True) for name in ("a/b.onnx.data", "console.json", "con-int4", "com10", "Größe", ".hidden")),
        *((name, False) for name in ("con", "a/NUL.json", "lpt1.tar.gz", "bot:1", "a\\b", "a/../b", "dot.", "blank ")),
        *((name, False) for name in ("", "/a", "what?", "a|b", "a\nb")),
    ],
)
def test_a_file_of_a_manifest_can_be_on_any_system(name: str, possible: bool) -> None:
    assert files.stays_below(name) is possible


def test_folder_appears_with_all_that_was_written_and_nothing_of_a_process_of_the_same_number(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    part = target.with_name(f".model.{os.getpid()}.part")  # beside it: a rename within one file system
    (part / "stale").mkdir(parents=True)
    with folder_appears_whole(target) as scratch:
        assert scratch == part
        assert names(scratch) == []
        (scratch / "sub").mkdir()
        (scratch / "sub" / "b").write_text("2", encoding="utf-8")
        assert not target.exists()
    assert names(target.parent) == ["model"]
    assert (target / "sub" / "b").read_text(encoding="utf-8") == "2"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), folder_appears_whole(tmp_path / "model") as scratch:
        raise error((scratch / "a").write_text("1", encoding="utf-8"))
    assert names(tmp_path) == []


def test_folder_that_another_process_completed_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with folder_appears_whole(target) as scratch:
        (scratch / "a").write_text("ours", encoding="utf-8")
        target.mkdir()
        (target / "a").write_text("theirs", encoding="utf-8")
    assert (target / "a").read_text(encoding="utf-8") == "theirs"
    assert names(tmp_path) == ["model"]


def test_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("a file", encoding="utf-8")
    with pytest.raises(NotADirectoryError), folder_appears_whole(target):
        pass
    assert target.read_text(encoding="utf-8") == "a file"
    assert names(tmp_path) == ["model"]


def test_scratch_folders_of_dead_processes_only_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as sleeper:
        theirs = f".int4-x.{sleeper.pid}.part"
        kept = [f".int4-x.{os.getpid()}.part", theirs, "int4-x", f"int4-x.{DEAD}.part", ".hidden"]
        for name in [*kept, f".int4-x.{DEAD}.part", f".my.model-1.{DEAD}.part", ".odd.part"]:
            (tmp_path / name / "below").mkdir(parents=True)
        remove_scratch(tmp_path)
        assert names(tmp_path) == sorted(kept)
        sleeper.communicate(b"\n")
    remove_scratch(tmp_path)
    assert theirs not in names(tmp_path)
    remove_scratch(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("how", ["links", "links what a symbolic link points to", "copies"])
def test_links_where_it_can_and_else_copies_and_says_so(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blob, source, target = tmp_path / "blob", tmp_path / "a", tmp_path / "b"
    blob.write_text("x", encoding="utf-8")
    if how == "links what a symbolic link points to":  # as in the hub's cache, whose blobs may be removed
        source.symlink_to(blob)
    else:
        blob.rename(source)
    if how == "copies":
        monkeypatch.setattr(Path, "hardlink_to", Mock(side_effect=OSError(18, "Invalid cross-device link")))
    link_or_copy(source, tmp_path / "small")
    assert caplog.messages == []
    monkeypatch.setattr(files, "LARGE_BYTES", 0)
    link_or_copy(source, target)
    said = [f"{target} is a copy, since it cannot be a link: Invalid cross-device link"] if how == "copies" else []
    assert caplog.messages == said
    assert not target.is_symlink()
    assert target.samefile(source) == (how != "copies")
    assert target.read_text(encoding="utf-8") == "x"


def test_a_scratch_folder_is_gone_afterwards_as_are_those_of_killed_processes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / f".agreement.abc.{DEAD}.part").mkdir(parents=True)
    with scratch_folder(home, "agreement") as one, scratch_folder(home, "agreement") as other:
        assert one != other
        assert {path.name for path in home.iterdir()} == {one.name, other.name}
        assert one.name.startswith(".agreement.")
        assert one.name.endswith(f".{os.getpid()}.part")  # by which it is known when this process is killed
    assert list(home.iterdir()) == []
