"""What the tests of the proxy share: requests, and how to read what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from slmops.serving.limits import Limits
from tests.upstream import (
    GOOD,
    GOOD_RESPONSE,
    Stand,
    stand,
)

Test = Callable[[Stand], Awaitable[None]]


def run(test: Test, limits: Limits | None = None, **options: Any) -> None:
    async def standing() -> None:
        async with asyncio.timeout(20), stand(limits, **options) as one:
            await test(one)

    asyncio.run(standing())


def told(response: httpx.Response) -> tuple[int, str | None]:
    """Status and code of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    return response.status_code, error["code"]


def chat(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def response(**fields: Any) -> dict[str, Any]:
    return {**GOOD_RESPONSE, **fields}


def says(content: Any, role: Any = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content}])
