"""The prerequisites of a job: each is a check that says what is wrong and how to fix it."""

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from slmops.local import stack
from slmops.processes import children

MEMORY_GB = (4, 8)  # what is necessary and what is recommended, in 10^9 bytes
DISK_GB = (5, 20)
HOME_CHARACTERS = 90  # beside these a home has paths of up to 170: long names of models and recipes, and their files
CMAKE = Version("3.31")  # what ONNX Runtime GenAI's CMakeLists.txt asks for
PROBE_S = 300.0
PIP_S = 3600.0
BUILD_S = 4 * 3600.0
TRYING = "trying "
FOUNDRY = "Foundry Local"
FIX_PACKAGES = "Run `slmops doctor --fix`, or `pip install -c constraints.txt -e .` in slmops' source tree."

# What must be imported to know that a package works: what breaks first if other packages do not fit.
_IMPORTED: dict[str, tuple[str, ...]] = {
    **{package: (package,) for package in machine.PACKAGES},
    "olive-ai": ("olive", "olive.workflows", "olive.passes.onnx.model_builder"),
    "onnxruntime-genai": ("onnxruntime_genai", "onnxruntime_genai.models.builder"),
    "foundry-local-sdk": ("foundry_local_sdk",),
    "prefect": ("prefect", "prefect.server.api.server"),
}


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warning", "failure"]
    detail: str
    fix: str | None = None


class ProbeRequest(Frozen):
    """The modules of each package to import, and a folder for Foundry Local's runtime if it has to start."""

    modules: dict[str, tuple[str, ...]]
    foundry: Path | None = None


class ProbeResult(Frozen):
    """What is wrong with each package, and what the two runtimes say of themselves."""

    problems: dict[str, str]
    onnxruntime_providers: tuple[str, ...] = ()
    foundry_version: str | None = None
    foundry_providers: tuple[str, ...] = ()


def check(settings: Settings, *, imports: bool = True) -> list[Check]:
    """Check every prerequisite; nothing is changed and nothing is raised.

    Those with ``imports`` import every package and start Foundry Local's runtime, which takes about 15 s; the others
    take well under a second.
    """
    here = machine.hardware()
    packages = _imports(_packages()) if imports else _packages()
    own = [
        Check("Python", "ok", platform.python_version()),
        _amount("memory", here.memory_gb, MEMORY_GB, "GB", "Use a machine or a container with more memory."),
        _disk(settings.home),
        _cpu(here),
    ]
    now = stack.status(settings)
    servers = [
        _server("Prefect server", now.prefect, settings.prefect_api_url),
        _server("MLflow server", now.mlflow, settings.tracking_uri),
    ]
    return [*own, *packages, _foundry_command(ask=imports), *servers]


def require(checks: Sequence[Check]) -> None:
    """Raise a PrerequisiteError that names each failed check, if there is one; warnings do not matter."""
    failed = [check for check in checks if check.status == "failure"]
    if failed:
        advice = "; ".join(dict.fromkeys(check.fix for check in failed if check.fix)) or "See `slmops doctor`."
        raise PrerequisiteError("\n".join(f"{check.name}: {check.detail}" for check in failed), advice)


def fix(settings: Settings) -> None:
    """Install the pinned set of packages; a PrerequisiteError if there is no source tree, or pip fails."""
    if not (stack.ROOT / "constraints.txt").is_file():
        missing = f"{stack.ROOT} has no constraints.txt: slmops was not installed from its source tree."
        raise PrerequisiteError(missing, "Get the source tree and run `pip install -c constraints.txt -e .` there.")
    _pip(["-c", "constraints.txt", "-e", "."], settings, "install the pinned packages")


def build_genai(path: Path, settings: Settings) -> Path:
    """Build ONNX Runtime GenAI from a source checkout, and install the wheel in place of the one that is there.

    Nothing that it depends on is installed: the pinned set stays as it is. Returns the wheel; a PrerequisiteError if it
    is not a checkout, CMake is missing or too old, or the build or pip fails.
    """
    if not (path / "build.py").is_file():
        advice = "Clone https://github.com/microsoft/onnxruntime-genai and name that folder."
        raise PrerequisiteError(f"{path} is not a checkout of ONNX Runtime GenAI: it has no build.py.", advice)
    _require_cmake()
    before = set(path.glob("build/**/*.whl"))
    log = settings.logs / "build-genai.log"
    log.unlink(missing_ok=True)
    built = children.run([sys.executable, "build.py", "--config", "Release"], log=log, timeout_s=BUILD_S, cwd=path)
    # An unchanged tree builds the same wheel again; then the newest is the right one.
    wheels = sorted(path.glob("build/**/*.whl"), key=lambda wheel: (wheel not in before, wheel.stat().st_mtime))
    if built.returncode != 0 or not wheels:
        what = "made no wheel" if built.returncode == 0 else "failed"
        message = f"The build of ONNX Runtime GenAI {what}: {children.last_words(log)}"
        raise PrerequisiteError(message, f"Its log: {log}")
    _pip(["--no-deps", "--force-reinstall", str(wheels[-1])], settings, f"install {wheels[-1].name}")
    return wheels[-1]


