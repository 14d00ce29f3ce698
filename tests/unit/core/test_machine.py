"""Energy counters of made-up processors, and memory limits of made-up containers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from slmops.core import machine


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "POWERCAP", tmp_path / "powercap")
    return tmp_path / "powercap"


def zone(powercap: Path, folder: str, name: str, energy: str) -> None:
    """As Linux lists zones: all beside each other, parts of a package too."""
    (powercap / folder).mkdir(parents=True)
    (powercap / folder / "name").write_text(f"{name}\n")
    (powercap / folder / "energy_uj").write_text(f"{energy}\n")


@pytest.mark.parametrize(
    ("zones", "joules"),
    [
        pytest.param({"intel-rapl:0": ("package-0", "2500000")}, 2.5, id="one package"),
        pytest.param(
            {"intel-rapl:0": ("package-0", "2500000"), "intel-rapl:1": ("package-1", "500000")}, 3.0, id="two packages"
        ),
        pytest.param(
            {
                "intel-rapl:0": ("package-0", "2500000"),
                "intel-rapl:0:0": ("core", "1000000"),
                "intel-rapl:0:1": ("dram", "700000"),
            },
            2.5,
            id="parts of a package",
        ),
        pytest.param(
            {"intel-rapl:0": ("package-0", "2500000"), "intel-rapl:1": ("psys", "9000000")},
            2.5,
            id="the platform, which has the package in it",
        ),
        pytest.param(
            {"intel-rapl:0": ("package-0-die-0", "2000000"), "intel-rapl:1": ("package-0-die-1", "3000000")},
            5.0,
            id="dies of a package",
        ),
        pytest.param({"intel-rapl:0": ("package-0", "0")}, 0.0, id="nothing used yet"),
        pytest.param({"dtpm": ("dtpm", "2500000")}, None, id="other zones"),
        pytest.param({"intel-rapl:0": ("package-0", "soon")}, None, id="no number"),
        pytest.param({}, None, id="no zones"),
    ],
)
def test_energy(powercap: Path, zones: dict[str, tuple[str, str]], joules: float | None) -> None:
    for folder, (name, energy) in zones.items():
        zone(powercap, folder, name, energy)
    assert machine.energy_j() == joules


def test_one_unreadable_package_spoils_the_sum(powercap: Path) -> None:
    zone(powercap, "intel-rapl:0", "package-0", "2500000")
    zone(powercap, "intel-rapl:1", "package-1", "2500000")
    counter = powercap / "intel-rapl:1" / "energy_uj"
    counter.unlink()
    counter.mkdir()  # what root could not read either
    assert machine.energy_j() is None


def test_processors_that_do_not_tell(powercap: Path) -> None:
    assert not powercap.exists()
    assert machine.energy_j() is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, (64e9, 32e9), id="no container"),
        pytest.param(
            {
                "memory.max": "8000000000",
                "memory.current": "3000000000",
                "memory.stat": "anon 1\ninactive_file 1000000000",
            },
            (8e9, 6e9),
            id="version 2: what the kernel can drop is available",
        ),
        pytest.param(
            {"memory.max": "max", "memory.current": "3000000000", "memory.stat": "inactive_file 0"},
            (64e9, 32e9),
            id="version 2 without a limit",
        ),
        pytest.param(
            {
                "memory/memory.limit_in_bytes": "8000000000",
                "memory/memory.usage_in_bytes": "3000000000",
                "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 1000000000",
            },
            (8e9, 6e9),
            id="version 1",
        ),
        pytest.param(
            {
                "memory/memory.limit_in_bytes": str(2**63 - 4096),
                "memory/memory.usage_in_bytes": "3000000000",
                "memory/memory.stat": "total_inactive_file 0",
            },
            (64e9, 32e9),
            id="version 1 without a limit",
        ),
        pytest.param(
            {"memory.max": "48000000000", "memory.current": "1000000000", "memory.stat": "inactive_file 0"},
            (48e9, 32e9),
            id="others on the machine use more",
        ),
    ],
)
def test_memory_is_what_the_container_may_use(
    files: dict[str, str], expected: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=int(64e9), available=int(32e9)))
    assert machine.memory() == expected
