"""Energy counters of made-up processors, memory limits of made-up containers, and machines whose speeds compare."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slmops.core import machine
from slmops.core.values import Hardware

PACKAGE = {"intel-rapl:0": ("package-0", "2500000")}


@pytest.mark.parametrize(
    ("zones", "joules"),
    [
        pytest.param(PACKAGE, 2.5, id="one package"),
        pytest.param({**PACKAGE, "intel-rapl:1": ("package-1", "500000")}, 3.0, id="two packages"),
        pytest.param({**PACKAGE, "intel-rapl:0:0": ("core", "1000000")}, 2.5, id="a part of a package"),
        pytest.param({**PACKAGE, "intel-rapl:1": ("psys", "9000000")}, 2.5, id="the platform"),
        pytest.param({"intel-rapl:0": ("package-0-die-0", "2500000")}, 2.5, id="a die of a package"),
        pytest.param({"intel-rapl:0": ("package-0", "0")}, 0.0, id="nothing used yet"),
        pytest.param({"dtpm": ("dtpm", "2500000")}, None, id="other zones"),
        pytest.param({"intel-rapl:0": ("package-0", "soon")}, None, id="not a number"),
        pytest.param({**PACKAGE, "intel-rapl:1": ("package-1", "")}, None, id="one that cannot be read"),
        pytest.param({}, None, id="no zones"),
    ],
)
def test_energy(
    zones: dict[str, tuple[str, str]], joules: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    for folder, (name, energy) in zones.items():  # as Linux lists zones: all beside each other, parts of a package too
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        counter = tmp_path / folder / "energy_uj"
        counter.write_text(f"{energy}\n") if energy else counter.mkdir()  # which root cannot read either
    assert machine.energy_j() == joules


def version_2(limit: str, used: int, cache: int, folder: str = ".") -> dict[str, str]:
    files = {"max": limit, "current": str(used), "stat": f"anon 1\ninactive_file {cache}"}
    return {f"{folder}/memory.{name}": text for name, text in files.items()}


def version_1(limit: int, used: int, cache: int, folder: str = "memory") -> dict[str, str]:
    files = {"limit_in_bytes": str(limit), "usage_in_bytes": str(used)}
    files["stat"] = f"inactive_file 5\ntotal_inactive_file {cache}"
    return {f"{folder}/memory.{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, (64e9, 32e9), id="no container"),
        pytest.param(version_2("max", 3 * 10**9, 0), (64e9, 32e9), id="version 2 without a limit"),
        pytest.param(version_2("8000000000", 3 * 10**9, 10**9), (8e9, 6e9), id="what the kernel can drop is available"),
        pytest.param(version_2("48000000000", 10**9, 0), (48e9, 32e9), id="others on the machine use more"),
        pytest.param(version_1(8 * 10**9, 3 * 10**9, 10**9), (8e9, 6e9), id="version 1"),
        pytest.param(version_1(2**63 - 4096, 3 * 10**9, 0), (64e9, 32e9), id="version 1 without a limit"),
        pytest.param(version_2("16000000000", 10**9, 0, "jobs"), (16e9, 15e9), id="the group above the process's own"),
        pytest.param(version_1(8 * 10**9, 3 * 10**9, 0, "memory/one"), (8e9, 5e9), id="its own group in version 1"),
    ],
)
def test_memory_is_what_the_container_may_use(
    files: dict[str, str], expected: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text("4:memory:/one\n1:cpu:/\n0::/jobs/one\n")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=int(64e9), available=int(32e9)))
    assert machine.memory() == expected


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_is_what_a_process_may_have(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    unlimited, number = machine.memory(), getattr(resource, kind)
    limits = {number: (unlimited[0] // 3, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda asked: limits.get(asked, (resource.RLIM_INFINITY,) * 2))
    total, available = machine.memory()
    assert total == unlimited[0] // 3
    assert available <= total


def test_hardware_of_an_arm_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "memory", lambda: (1_960_000_000, 0))
    monkeypatch.setattr(sys, "platform", "linux")
    found = machine.hardware()
    assert (found.isa, found.memory_gb) == (("neon", "dotprod", "i8mm"), 2.0)
    assert found.cores >= 1


def test_hardware_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "machdep.cpu.brand_string: Apple M3\nhw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.sme: 0"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=said))
    monkeypatch.setattr(sys, "platform", "darwin")
    found = machine.hardware()
    assert (found.processor, found.isa) == ("Apple M3", ("neon", "dotprod"))


KIND = "Some CPU @ 2.60GHz (Linux x86_64), 8 cores, avx avx2"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, KIND),
        ({"system": "Linux 6.11.2", "memory_gb": 64.0, "processor": "Some CPU @ 2.60GHz "}, KIND),
        ({"system": "Windows 11"}, KIND.replace("Linux", "Windows")),
        ({"isa": ("avx", "avx2", "avx512f")}, f"{KIND} avx512f"),
        (
            {"processor": "aarch64", "machine": "aarch64", "isa": (), "cores": 1},
            "aarch64 (Linux aarch64), 1 cores, no extensions",
        ),
    ],
)
def test_machines_of_one_kind(changes: dict[str, Any], kind: str) -> None:
    fields = {"system": "Linux 6.8.0-45", "machine": "x86_64", "processor": "Some  CPU @ 2.60GHz", "cores": 8}
    assert Hardware(**{**fields, "memory_gb": 32.0, "isa": ("avx", "avx2"), **changes}).kind == kind
