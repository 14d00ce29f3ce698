"""What a look for new training data remembers, and when it tells of them."""

from __future__ import annotations

from pydantic import BaseModel, Field

FIRST_REPEAT_S = 1800
DAY_S = 86400


class Seen(BaseModel, frozen=True):
    """What one look leaves for the next."""

    version: int | None = Field(None, description="The highest number in the registry.")
    data: str | None = Field(None, description="Digest of the training items that are not new.")
    told: str | None = Field(None, description="Digest of the training items that the last event was about.")
    times: int = Field(0, description="How many events there were about them.")
    again: float = Field(0, description="When the next one is due, in seconds since 1970.")

    def look_at_data(self, digest: str, used: str | None, now: float) -> tuple[Seen, bool]:
        """What to remember, and whether an event about the training items with this digest is due.

        They are new until a retraining has used them, which an event does not ensure: the retraining may fail, or
        nothing listens. So the event is repeated: after half an hour, then after twice as long each time, up to a day.
        The last retraining used the digest ``used``. ``now`` is in seconds since 1970.
        """
        if self.data is None or digest in (self.data, used):  # at the first look nothing is new
            return Seen(version=self.version, data=digest), False
        times = self.times if digest == self.told else 0
        if times and now < self.again:
            return self, False
        again = now + min(FIRST_REPEAT_S * 2**times, DAY_S)
        return self.model_copy(update={"told": digest, "times": times + 1, "again": again}), True
