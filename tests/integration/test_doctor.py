"""The checks that import every package, in this environment, whole and spoiled; and a build from pretended sources."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from slmops.core.errors import PrerequisiteError
from slmops.core.settings import Settings
from slmops.local import doctor
from slmops.local.doctor import Check

pytestmark = pytest.mark.integration

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
    return Settings(home=tmp_path / "home")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "onnxruntime-genai"
    folder.mkdir()
    (folder / "build.py").write_text(BUILD)
    return folder


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {one.name: one for one in checks}


def test_this_environment_is_whole(settings: Settings) -> None:
    checks = by_name(doctor.check(settings))
    wrong = {name for name, one in checks.items() if one.status != "ok"} - {"memory", "disk", "CPU"}
    assert wrong == {"Prefect server", "MLflow server"}
    assert "CPUExecutionProvider" in checks["ONNX Runtime"].detail
    assert checks["Foundry Local"].detail.startswith(checks["foundry-local-sdk"].detail)
    assert not settings.home.exists()


def test_a_package_that_raises_or_crashes_is_named_and_the_others_are_still_checked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "gguf.py").write_text("raise ImportError('libgguf.so:\\n  no such file')")
    (spoiled / "tabulate.py").write_text("import os; os.abort()")
    (spoiled / "foundry_local_sdk.py").write_text("raise OSError('wrong glibc')")
    monkeypatch.setenv("PYTHONPATH", str(spoiled))
    # The light ones only: what is tested is how the doctor goes on.
    monkeypatch.setattr(doctor.machine, "PACKAGES", ("gguf", "tabulate", "psutil", "onnxruntime", "foundry-local-sdk"))
    checks = by_name(doctor.check(settings))
    assert checks["gguf"].status == "failure"
    assert "ImportError: libgguf.so: no such file" in checks["gguf"].detail
    assert checks["tabulate"].status == "failure"
    assert "SIGABRT" in checks["tabulate"].detail
    assert checks["psutil"].status == "ok"
    assert checks["onnxruntime"].status == "ok"
    assert "wrong glibc" in checks["foundry-local-sdk"].detail
    assert "Foundry Local" not in checks


def test_foundry_locals_runtime_that_does_not_start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "PACKAGES", ("foundry-local-sdk",))
    monkeypatch.setenv("FOUNDRY_LOCAL_LIB_DIR", str(settings.home / "nowhere"))
    checks = by_name(doctor.check(settings))
    assert checks["Foundry Local"].status == "failure"
    assert "libfoundry_local" in checks["Foundry Local"].detail


def test_build_and_install(settings: Settings, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    cmake = programs / "cmake"
    cmake.write_text(f"#!{sys.executable}\nprint('cmake version 4.1.2')\n")
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    stale = checkout / "build" / "old-0.1-py3-none-any.whl"
    stale.parent.mkdir()
    stale.touch()

    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    wheel = doctor.build_genai(checkout, settings)
    assert wheel.name == "tinygenai-1.0-py3-none-any.whl"
    assert json.loads((checkout / "argv.json").read_text()) == ["build.py", "--config", "Release"]
    assert (tmp_path / "installed" / "tinygenai.py").is_file()

    (checkout / "fail").touch()
    with pytest.raises(PrerequisiteError, match="GenAI failed: CMake Error: no compiler"):
        doctor.build_genai(checkout, settings)
