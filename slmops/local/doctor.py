"""Every prerequisite of the job as a check that says what is wrong and what to do about it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from slmops.core import machine
from slmops.core.errors import PrerequisiteError, WorkError
from slmops.core.settings import Settings
from slmops.core.values import Frozen, Hardware
from slmops.local import doctor_probe, stack
from slmops.processes import children

ROOT = Path(__file__).parents[2]
PYTHON = (3, 11)
MEMORY_GB, MEMORY_LEAST_GB = 8, 4
DISK_GB, DISK_LEAST_GB = 20, 5
CMAKE = Version("3.31")  # what ONNX Runtime GenAI's CMakeLists.txt asks for
PROBE_S = 300.0
PIP_S = 3600.0
BUILD_S = 4 * 3600.0
FIX_PACKAGES = "Run `slmops doctor --fix`, or `pip install -c constraints.txt -e .` in slmops' source tree."

_CRASH = "crash: "

# What has to be imported to know that a package works: the part that breaks when its neighbours do not fit.
_MODULES: dict[str, tuple[str, ...]] = {
    **{package: (package,) for package in machine.PACKAGES},
    "olive-ai": ("olive", "olive.workflows", "olive.passes.onnx.model_builder"),
    "onnxruntime-genai": ("onnxruntime_genai", "onnxruntime_genai.models.builder"),
    "foundry-local-sdk": ("foundry_local_sdk",),
    "prefect": ("prefect", "prefect.server.api.server"),
}


class Check(Frozen):
    """One prerequisite."""

    name: str
    status: Literal["ok", "warning", "failure"]
    detail: str
    fix: str | None = None


def check(settings: Settings, *, imports: bool = True) -> list[Check]:
    """Check every prerequisite; nothing is changed and nothing is raised.

    Args:
        settings: Whose disk and servers.
        imports: Also import every package and start Foundry Local's runtime, which takes some 15 s. Without, this
            takes well under a second.
    """
    here = machine.hardware()
    checks = [_python(), _memory(here), _disk(settings.home), _cpu(here)]
    packages = _packages()
    if imports:
        packages, more = _imports(packages)
        checks += [*packages, *more]
    else:
        checks += packages
    checks.append(_foundry_command(ask=imports))
    return [*checks, *_servers(settings)]


def require(checks: Sequence[Check]) -> None:
    """Refuse to go on if a check failed; warnings do not matter.

    Raises:
        PrerequisiteError: One or more failed; the message names each.
    """
    failed = [check for check in checks if check.status == "failure"]
    if failed:
        raise PrerequisiteError(
            "\n".join(f"{check.name}: {check.detail}" for check in failed),
            "; ".join(dict.fromkeys(check.fix for check in failed if check.fix)) or "See `slmops doctor`.",
        )


def fix(settings: Settings) -> None:
    """Install the pinned set of packages into this environment.

    Raises:
        PrerequisiteError: There is no source tree, or pip failed.
    """
    if not (ROOT / "constraints.txt").is_file():
        raise PrerequisiteError(
            f"{ROOT} holds no constraints.txt: slmops was not installed from its source tree.",
            "Get the source tree and run `pip install -c constraints.txt -e .` there.",
        )
    _pip(["-c", "constraints.txt", "-e", "."], settings, "install the pinned packages")


def build_genai(path: Path, settings: Settings, *, target: Path | None = None) -> Path:
    """Build ONNX Runtime GenAI from a source checkout, and install the wheel.

    Args:
        path: The checkout.
        settings: Where the logs go.
        target: Install into this folder rather than into this environment.

    Returns:
        The wheel.

    Raises:
        PrerequisiteError: It is no checkout, CMake is missing or too old, or the build or pip failed.
    """
    if not (path / "build.py").is_file():
        raise PrerequisiteError(
            f"{path} is no checkout of ONNX Runtime GenAI: it holds no build.py.",
            "Clone https://github.com/microsoft/onnxruntime-genai and name that folder.",
        )
    _require_cmake()
    before = set(path.glob("build/**/*.whl"))
    log = settings.logs / "build-genai.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "build.py", "--config", "Release"]
    built = children.run(command, log=log, timeout_s=BUILD_S, cwd=path)
    # An unchanged tree builds the same wheel again: any is right then, the newest is this one.
    wheels = sorted(path.glob("build/**/*.whl"), key=lambda wheel: (wheel not in before, wheel.stat().st_mtime))
    if built.returncode != 0 or not wheels:
        what = "made no wheel" if built.returncode == 0 else "failed"
        raise PrerequisiteError(
            f"The build of ONNX Runtime GenAI {what}: {children.last_words(log)}", f"Its log: {log}"
        )
    install_wheel(wheels[-1], settings, target=target)
    return wheels[-1]


def install_wheel(wheel: Path, settings: Settings, *, target: Path | None = None) -> None:
    """Install a wheel in place of what is there, and nothing that it depends on: the pinned set stays as it is.

    Raises:
        PrerequisiteError: pip failed.
    """
    where = [] if target is None else ["--target", str(target)]
    _pip(["--no-deps", "--force-reinstall", *where, str(wheel)], settings, f"install {wheel.name}")


def _pip(arguments: list[str], settings: Settings, what: str) -> None:
    log = settings.logs / "pip.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    done = children.run(command, log=log, timeout_s=PIP_S, cwd=ROOT)
    if done.returncode != 0:
        raise PrerequisiteError(f"pip could not {what}: {children.last_words(log)}", f"Its log: {log}")


def _require_cmake() -> None:
    """Refuse before anything is started: the build would fail only after minutes of downloads."""
    at_least = f"Install CMake {CMAKE} or newer (`pip install cmake` will do) and put it on PATH."
    program = shutil.which("cmake")
    if program is None:
        raise PrerequisiteError("ONNX Runtime GenAI is built with CMake, and there is no cmake.", at_least)
    said = _say([program, "--version"])
    try:
        found = Version(said.split()[2])
    except (IndexError, InvalidVersion):
        raise PrerequisiteError(f"{program} does not tell its version. It says: {said!r}", at_least) from None
    if found < CMAKE:
        raise PrerequisiteError(f"{program} is CMake {found}; ONNX Runtime GenAI needs {CMAKE}.", at_least)


# --- machine


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return Check(
            name="Python",
            status="failure",
            detail=f"{found}; Foundry Local's SDK needs {wanted}",
            fix=f"Make the environment with Python {wanted} or newer.",
        )
    return Check(name="Python", status="ok", detail=found)


def _memory(here: Hardware) -> Check:
    return _amount(
        "memory", here.memory_gb, MEMORY_GB, MEMORY_LEAST_GB, "GB", "Use a machine or a container with more memory."
    )


def _disk(home: Path) -> Check:
    folder = next(parent for parent in (home, *home.parents) if parent.exists())
    if not os.access(folder, os.W_OK):
        detail = f"{folder} cannot be written to"
        return Check(name="disk", status="failure", detail=detail, fix="Set SLMOPS_HOME to a folder of yours.")
    free = machine.disk_free(home) / 1e9
    advice = "Free some space, or set SLMOPS_HOME to a folder on a larger disk."
    return _amount("disk", free, DISK_GB, DISK_LEAST_GB, f"GB free for {home}", advice)


def _amount(name: str, found: float, wanted: float, least: float, unit: str, advice: str) -> Check:
    if found >= wanted:
        return Check(name=name, status="ok", detail=f"{found:.1f} {unit}")
    return Check(
        name=name,
        status="warning" if found >= least else "failure",
        detail=f"{found:.1f} {unit}; {wanted} are wanted, {least} at least",
        fix=advice,
    )


def _cpu(here: Hardware) -> Check:
    detail = f"{here.processor}, {here.cores} cores: {' '.join(here.isa) or 'instruction sets unknown'}"
    if here.isa and not {"avx2", "neon"} & set(here.isa):
        slow = "Use a processor with AVX2 or NEON; everything works without, but slowly."
        return Check(name="CPU", status="warning", detail=f"{detail}; no avx2", fix=slow)
    return Check(name="CPU", status="ok", detail=detail)


# --- packages


def _packages() -> list[Check]:
    """Is each package there, in the version that was tested with the others?"""
    pins, found = _pins(), machine.versions()
    checks = []
    for package in machine.PACKAGES:
        version, pin = found.get(package), pins.get(package, SpecifierSet())
        if version is None:
            checks.append(Check(name=package, status="failure", detail="not installed", fix=FIX_PACKAGES))
        elif not pin.contains(version, prereleases=True):
            detail = f"{version}, but {pin} was tested"
            checks.append(Check(name=package, status="warning", detail=detail, fix=FIX_PACKAGES))
        else:
            checks.append(Check(name=package, status="ok", detail=version))
    return checks


def _pins() -> dict[str, SpecifierSet]:
    """What constraints.txt pins; without the source tree, what slmops' own metadata asks for."""
    lines: Iterable[str] = []
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        file = ROOT / "constraints.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else metadata.requires("slmops") or []
    pins: dict[str, SpecifierSet] = {}
    for line in lines:
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(line.partition("#")[0].strip())
            pins[canonicalize_name(requirement.name)] = requirement.specifier
    return pins


