"""Child process: which keys of an Olive config would Olive accept, and which would it ignore without an error?"""

import copy
import logging
import re
from difflib import get_close_matches
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from slmops.conversion import fixes
from slmops.conversion.olive_worker import Workflow
from slmops.core.validation import dotted, predicate
from slmops.core.values import Frozen

# Olive only warns of such keys, and this warning is the one place where it names them.
_IGNORED = re.compile(r"Keys \{(.*)\} are not part of (\w+)")
# ModelBuilder hands extra_options on to the builder of ONNX Runtime GenAI, which has no list of the ones that it knows:
# they are collected from its source.
_READ_BY_BUILDER = re.compile(
    r"""extra_options(?:\.get\(|\[)\s*["'](\w+)|["'](\w+)["'] (?:not )?in (?:self\.)?extra_options"""
)


class SchemaResult(Frozen):
    """What is wrong with it, a sentence each."""

    problems: list[str]


def handle(request: Workflow) -> SchemaResult:
    """Validate as Olive does, and also report what Olive only warns of."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.package_config import OlivePackageConfig
    from olive.workflows.run.config import RunConfig
    from pydantic import ValidationError

    package = OlivePackageConfig.model_validate(fixes.package())
    problems: list[str] = []
    kinds: dict[str, Any] = {}
    for name, step in request.config["passes"].items():
        try:
            kind = kinds[name] = package.import_pass_module(step["type"])
        except Exception:
            near = get_close_matches(step["type"].lower(), package.passes, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(package.passes))}"
            problems.append(f"passes.{name}: there is no pass {step['type']!r}; {hint}")
            continue
        accepted = set(kind.default_config(DEFAULT_CPU_ACCELERATOR))
        problems += _unknown(f"passes.{name} ({kind.__name__})", step, accepted)
        if kind.__name__ == "ModelBuilder":
            options = step.get("extra_options") or {}
            problems += _unknown(f"passes.{name}.extra_options", options, _builder_options())
    warnings = BufferingHandler(100_000)
    logging.getLogger("olive").addHandler(warnings)
    try:
        checked = RunConfig.model_validate(copy.deepcopy(request.config))
        for name, (step,) in {} if problems else checked.passes.items():
            problems += _bad_values(name, step.config, kinds[name])
    except ValidationError as error:
        problems += [
            f"{dotted(e['loc']).removeprefix('engine.')} {predicate(e)}"
            for e in error.errors()
            if "Invalid engine" not in e["msg"]  # only says that the engine's own errors, listed too, are errors
        ]
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    ignored = [found for record in warnings.buffer if (found := _IGNORED.search(record.getMessage()))]
    problems += [f"{m[2]}: Olive would ignore {m[1]}" for m in ignored if not any(m[1] in p for p in problems)]
    return SchemaResult(problems=problems)


def _unknown(where: str, given: dict[str, Any], accepted: set[str]) -> list[str]:
    found = []
    for key in sorted(set(given) - accepted - {"type", "host", "evaluator"}):  # every pass has these
        near = get_close_matches(key, accepted, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        found.append(
            f"{where}: unknown key {key!r}{hint}, which Olive would ignore without an error. "
            f"Accepted: {', '.join(sorted(accepted))}"
        )
    return found


def _bad_values(name: str, config: dict[str, Any], kind: Any) -> list[str]:
    """Values of the wrong type, which Olive itself finds only when the pass begins."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from pydantic import ValidationError

    try:
        kind.generate_config(DEFAULT_CPU_ACCELERATOR, config, {}, True)
    except ValidationError as error:
        # The first of a key's errors is about its own type; the others are about Olive's placeholders for a search.
        first = {str(e["loc"][0]): predicate(e) for e in reversed(error.errors()) if e["loc"]}
        return [f"passes.{name}.{key} {said}" for key, said in sorted(first.items())] or [str(error)]
    return []


def _builder_options() -> set[str]:
    import onnxruntime_genai

    folder = Path(onnxruntime_genai.__file__).parent / "models"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return {name for pair in _READ_BY_BUILDER.findall(text) for name in pair if name}
