"""What the service lets through at most, and the queue before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

from pydantic import Field

from slmops.core.errors import ServingError
from slmops.core.values import Frozen

Leased = TypeVar("Leased")


class Limits(Frozen):
    """Limits of one service."""

    max_body_kb: int = Field(
        256, ge=1, le=65536, title="Body limit", description="Largest request body in kB (1000 bytes)."
    )
    max_output_tokens: int = Field(
        1024, ge=1, title="Output limit", description="Most tokens of one answer; larger wishes are cut to it."
    )
    concurrency: int = Field(
        2, ge=1, title="Concurrency", description="Requests that the runtime answers at once; others wait."
    )
    queue: int = Field(32, ge=0, title="Queue", description="Requests that may wait; further ones get 503 at once.")
    queue_timeout_s: float = Field(
        30, gt=0, title="Queue timeout", description="Seconds that a request may wait before it gets 503."
    )
    request_timeout_s: float = Field(
        300, gt=0, title="Request timeout", description="Seconds that one answer may take before it is broken off."
    )


class Overloaded(ServingError):
    """No place is free, now or for too long."""


class Gate:
    """At most ``concurrency`` requests at once, the others in the order in which they came.

    Attributes:
        waiting: Requests in the queue.
        running: Requests that are being answered, those among them whose client has left.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)  # it is fair
        self.waiting = 0
        self.running = 0

    @asynccontextmanager
    async def enter(self, lease: AbstractAsyncContextManager[Leased]) -> AsyncIterator[Leased]:
        """Wait for ``lease`` and then for a slot, and hold both.

        In this order, because a lease can take a while, when a version has to be loaded for it first.

        Raises:
            Overloaded: The queue is full, or the wait was too long.
        """
        limits = self._limits
        if self.waiting + self.running >= limits.queue + limits.concurrency:
            raise Overloaded(f"{limits.queue} requests wait already.")
        async with AsyncExitStack() as stack:
            self.waiting += 1
            missing = "The model was not loaded"
            try:
                async with asyncio.timeout(limits.queue_timeout_s):
                    leased = await stack.enter_async_context(lease)
                    missing = "No place was free"
                    await self._slots.acquire()
            except TimeoutError as error:
                raise Overloaded(f"{missing} within {limits.queue_timeout_s:g} s.") from error
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                yield leased
            finally:
                self.running -= 1
                self._slots.release()
