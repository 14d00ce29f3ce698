"""Child process: run one Olive workflow. Olive exits 0 whatever happens, and only its log says why: it is read here."""

import itertools
import re
from functools import cache
from typing import Any

from slmops.conversion import fixes
from slmops.core.values import Frozen

_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))(?:: (.*))?$")
_TAGGED = re.compile(r"\[(ERROR|WARNING|INFO)\] \[[^]]*\] (.*)")
_INVALID = "Invalid config, pruned"
_RUNNING = "Running pass "
_PASS = re.compile(rf"\[INFO\] .*{_RUNNING}(\w+):(\w+)")

_NO_INT8 = ("KeyError: 'int8'", "KeyError: <Precision.INT8")
_NO_INT8_MEANS = "ModelBuilder has no int8 for the CPU; use --precision int8, which slmops makes with other passes"


class Workflow(Frozen):
    """A complete Olive workflow config."""

    config: dict[str, Any]


def handle(request: Workflow) -> Frozen:
    """Run the workflow; it leaves its model in a folder that it names."""
    from olive import run

    _prepare()
    run(request.config, package_config=fixes.package())
    return Frozen()


@cache
def _prepare() -> None:
    """Once in a process, which may run several workflows on one checkpoint: Olive reads it all for each, to name it."""
    from olive.model.config import model_config

    model_config.hash_file = cache(model_config.hash_file)
    fixes.apply()


def cause(text: str) -> str:
    """The most telling line of an Olive log that ended without a model.

    The first exception says what went wrong; later ones only repeat it.
    """
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    exceptions = [line for line in lines if (m := _EXCEPTION.match(line)) and m[1] != "SystemExit"]
    if exceptions:
        found = exceptions[0]
        return f"{_NO_INT8_MEANS} ({found})" if found.startswith(_NO_INT8) else found
    tagged = [m[2] for line in lines if (m := _TAGGED.search(line))]
    for before, message in itertools.pairwise(tagged):
        if message.startswith(_INVALID):
            if before.startswith(_RUNNING):
                return f"{before.removeprefix(_RUNNING)} does not accept its config, and Olive does not say why"
            return before  # a pass says only at level INFO why it refuses its config
    return "Olive's log names no cause; --log-level debug makes it say more"


def running_pass(line: str) -> str | None:
    """The type of the pass that begins with this line of Olive's log, if one does."""
    match = _PASS.search(line)
    return match[2] if match else None