def _imports(packages: list[Check]) -> tuple[list[Check], list[Check]]:
    """Import what is installed. Returns the packages' checks, and those of what was seen on the way."""
    installed = [one.name for one in packages if one.status != "failure"]
    with tempfile.TemporaryDirectory(prefix="slmops-doctor-") as folder:
        work = Path(folder)
        # Two native GenAI libraries cannot live in one process: Foundry Local's gets one of its own.
        most, providers = _probe_all([name for name in installed if name != "foundry-local-sdk"], work)
        foundry = doctor_probe.Result(problems={})
        if "foundry-local-sdk" in installed:
            modules = {"foundry-local-sdk": _MODULES["foundry-local-sdk"]}
            foundry = _probe(doctor_probe.Request(modules=modules, foundry=work / "foundry"), work)
    problems = {**most, **foundry.problems}
    checked = [
        one
        if one.name not in problems
        else Check(
            name=one.name,
            status="failure",
            detail=f"{one.detail} cannot be imported: {problems[one.name]}",
            fix=FIX_PACKAGES,
        )
        for one in packages
    ]
    more = []
    if providers:
        more.append(Check(name="ONNX Runtime", status="ok", detail=", ".join(providers)))
    if doctor_probe.FOUNDRY in problems:
        detail = f"its runtime does not start: {problems[doctor_probe.FOUNDRY]}"
        more.append(Check(name="Foundry Local", status="failure", detail=detail, fix=FIX_PACKAGES))
    elif foundry.foundry_version:
        found = ", ".join(foundry.foundry_providers) or "none beyond the CPU"
        detail = f"{foundry.foundry_version}; execution providers to download: {found}"
        more.append(Check(name="Foundry Local", status="ok", detail=detail))
    return checked, more


