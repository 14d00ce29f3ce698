"""What ``slmops serve`` can be told."""

from pydantic import Field

from slmops.core.values import Frozen


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
