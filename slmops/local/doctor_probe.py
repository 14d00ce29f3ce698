"""Child process: import packages and start Foundry Local's runtime, so that a crash does not end the doctor."""

import importlib
from pathlib import Path

from slmops.core.values import Frozen

TRYING = "trying "
FOUNDRY = "Foundry Local"


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

        running = runtime.manager(folder)
        providers = tuple(str(provider.name) for provider in running.discover_eps())
        version = importlib.import_module("foundry_local_sdk").__version__
        return ProbeResult(problems={}, foundry_version=version, foundry_providers=providers)
    except (Exception, SystemExit) as error:
        return ProbeResult(problems={FOUNDRY: _one_line(error)})


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
