"""Server-sent events as they pass through: bytes, looked at as little as possible.

What is searched for cannot stand in an answer's text: there quotes and line breaks are escaped.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp

END = b"\n\n"
DELTA = b'"delta"'
"""In every event with a piece of the answer."""
USAGE = b'"usage":{'
_PREAMBLE = (b"event: response.created", b"event: response.in_progress")
FAILED = (b'data: {"error"', b"event: response.failed", b"event: error")


async def whole(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole events, as many at a time as have come."""
    rest = b""
    async for chunk in content.iter_any():
        data = rest + chunk
        end = data.rfind(END) + len(END)
        if end < len(END):
            rest = data
            continue
        rest = data[end:]
        yield data[:end]
    if rest:
        yield rest


async def chained(head: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """``head``, then the others."""
    if head:
        yield head
    async for piece in pieces:
        yield piece


def first_telling(piece: bytes) -> bytes | None:
    """The first event that comes after the runtime has looked at the request."""
    for event in piece.split(END):
        if event and not event.startswith(_PREAMBLE):
            return event
    return None


def tells_failure(piece: bytes) -> bool:
    """Whether one of the events is an error."""
    return piece.startswith(FAILED) or any(END + failed in piece for failed in FAILED)


def without_usage(piece: bytes) -> bytes:
    """The events but the one that holds nothing else than token counts."""
    return b"".join(event + END for event in piece.split(END) if event and b'"choices":[]' not in event)


def with_usage(piece: bytes) -> Iterator[dict[str, Any]]:
    """The events with token counts, parsed."""
    for event in piece.split(END):
        if USAGE in event:
            yield json.loads(event.partition(b"data: ")[2])
