"""What the web service of Foundry Local says: events of a stream, and errors.

Events pass through as bytes, looked at as little as possible. What is searched for cannot stand in an answer's text:
quotes and line breaks are escaped there. The service answers 500 to much that only the client can fix, puts errors into
streams that began with 200, and signs each message with the C++ function that it came from.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from slmops.foundry.layout import CALL_REFUSED
from slmops.serving.requests import Refused

END = b"\n\n"
DELTA = b'"delta"'  # in every event with a piece of the answer
USAGE = b'"usage":{'
_PREAMBLE = (b"event: response.created", b"event: response.in_progress")
_FAILED = (b'data: {"error"', b"event: response.failed", b"event: error")
# What the messages of 500s say that are the request's own fault.
_CLIENTS_FAULT = re.compile(
    r"json\.exception|stoi|Error creating grammar|TooComplex|failed to create generator"
    r"|structured tool calling|not supported|image_url|tool guidance|tool-call guidance|response guidance"
)
_BUDGET = re.compile(r"\((\d+) input \+ (\d+) output\), which exceeds the model's maximum context length of (\d+)")
_SIGNATURE = re.compile(r"^(?:[\w ]+: )?\w+\.cc:\d+ [^()]*(?:\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)[^() ]*)+ ")
"""Such as ``Invalid request: options.cc:22 void fl::Check(const fl::Options&)``, with parentheses up to three deep."""
_MESSAGE_MOST = 500  # characters of the runtime's message that are passed on


@dataclass(eq=False)
class RuntimeRefused(Refused):
    """The runtime said why it does not answer; ``room`` is what the context leaves for an answer that was too long."""

    room: int | None = None


async def accepted(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """A stream's whole events, as many at a time as have arrived; RuntimeRefused if it refuses the request.

    It says 200 before it has looked at the request; if it refuses, that is among the first events.
    """
    pieces = _whole_events(response.content)
    head = b""
    async for piece in pieces:
        head += piece
        if event := next((one for one in piece.split(END) if one and not one.startswith(_PREAMBLE)), None):
            if refused := _in_event(event):
                raise refused
            break

    async def from_the_start() -> AsyncIterator[bytes]:
        if head:
            yield head
        async for piece in pieces:
            yield piece

    return from_the_start()


async def _whole_events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in content.iter_any():
        events, end, rest = (rest + chunk).rpartition(END)
        if end:
            yield events + end
    if rest:
        yield rest


def without_usage(piece: bytes) -> bytes:
    """The events without the one that holds only token counts."""
    return b"".join(event + END for event in piece.split(END) if event and b'"choices":[]' not in event)


def with_usage(piece: bytes) -> Iterator[dict[str, Any]]:
    for event in piece.split(END):
        if USAGE in event:
            yield json.loads(event.partition(b"data: ")[2])


def errors(piece: bytes) -> Iterator[RuntimeRefused]:
    if piece.startswith(_FAILED) or any(END + failed in piece for failed in _FAILED):
        for event in piece.split(END):
            if refused := _in_event(event):
                yield refused


def _in_event(event: bytes) -> RuntimeRefused | None:
    if not event.startswith(_FAILED):
        return None
    try:
        data = json.loads(event.partition(b"data: ")[2])
        error = data.get("error") or data.get("response", {}).get("error") or data
    except (ValueError, AttributeError):
        error = {}
    return _refused(400 if "invalid_request_error" in (_get(error, "type"), _get(error, "code")) else 500, error)


def from_body(status: int, body: bytes) -> RuntimeRefused:
    """The error in an answer whose status is not 200."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        text = body.decode("utf-8", errors="replace")  # the web server's own errors: lines of key=value
        error = {"message": text.rpartition("message=")[2]}
    return _refused(status, error)


def _refused(status: int, error: Any) -> RuntimeRefused:
    said = _get(error, "message") or "it does not say why"
    if budget := _BUDGET.search(said):
        prompt, answer, context = map(int, budget.groups())
        wanted = f"{prompt} tokens of conversation and up to {answer} of answer"
        message = f"{wanted} are more than the model's context of {context}."
        return RuntimeRefused(400, message, "context_length_exceeded", room=max(context - prompt, 0))
    if status == 500 and CALL_REFUSED.search(said):  # the model's fault, so that asking again is no use
        message = "The model's tool call is not complete, or does not fit the tool. More max_tokens may help."
        return RuntimeRefused(422, message, "invalid_tool_call")
    message = _SIGNATURE.sub("", said)[:_MESSAGE_MOST]
    if status < 500:
        return RuntimeRefused(status, message, _get(error, "code"), _get(error, "param"))
    if _CLIENTS_FAULT.search(said):
        return RuntimeRefused(400, message, "invalid_value")
    return RuntimeRefused(502, f"The runtime failed: {message}", "backend_error")


def _get(error: Any, key: str) -> str | None:
    value = error.get(key) if isinstance(error, dict) else None
    return value if isinstance(value, str) else None
