"""What a fleet tells: how it is, and why it gives nothing."""

from __future__ import annotations

from pydantic import Field

from slmops.core.errors import ServingError, UsageError
from slmops.core.values import Frozen

RETRY_S = 5.0


class UnknownModel(UsageError):
    """There is no such model here."""


class Unavailable(ServingError):
    """What was asked for exists, but not now.

    Args:
        message: Why not.
        fix: What to do, if not just to wait.
        retry_after_s: Seconds after which asking again makes sense.
    """

    def __init__(self, message: str, fix: str | None = None, *, retry_after_s: float = RETRY_S) -> None:
        super().__init__(message, fix)
        self.retry_after_s = retry_after_s


class Loaded(Frozen):
    """A running process."""

    id: str = Field(description="NAME:VERSION.")
    foundry_id: str
    memory_mb: float
    in_flight: int = Field(description="Requests that it is answering.")


class FleetState(Frozen):
    """What is served, and how that goes."""

    model: str
    version: int | None = Field(description="None until something is served.")
    variant: str | None
    foundry_id: str | None
    ready: bool = Field(description="The champion's process runs.")
    registry: str = Field(description="'ok' or 'unreachable since ...'.")
    last_failure: str | None = Field(description="When, and what.")
    switches: int
    restarts: int = Field(description="Of the champion's process, after it died.")
    loaded: tuple[Loaded, ...]
