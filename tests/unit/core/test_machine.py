"""The energy counters of made-up processors."""

from __future__ import annotations

from pathlib import Path

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