def _pip(arguments: list[str], settings: Settings, what: str) -> None:
    log = settings.logs / "pip.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if children.run(command, log=log, timeout_s=PIP_S, cwd=stack.ROOT).returncode != 0:
        raise PrerequisiteError(f"pip could not {what}: {children.last_words(log)}", f"Its log: {log}")


def _require_cmake() -> None:
    """Refuse before the build starts: it would fail only after minutes of downloads."""
    at_least = f"Install CMake {CMAKE} or newer (`pip install cmake` will do) and put it on PATH."
    program = shutil.which("cmake")
    if program is None:
        raise PrerequisiteError("ONNX Runtime GenAI is built with CMake, and there is no cmake.", at_least)
    said = _say([program, "--version"])
    try:
        found = Version(said.split()[2])
    except (IndexError, InvalidVersion):
        raise PrerequisiteError(f"{program} does not say its version, but {said!r}.", at_least) from None
    if found < CMAKE:
        raise PrerequisiteError(f"{program} is CMake {found}; ONNX Runtime GenAI needs {CMAKE}.", at_least)


def _disk(home: Path) -> Check:
    folder = next(parent for parent in (home, *home.parents) if parent.exists())
    if not os.access(folder, os.W_OK):
        return Check("disk", "failure", f"{folder} cannot be written to", "Set SLMOPS_HOME to a folder of yours.")
    advice = "Free some space, or set SLMOPS_HOME to a folder on a larger disk."
    if sys.platform == "win32" and len(str(home.resolve())) > HOME_CHARACTERS:
        said = f"{home} is longer than {HOME_CHARACTERS} characters, and Windows refuses paths from 260 on"
        return Check("disk", "warning", said, "Set SLMOPS_HOME to a folder near the root of a drive.")
    return _amount("disk", machine.disk_free(home) / 1e9, DISK_GB, f"GB free for {home}", advice)


def _amount(name: str, found: float, levels: tuple[float, float], unit: str, fix: str) -> Check:
    least, wanted = levels
    detail = f"{found:.1f} {unit}"
    if found >= wanted:
        return Check(name, "ok", detail)
    detail += f"; {wanted} are recommended, {least} are necessary"
    return Check(name, "warning" if found >= least else "failure", detail, fix)


def _cpu(here: Hardware) -> Check:
    detail = f"{here.processor}, {here.cores} cores: {' '.join(here.isa) or 'instruction sets unknown'}"
    if here.isa and not {"avx2", "neon"} & set(here.isa):
        slow = "Use a processor with AVX2 or NEON. Everything works without, but slowly."
        return Check("CPU", "warning", f"{detail}; no avx2", slow)
    return Check("CPU", "ok", detail)


def _packages() -> list[Check]:
    """Is each package there, in the version that was tested with the others?"""
    pins, found = _pins(), machine.versions()
    checks = []
    for package in machine.PACKAGES:
        version, pin = found.get(package), pins.get(package, SpecifierSet())
        if version is None:
            checks.append(Check(package, "failure", "not installed", FIX_PACKAGES))
        elif not pin.contains(version, prereleases=True):
            checks.append(Check(package, "warning", f"{version}, but {pin} was tested", FIX_PACKAGES))
        else:
            checks.append(Check(package, "ok", version))
    return checks


def _pins() -> dict[str, SpecifierSet]:
    """What constraints.txt pins; without the source tree, what slmops' own metadata asks for."""
    lines: Iterable[str] = []
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        file = stack.ROOT / "constraints.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else metadata.requires("slmops") or []
    pins: dict[str, SpecifierSet] = {}
    for line in lines:
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(line.partition("#")[0].strip())
            pins[canonicalize_name(requirement.name)] = requirement.specifier
    return pins


