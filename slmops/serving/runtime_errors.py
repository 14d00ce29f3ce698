"""Errors of Foundry Local's web service, told to the client.

The service answers 500 to much that only the client can mend, puts errors into streams that began with 200, and signs
each message with the C++ function that it came from.
"""

from __future__ import annotations

import json
import re
from typing import Any

from slmops.serving.events import FAILED
from slmops.serving.refused import Refused

# What the messages of 500s say that are the request's own fault.
_CLIENTS_FAULT = re.compile(
    r"json\.exception|stoi|Error creating grammar|TooComplex|failed to create generator"
    r"|structured tool calling|not supported|image_url|tool guidance|tool-call guidance|response guidance"
)
_BUDGET = re.compile(r"\((\d+) input \+ (\d+) output\), which exceeds the model's maximum context length of (\d+)")
_SAID = 500
"""Characters of the runtime's message that are passed on."""


class RuntimeRefused(Refused):
    """The runtime did not answer but said why.

    Attributes:
        room: Tokens that the context leaves for the answer, if the request asked for more.
    """

    room: int | None = None


def from_body(status: int, body: bytes) -> RuntimeRefused:
    """The error in an answer whose status is not 200."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        text = body.decode("utf-8", errors="replace")  # oatpp's own: lines of key=value
        error = {"message": text.rpartition("message=")[2]}
    return _refused(status, error)


def in_event(event: bytes) -> RuntimeRefused | None:
    """The error in one event of a stream, if it is one."""
    if not event.startswith(FAILED):
        return None
    try:
        data = json.loads(event.partition(b"data: ")[2])
        error = data.get("error") or data.get("response", {}).get("error") or data
    except (ValueError, AttributeError):
        error = {}
    return _refused(400 if "invalid_request_error" in (_get(error, "type"), _get(error, "code")) else 500, error)


def _refused(status: int, error: Any) -> RuntimeRefused:
    said = _get(error, "message") or "it does not say why"
    if budget := _BUDGET.search(said):
        prompt, answer, context = map(int, budget.groups())
        refused = RuntimeRefused(
            400,
            f"{prompt} tokens of conversation and up to {answer} of answer are more than the model's context of "
            f"{context}.",
            "context_length_exceeded",
        )
        refused.room = max(context - prompt, 0)
        return refused
    message = _plain(said)[:_SAID]
    if status < 500:
        return RuntimeRefused(status, message, _get(error, "code"), _get(error, "param"))
    if _CLIENTS_FAULT.search(said):
        return RuntimeRefused(400, message, "invalid_value")
    return RuntimeRefused(502, f"The runtime failed: {message}", "backend_error")


def _get(error: Any, key: str) -> str | None:
    value = error.get(key) if isinstance(error, dict) else None
    return value if isinstance(value, str) else None


def _plain(said: str) -> str:
    """The message without the function that it came from.

    >>> _plain("Invalid request: search_options.cc:22 void fl::Check(const fl::Options&) top_k is negative")
    'top_k is negative'
    """
    found = re.match(r"(?:[\w ]+: )?\w+\.cc:\d+ ", said)
    if found is None:
        return said
    depth = 0
    closed = False
    for position in range(found.end(), len(said)):
        letter = said[position]
        depth += (letter == "(") - (letter == ")")
        closed = closed or letter == ")"
        if letter == " " and closed and depth == 0:
            return said[position + 1 :]
    return said
