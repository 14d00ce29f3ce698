"""The checks that import packages, in a spoiled environment; test_compose.py has them in a whole one."""

from pathlib import Path

import pytest

from slmops.core.settings import Settings
from slmops.local import doctor
from slmops.local.doctor import Check

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_settings")]


def check(settings: Settings) -> dict[str, Check]:
    return {one.name: one for one in doctor.check(settings)}


def test_a_package_that_raises_or_crashes_is_named_and_the_others_are_still_checked(
    fresh: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gguf.py").write_text("raise ImportError('libgguf.so:\\n  no such file')")
    (tmp_path / "tabulate.py").write_text("import os; os.abort()")
    (tmp_path / "foundry_local_sdk.py").write_text("raise OSError('wrong glibc')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # The light ones only: what is tested is how the doctor goes on.
    monkeypatch.setattr(doctor.machine, "PACKAGES", ("gguf", "tabulate", "psutil", "onnxruntime", "foundry-local-sdk"))
    checks = check(fresh)
    assert "ImportError: libgguf.so: no such file" in checks["gguf"].detail
    assert "SIGABRT" in checks["tabulate"].detail
    assert "wrong glibc" in checks["foundry-local-sdk"].detail
    failed = {name for name, one in checks.items() if one.status == "failure"}
    assert failed == {"gguf", "tabulate", "foundry-local-sdk"}
    assert "Foundry Local" not in checks
    assert not fresh.home.exists()


def test_foundry_locals_runtime_that_does_not_start(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "PACKAGES", ("foundry-local-sdk",))
    monkeypatch.setenv("FOUNDRY_LOCAL_LIB_DIR", str(fresh.home / "nowhere"))
    checks = check(fresh)
    assert checks["Foundry Local"].status == "failure"
    assert "libfoundry_local" in checks["Foundry Local"].detail