def _imports(packages: list[Check]) -> list[Check]:
    """Import what is installed. Returns the packages' checks, and those of the two runtimes."""
    modules = {one.name: _IMPORTED[one.name] for one in packages if one.status != "failure"}
    # Two native GenAI libraries cannot live in one process: Foundry Local's gets a process of its own.
    sdk = {name: modules.pop(name) for name in ("foundry-local-sdk",) if name in modules}
    with tempfile.TemporaryDirectory(prefix="slmops-doctor-") as folder:
        work = Path(folder)
        found = _probe(ProbeRequest(modules=modules), work)
        foundry = _probe(ProbeRequest(modules=sdk, foundry=work / "foundry"), work)
    problems = found.problems | foundry.problems
    checks = [
        Check(one.name, "failure", f"{one.detail} cannot be imported: {problems[one.name]}", FIX_PACKAGES)
        if one.name in problems
        else one
        for one in packages
    ]
    if found.onnxruntime_providers:
        checks.append(Check("ONNX Runtime", "ok", ", ".join(found.onnxruntime_providers)))
    if FOUNDRY in problems:
        checks.append(Check(FOUNDRY, "failure", f"its runtime does not start: {problems[FOUNDRY]}", FIX_PACKAGES))
    elif foundry.foundry_version:
        more = ", ".join(foundry.foundry_providers) or "none beyond the CPU"
        checks.append(Check(FOUNDRY, "ok", f"{foundry.foundry_version}; execution providers to download: {more}"))
    return checks


def _probe(request: ProbeRequest, work: Path) -> ProbeResult:
    """Import packages in one child. A crash loses what the others said, so they are imported again without it."""
    if not request.modules:
        return ProbeResult(problems={})
    lines: list[str] = []
    # Nothing may be sent or fetched, and no file may appear in the user's home.
    env = {**stack.QUIET, "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(work / "prefect")}
    try:
        return children.call(
            handle, request, log=work / "probe.log", timeout_s=PROBE_S, error=WorkError, env=env, on_line=lines.append
        )[0]
    except WorkError as error:
        first, *more = request.modules
        crashed = [first, *(name for name in (*more, FOUNDRY) if f"{TRYING}{name}" in lines)][-1]
        others = {name: imported for name, imported in request.modules.items() if crashed not in (name, FOUNDRY)}
        rest = _probe(request.model_copy(update={"modules": others}), work)
        return rest.model_copy(update={"problems": {**rest.problems, crashed: f"crash: {error.message}"}})


def _foundry_command(*, ask: bool) -> Check:
    name, program = "foundry command", shutil.which("foundry")
    if program is None:
        return Check(name, "ok", "none; it is optional: models are used through the SDK")
    if not ask:
        return Check(name, "ok", program)
    if said := _say([program, "--version"]):
        return Check(name, "ok", f"{said.splitlines()[0]} ({program})")
    advice = "Reinstall Foundry Local, or remove this command from PATH."
    return Check(name, "warning", f"{program} does not answer", advice)


def _say(command: list[str]) -> str:
    """What a program prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _server(name: str, server: stack.ServerStatus, given: str | None) -> Check:
    if server.ok:
        return Check(name, "ok", str(server.url))
    if given is None:
        return Check(name, "warning", "not running", "Run `slmops up`.")
    advice = "Start it, or unset the variable that names it so that slmops starts one of its own."
    return Check(name, "failure", f"{given} does not answer", advice)


# --- in a child process, so that a crash does not end the doctor


def handle(request: ProbeRequest) -> ProbeResult:
    """Import one package after the other, and print which, so that the parent knows where a crash was."""
    problems: dict[str, str] = {}
    for package, modules in request.modules.items():
        print(f"{TRYING}{package}", flush=True)
        try:
            for module in modules:
                importlib.import_module(module)
        except (Exception, SystemExit) as error:
            problems[package] = _one_line(error)
    if request.foundry is not None and not problems:
        return _start_foundry(request.foundry)
    providers = []
    if "onnxruntime" in request.modules and "onnxruntime" not in problems:
        providers = importlib.import_module("onnxruntime").get_available_providers()
    return ProbeResult(problems=problems, onnxruntime_providers=tuple(providers))


def _start_foundry(folder: Path) -> ProbeResult:
    print(f"{TRYING}{FOUNDRY}", flush=True)
    try:
        # Here, not above: it loads a native GenAI library that cannot live with the one that Olive uses.
        from slmops.foundry import runtime

        providers = tuple(str(provider.name) for provider in runtime.manager(folder).discover_eps())
        version = importlib.import_module("foundry_local_sdk").__version__
        return ProbeResult(problems={}, foundry_version=version, foundry_providers=providers)
    except (Exception, SystemExit) as error:
        return ProbeResult(problems={FOUNDRY: _one_line(error)})


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
