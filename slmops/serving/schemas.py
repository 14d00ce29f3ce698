"""JSON schemas that clients give for answers and tools.

The runtime compiles them to grammars. A few of the things that can be written in a schema take it all memory of the
machine, or minutes; nothing in it limits that, and a client that leaves does not stop it. OpenAI's own service refuses
most of them too.
"""

from __future__ import annotations

from typing import Any

from slmops.serving.refused import Refused

MAX_SCHEMA_COST = 10_000
"""Sum of all bounds of arrays and all divisors in a schema: the runtime unrolls each into as many rules."""
_NAMES = {"properties", "$defs", "definitions"}
_VALUES = {"enum", "const", "default", "examples", "title", "description", "required"}
_BESIDE = {*_VALUES, "type", "$defs", "definitions", "$schema", "$id", "nullable", "deprecated"} - {
    "enum",
    "const",
    "required",
}
_BOUNDS = {"minItems", "maxItems", "multipleOf"}
_UNSUPPORTED = {"allOf", "oneOf", "not", "patternProperties", "propertyNames"}


def unwrap(body: dict[str, Any]) -> None:
    """Give the runtime the schema where it looks for it.

    It takes all of ``json_schema`` for the schema, and so does not see the one that OpenAI's clients put inside.
    """
    wrapped = (body.get("response_format") or {}).get("json_schema")
    if isinstance(wrapped, dict) and "schema" in wrapped:
        body["response_format"] = {**body["response_format"], "json_schema": wrapped["schema"]}


def bound(value: Any, param: str) -> None:
    """Refuse what takes the runtime's grammar compiler gigabytes or minutes."""
    cost = 0.0
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes.extend(node)
        elif isinstance(node, dict):
            for key, inner in node.items():
                if key in _UNSUPPORTED:
                    raise Refused(400, f"{param}: the schema keyword {key} is not supported.", "invalid_schema", param)
                if key in _BOUNDS and isinstance(inner, int | float):
                    cost += max(inner, 1 / inner if 0 < inner < 1 else 0)
                if key in ("$ref", "anyOf") and not node.keys() <= {*_BESIDE, key}:
                    # The runtime intersects the two, and whether anything is left can take it for ever to find out.
                    raise Refused(400, f"{param}: the schema has more beside {key}.", "invalid_schema", param)
                if key in _NAMES and isinstance(inner, dict):
                    nodes.extend(inner.values())
                elif key not in _VALUES:
                    nodes.append(inner)
    if cost > MAX_SCHEMA_COST:
        raise Refused(
            400,
            f"{param}: minItems, maxItems and multipleOf of the schema add up to more than {MAX_SCHEMA_COST}.",
            "invalid_schema",
            param,
        )
