"""The checks that need no heavy package, on machines that are made up, and a build from pretended sources."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.core import machine
from slmops.core.errors import PrerequisiteError
from slmops.core.settings import Settings
from slmops.core.values import Hardware
from slmops.local import doctor, stack
from slmops.local.doctor import Check

PYTHON = sys.executable  # tests put others in its place
CLOSED = "http://127.0.0.1:9"
BUILD = """
import json, sys, zipfile
from pathlib import Path

Path("argv.json").write_text(json.dumps(sys.argv))
if Path("fail").exists():
    raise SystemExit("CMake Error: no compiler")
folder = Path("build/Linux/Release/wheel")
folder.mkdir(parents=True, exist_ok=True)
about = "tinygenai-1.0.dist-info"
with zipfile.ZipFile(folder / "tinygenai-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("tinygenai.py", "BUILT = True")
    wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\\nName: tinygenai\\nVersion: 1.0\\nRequires-Dist: no")
    wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any")
    wheel.writestr(f"{about}/RECORD", "")
"""


@pytest.fixture
def settings(tmp_path: Path, no_settings: None) -> Settings:  # noqa: ARG001
    return Settings(home=tmp_path / "not" / "yet")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    monkeypatch.setattr(stack, "ROOT", root)
    return root


def program(folder: Path, name: str, body: str) -> Path:
    if sys.platform == "win32":
        pytest.skip("a script with #! is no program")
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!{PYTHON}\n{body}\n")
    file.chmod(0o755)
    return file


def find(settings: Settings, name: str) -> Check:
    [found] = [one for one in doctor.check(settings, imports=False) if one.name == name]
    return found


def test_without_imports_it_changes_nothing(settings: Settings) -> None:
    checks = doctor.check(settings, imports=False)
    names = [one.name for one in checks]
    assert len(names) == len(set(names))
    assert {"Python", "memory", "disk", "CPU", *machine.PACKAGES, "Prefect server", "MLflow server"} <= set(names)
    assert all(one.fix for one in checks if one.status != "ok")
    assert not settings.home.exists()


@pytest.mark.parametrize(("free", "status"), [(20e9, "ok"), (19e9, "warning"), (5e9, "warning"), (4e9, "failure")])
def test_disk(settings: Settings, monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=free))
    assert find(settings, "disk").status == status
    assert asked == [settings.home.parents[1]]  # the nearest folder that exists


MEMORY = {16: "ok", 8: "ok", 7.9: "warning", 4: "warning", 3.9: "failure"}
CPU = {"avx avx2": "ok", "neon": "ok", "": "ok", "avx": "warning"}


@pytest.mark.parametrize(
    ("name", "here", "status"),
    [("memory", {"memory_gb": memory_gb}, status) for memory_gb, status in MEMORY.items()]
    + [("CPU", {"isa": tuple(isa.split())}, status) for isa, status in CPU.items()],
)
def test_hardware(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str, here: dict[str, Any], status: str
) -> None:
    hardware = {"system": "Linux", "machine": "x86_64", "processor": "P", "cores": 2, "memory_gb": 16, "isa": ("avx2",)}
    monkeypatch.setattr(machine, "hardware", lambda: Hardware(**{**hardware, **here}))
    found = find(settings, name)
    assert found.status == status
    assert found.detail.startswith("P, 2 cores" if name == "CPU" else f"{here['memory_gb']:.1f} GB")


def test_windows_has_no_room_for_a_long_home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HOME_CHARACTERS", len(str(settings.home)) - 1)
    assert "characters" not in find(settings, "disk").detail
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(platform="win32"))
    long = doctor._disk(settings.home)
    assert (long.status, long.fix) == ("warning", "Set SLMOPS_HOME to a folder near the root of a drive.")


def test_packages_against_constraints(settings: Settings, monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    (tree / "constraints.txt").write_text("# pins\ntorch==2.13.0  # exact\nonnx==1.0\nOlive_AI==0.13.0\nnot a pin!\n")
    installed = {"torch": "2.13.0+cpu", "onnx": "2.0", "olive-ai": "0.13.0", "gguf": "3"}
    monkeypatch.setattr(machine, "versions", lambda: installed)
    status = {one.name: one.status for one in doctor.check(settings, imports=False)}
    expected = {"torch": "ok", "onnx": "warning", "olive-ai": "ok", "gguf": "ok", "mlflow": "failure"}
    assert expected.items() <= status.items()
    assert find(settings, "onnx").detail == "2.0, but ==1.0 was tested"
    assert find(settings, "mlflow").fix == doctor.FIX_PACKAGES

    (tree / "constraints.txt").unlink()  # as without the source tree
    installed |= {"torch": "1.0", "psutil": "7"}
    assert find(settings, "torch").status == "warning"  # pyproject.toml pins it
    assert find(settings, "psutil").status == "ok"


def test_servers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(settings, "Prefect server") == Check("Prefect server", "warning", "not running", "Run `slmops up`.")
    monkeypatch.setenv("PREFECT_API_URL", f"{CLOSED}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    given = Settings(home=settings.home)
    assert find(given, "Prefect server").status == "failure"
    assert CLOSED in find(given, "Prefect server").detail
    assert find(given, "MLflow server").status == "ok"


def test_foundry_command(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find(settings, "foundry command").status == "ok"
    program(tmp_path / "bin", "foundry", "print('0.9.1')")
    assert doctor._foundry_command(ask=True).detail.startswith("0.9.1 (")
    program(tmp_path / "bin", "foundry", "raise SystemExit(1)")
    assert doctor._foundry_command(ask=True).status == "warning"


def test_fix_installs_the_pinned_set(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(PrerequisiteError, match=r"constraints\.txt"):
        doctor.fix(settings)
    (tree / "constraints.txt").touch()
    record = "import os, sys; print(os.getcwd(), *sys.argv[1:])"
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "bin", "python", record)))
    doctor.fix(settings)
    install = "-m pip install --disable-pip-version-check -c constraints.txt -e ."
    assert (settings.logs / "pip.log").read_text() == f"{tree} {install}\n"
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "bin", "python", "raise SystemExit('no network')")))
    with pytest.raises(PrerequisiteError, match="pip could not install the pinned packages: no network"):
        doctor.fix(settings)


def test_a_build_is_refused_without_a_new_cmake(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "build.py").write_text("raise SystemExit('must not be started')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    old = r"CMake 3\.25\.1; ONNX Runtime GenAI needs 3\.31"
    for version, message in {"": "no cmake", "cmake version 3.25.1": old, "nonsense": "nonsense"}.items():
        if version:
            program(tmp_path / "bin", "cmake", f"print({version!r})")
        with pytest.raises(PrerequisiteError, match=message):
            doctor.build_genai(tmp_path, settings)
    assert not settings.home.exists()


def test_build_and_install(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"build\.py"):
        doctor.build_genai(tmp_path, settings)
    (tmp_path / "build.py").write_text(BUILD)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "old-0.1-py3-none-any.whl").touch()
    program(tmp_path / "bin", "cmake", "print('cmake version 4.1.2')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    assert doctor.build_genai(tmp_path, settings).name == "tinygenai-1.0-py3-none-any.whl"
    assert json.loads((tmp_path / "argv.json").read_text()) == ["build.py", "--config", "Release"]
    assert (tmp_path / "installed" / "tinygenai.py").is_file()

    (tmp_path / "fail").touch()
    with pytest.raises(PrerequisiteError, match="GenAI failed: CMake Error: no compiler"):
        doctor.build_genai(tmp_path, settings)
