"""Child process: which keys of an Olive config would Olive accept, and which would it ignore without an error?"""

from __future__ import annotations

import copy
import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from slmops.core.validation import dotted, predicate
from slmops.core.values import Frozen
from slmops.processes import child

_IGNORED = re.compile(r"Keys \{(.*)\} are not part of (\w+)")
# ModelBuilder hands extra_options on to the builder of ONNX Runtime GenAI, which reads what it knows.
_READ_BY_BUILDER = re.compile(
    r"""extra_options(?:\.get\(|\[)\s*["'](\w+)|["'](\w+)["'] (?:not )?in (?:self\.)?extra_options"""
)

_OF_EVERY_PASS = {"type", "host", "evaluator"}


class SchemaRequest(Frozen):
    """A complete Olive workflow config."""

    config: dict[str, Any]


class SchemaResult(Frozen):
    """What is wrong with it, a sentence each."""

    problems: list[str]


class _Catch(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def handle(request: SchemaRequest) -> SchemaResult:
    """Validate as Olive does, and count what Olive only warns of as a problem."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.package_config import OlivePackageConfig
    from olive.workflows.run.config import RunConfig
    from pydantic import ValidationError

    package = OlivePackageConfig.load_default_config()
    problems: list[str] = []
    for name, step in request.config["passes"].items():
        try:
            kind = package.import_pass_module(step["type"])
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
    catch = _Catch()
    logging.getLogger("olive").addHandler(catch)
    try:
        checked = RunConfig.model_validate(copy.deepcopy(request.config))
        problems += [] if problems else _bad_values(checked.passes)
    except ValidationError as error:
        problems += [
            f"{dotted(e['loc']).removeprefix('engine.')} {predicate(e)}"
            for e in error.errors()
            if "Invalid engine" not in e["msg"]  # only says that the engine's own errors, listed too, are errors
        ]
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    ignored = [m for m in map(_IGNORED.search, catch.said) if m]
    problems += [f"{m[2]}: Olive would ignore {m[1]}" for m in ignored if not any(m[1] in p for p in problems)]
    return SchemaResult(problems=problems)


def _unknown(where: str, given: dict[str, Any], accepted: set[str]) -> list[str]:
    found = []
    for key in sorted(set(given) - accepted - _OF_EVERY_PASS):
        near = get_close_matches(key, accepted, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        found.append(
            f"{where}: unknown key {key!r}{hint}, which Olive would ignore without an error. "
            f"Accepted: {', '.join(sorted(accepted))}"
        )
    return found


def _bad_values(passes: dict[str, list[Any]]) -> list[str]:
    """Values of the wrong type, which Olive looks at only when their pass's turn has come."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.package_config import OlivePackageConfig
    from pydantic import ValidationError

    package = OlivePackageConfig.load_default_config()
    found = []
    for name, (step,) in passes.items():
        try:
            package.import_pass_module(step.type).generate_config(DEFAULT_CPU_ACCELERATOR, step.config, {}, True)
        except ValidationError as error:
            # The first of a key's errors is of its own type; the others are of Olive's placeholders for a search.
            first = {str(e["loc"][0]): predicate(e) for e in reversed(error.errors()) if e["loc"]}
            found += [f"passes.{name}.{key} {said}" for key, said in sorted(first.items())] or [str(error)]
    return found


def _builder_options() -> set[str]:
    import onnxruntime_genai

    folder = Path(onnxruntime_genai.__file__).parent / "models"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return {name for pair in _READ_BY_BUILDER.findall(text) for name in pair if name}


if __name__ == "__main__":
    child.main(SchemaRequest, handle)
