"""Olive exits 0 whatever happens and says why only in its log: read the cause from there."""

from __future__ import annotations

import itertools
import re

_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))(?:: (.*))?$")
_TAGGED = re.compile(r"\[(ERROR|WARNING|INFO)\] \[[^]]*\] (.*)")
_INVALID = "Invalid config, pruned"
_RUNNING = "Running pass "
_PASS = re.compile(rf"\[INFO\] .*{_RUNNING}(\w+):(\w+)")

# What Olive's own words do not tell a reader.
_EXPLAINED = {
    "KeyError: 'int8'": "ModelBuilder has no int8 for the CPU; the precision int8 of slmops goes another way",
    "KeyError: <Precision.INT8": "ModelBuilder has no int8 for the CPU; the precision int8 of slmops goes another way",
}


def cause(text: str) -> str:
    """The most telling line of an Olive log that ended without a model.

    The first exception is what went wrong; those after it only repeat it.
    """
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    exceptions = [line for line in lines if (m := _EXCEPTION.match(line)) and m[1] != "SystemExit"]
    if exceptions:
        found = exceptions[0]
        for key, explanation in _EXPLAINED.items():
            if found.startswith(key):
                return f"{explanation} ({found})"
        return found
    tagged = [m[2] for line in lines if (m := _TAGGED.search(line))]
    for before, message in itertools.pairwise(tagged):
        if message.startswith(_INVALID):
            if before.startswith(_RUNNING):
                return f"{before.removeprefix(_RUNNING)} does not accept its config, and Olive does not say why"
            return before  # the pass says why it refuses its config, at level INFO, and only there
    return "Olive's log names no cause; --log-level debug makes it say more"


def running_pass(line: str) -> str | None:
    """The type of the pass that a line of Olive's log says has begun."""
    match = _PASS.search(line)
    return match[2] if match else None
