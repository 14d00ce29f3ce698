"""The ``foundry`` command of Windows and macOS, played by a script that keeps its state in files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from slmops.errors import RegistrationError
from slmops.foundry import cli

CALLED = "bot-int4-generic-cpu"
# Behaves as documented: "cache location" names the folder, "cache cd" moves it, "cache ls" lists what lies there.
SCRIPT = """\
#!{python} -S
import pathlib, sys
here = pathlib.Path(__file__).parent
location = here / "location.txt"
with (here / "calls.txt").open("a") as calls:
    print(*sys.argv[1:], file=calls)
broken = here / "broken.txt"
if broken.exists() and sys.argv[2:3] == [broken.read_text()]:
    print("Exception: Request to local service failed.", file=sys.stderr)
    sys.exit(3)
match sys.argv[1:]:
    case ["cache", "location"]:
        print((here / "said.txt").read_text() + location.read_text())
    case ["cache", "cd", folder]:
        location.write_text(folder)
    case ["cache", "ls"]:
        print("Models cached on device:\\n   Alias            Model ID")
        for folder in sorted(pathlib.Path(location.read_text()).glob("*/*")):
            print("   " + folder.name.rpartition("-")[0] + ":" + folder.name.rpartition("-")[2])
    case _:
        sys.exit(64)
"""


@pytest.fixture
def foundry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the command, the user's cache folder and what the command was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "foundry"
    program.write_text(SCRIPT.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    (folder / "location.txt").write_text("/home/jo/.foundry/cache/models", encoding="utf-8")
    (folder / "said.txt").write_text("Cache directory path: ", encoding="utf-8")
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "foundry home" / "models"


def hold(models: Path, *names: str) -> None:
    for name in names:
        (models / "slmops" / name).mkdir(parents=True)


def location(foundry: Path) -> str:
    return (foundry / "location.txt").read_text(encoding="utf-8")


def test_listed(foundry: Path, models: Path) -> None:
    hold(models, f"{CALLED}-1", "other-generic-cpu-1")
    assert cli.confirm(CALLED, models) is True
    assert location(foundry) == "/home/jo/.foundry/cache/models"
    assert (foundry / "calls.txt").read_text(encoding="utf-8").splitlines() == [
        "cache location",
        f"cache cd {models}",
        "cache ls",
        "cache cd /home/jo/.foundry/cache/models",
    ]


def test_not_listed(foundry: Path, models: Path) -> None:
    hold(models, "other-generic-cpu-1")
    with pytest.raises(RegistrationError) as raised:
        cli.confirm(CALLED, models)
    assert f"does not list {CALLED} in {models}" in raised.value.message
    assert "other-generic-cpu:1" in raised.value.message
    assert location(foundry) == "/home/jo/.foundry/cache/models"


@pytest.mark.parametrize("other", [f"support-{CALLED}-1", f"v2.{CALLED}-1", f"my_{CALLED}-1"])
def test_end_of_a_longer_name_is_not_the_model(foundry: Path, models: Path, other: str) -> None:
    hold(models, other)
    with pytest.raises(RegistrationError, match="does not list"):
        cli.confirm(CALLED, models)
    assert location(foundry) == "/home/jo/.foundry/cache/models"


@pytest.mark.parametrize(
    ("said", "before"),
    [
        ("", "/home/jo/.foundry"),
        ("\U0001f4be Cache directory path: ", "/Users/Jo Doe/Library/foundry cache"),
        ("Cache directory path: ", r"C:\Users\Jo Doe\.foundry\cache\models"),
        ("Service is started on http://127.0.0.1:5273/, PID 12!\nCache directory path: ", "D:/models"),
        ("Cache directory path:\n  ", r"\\server\share\models"),
    ],
)
def test_restored_whatever_the_folder_is_called(foundry: Path, models: Path, said: str, before: str) -> None:
    hold(models, f"{CALLED}-1")
    (foundry / "said.txt").write_text(said, encoding="utf-8")
    (foundry / "location.txt").write_text(before, encoding="utf-8")
    assert cli.confirm(CALLED, models) is True
    assert location(foundry) == before


def test_nothing_is_changed_that_could_not_be_restored(foundry: Path, models: Path) -> None:
    (foundry / "said.txt").write_text("No cache.", encoding="utf-8")
    (foundry / "location.txt").write_text("", encoding="utf-8")
    with pytest.raises(RegistrationError, match=r"names no folder to go back to\. It says: No cache\."):
        cli.confirm(CALLED, models)
    assert (foundry / "calls.txt").read_text(encoding="utf-8") == "cache location\n"


@pytest.mark.parametrize("command", ["location", "cd", "ls"])
def test_failing_command(foundry: Path, models: Path, command: str) -> None:
    hold(models, f"{CALLED}-1")
    (foundry / "broken.txt").write_text(command, encoding="utf-8")
    with pytest.raises(RegistrationError) as raised:
        cli.confirm(CALLED, models)
    assert raised.value.message.startswith(f"`foundry cache {command}")
    assert raised.value.message.endswith("ended with status 3: Exception: Request to local service failed.")
    assert location(foundry) == "/home/jo/.foundry/cache/models"


def test_command_that_hangs(foundry: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (foundry / "foundry").write_text(f"#!{sys.executable} -S\nimport time\ntime.sleep(60)\n", encoding="utf-8")
    monkeypatch.setattr(cli, "TIMEOUT_S", 0.2)
    with pytest.raises(RegistrationError, match=r"`foundry cache location` does not run: .*timed out"):
        cli.confirm(CALLED, models)


def test_command_that_cannot_be_started(foundry: Path, models: Path) -> None:
    (foundry / "foundry").write_text("#!/no/such/interpreter\n", encoding="utf-8")
    with pytest.raises(RegistrationError, match="`foundry cache location` does not run"):
        cli.confirm(CALLED, models)


def test_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("foundry") is None
    assert cli.confirm(CALLED, tmp_path) is None
