"""What ``slmops serve`` can be told, and the queue that keeps requests within its limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

from pydantic import Field

from slmops.core.values import Frozen
from slmops.serving.requests import not_now

Leased = TypeVar("Leased")
RETRY_S = 2.0  # after which a client should ask again


class Serve(Frozen):
    """Serve one model; the token that clients must show comes from SLMOPS_SERVE_TOKEN only."""

    max_body_kb: int = Field(256, ge=1, le=65536, description="Largest request body in kB (1000 bytes).")
    max_output_tokens: int = Field(
        1024, ge=1, description="Most tokens of one answer; requests for more are cut to it."
    )
    concurrency: int = Field(2, ge=1, description="Requests that the runtime answers at once; others wait.")
    queue: int = Field(32, ge=0, description="Requests that may wait; further ones get 503 at once.")
    queue_timeout_s: float = Field(30, gt=0, description="Seconds that a request may wait before it gets 503.")
    request_timeout_s: float = Field(300, gt=0, description="Seconds that one answer may take before it is broken off.")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen at; any except this machine's own loopback needs SLMOPS_SERVE_TOKEN.",
    )
    port: int = Field(8080, ge=1, le=65535, description="Port to listen at.")
    poll_s: float = Field(2, gt=0, description="Seconds between two looks at the registry for a new champion.")
    spare: int = Field(1, ge=0, description="Other versions that may be loaded beside the champion, each on demand.")


class Admission:
    """Lets at most ``concurrency`` requests run at once; the others wait in the order in which they came.

    Those that are running include those whose client has left.
    """

    def __init__(self, limits: Serve) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)  # it is fair
        self.waiting = 0
        self.running = 0

    @asynccontextmanager
    async def enter(self, lease: AbstractAsyncContextManager[Leased]) -> AsyncIterator[Leased]:
        """Wait for ``lease`` and then for a slot, and hold both; Refused if the queue or the wait is too long.

        In this order, because a lease can take a while, when a version has to be loaded for it first.
        """
        limits = self._limits
        if self.waiting + self.running >= limits.queue + limits.concurrency:
            raise not_now(f"{limits.queue} requests are waiting already.", RETRY_S, "overloaded")
        async with AsyncExitStack() as stack:
            self.waiting += 1
            missing = "The model was not loaded"
            try:
                async with asyncio.timeout(limits.queue_timeout_s):
                    leased = await stack.enter_async_context(lease)
                    missing = "No slot was free"
                    await stack.enter_async_context(self._slots)
            except TimeoutError:
                raise not_now(f"{missing} within {limits.queue_timeout_s:g} s.", RETRY_S, "overloaded") from None
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                yield leased
            finally:
                self.running -= 1