def _probe_all(packages: list[str], work: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Import packages in one child; where one crashes it, what the others said is lost with it, so again without."""
    crashes: dict[str, str] = {}
    while True:
        modules = {name: _MODULES[name] for name in packages if name not in crashes}
        if not modules:
            return crashes, ()
        result = _probe(doctor_probe.Request(modules=modules), work)
        crashed = {name: text for name, text in result.problems.items() if text.startswith(_CRASH)}
        if not crashed:
            return {**result.problems, **crashes}, result.onnxruntime_providers
        crashes |= crashed


def _probe(request: doctor_probe.Request, work: Path) -> doctor_probe.Result:
    trying = next(iter(request.modules))

    def follow(line: str) -> None:
        nonlocal trying
        name = line.removeprefix(doctor_probe.TRYING)
        if name != line and name in (*request.modules, doctor_probe.FOUNDRY):
            trying = name

    # Nothing is to be sent or fetched, and no file to appear in the user's home.
    env = {**stack.QUIET, "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(work / "prefect")}
    try:
        result, _ = children.call(
            "slmops.local.doctor_probe",
            request,
            doctor_probe.Result,
            work=work,
            log=work / "probe.log",
            timeout_s=PROBE_S,
            error=WorkError,
            env=env,
            on_line=follow,
        )
    except WorkError as error:
        return doctor_probe.Result(problems={trying: f"{_CRASH}{error.message}"})
    return result


# --- programs and servers


def _foundry_command(*, ask: bool) -> Check:
    program = shutil.which("foundry")
    if program is None:
        note = "it does not exist on Linux" if sys.platform == "linux" else "optional: models are used through the SDK"
        return Check(name="foundry command", status="ok", detail=f"none; {note}")
    if not ask:
        return Check(name="foundry command", status="ok", detail=program)
    said = _say([program, "--version"])
    if not said:
        advice = "Reinstall Foundry Local, or remove this command from PATH."
        return Check(name="foundry command", status="warning", detail=f"{program} does not answer", fix=advice)
    return Check(name="foundry command", status="ok", detail=f"{said.splitlines()[0]} ({program})")


def _say(command: list[str]) -> str:
    """What a program prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _servers(settings: Settings) -> list[Check]:
    now = stack.status(settings)
    return [
        _server("Prefect server", now.prefect, settings.prefect_api_url),
        _server("MLflow server", now.mlflow, settings.tracking_uri),
    ]


def _server(name: str, server: stack.ServerStatus, given: str | None) -> Check:
    if server.ok:
        return Check(name=name, status="ok", detail=str(server.url))
    if given is None:
        return Check(name=name, status="warning", detail="not running", fix="Run `slmops up`.")
    advice = "Start it, or unset the variable that names it so that slmops starts one of its own."
    return Check(name=name, status="failure", detail=f"{given} does not answer", fix=advice)
