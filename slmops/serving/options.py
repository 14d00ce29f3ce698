"""What ``slmops serve`` can be told: the flags of the command."""

from __future__ import annotations

from pydantic import Field

from slmops.serving.limits import Limits


class Serve(Limits):
    """Serve one model; the token that clients must show comes from SLMOPS_SERVE_TOKEN only."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        title="Host",
        description="Address to listen at; any but this machine's own loopback needs SLMOPS_SERVE_TOKEN.",
    )
    port: int = Field(8080, ge=1, le=65535, title="Port", description="Port to listen at.")
    poll_s: float = Field(
        2, gt=0, title="Poll", description="Seconds between two looks at the registry for a new champion."
    )
    spare: int = Field(
        1, ge=0, title="Spare", description="Other versions that may be loaded beside the champion, each on demand."
    )
