"""How many tokens of the text and how many questions each model of a job gets: as many as there is time for.

The first model that is measured finds that out. The others get the same ones, so that their figures compare pair by
pair. So do later jobs of this model with as much time on this machine, among them the same job after it was killed.
"""

import hashlib
import json
from typing import Literal

from slmops.core.files import write_atomic
from slmops.core.job import BASELINE, Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint

Kind = Literal["tokens", "questions"]
LEAST: dict[Kind, int] = {"tokens": 512, "questions": 10}
"""Of fewer tokens there is hardly an interval; of fewer questions, one alone is more than the policy's margin."""


class Share:
    """What one model gets: at most ``count`` tokens or questions, and fewer if those take more than ``budget_s``."""

    def __init__(
        self, kind: Kind, most: int, digest: str, checkpoint: Checkpoint, name: str, job: Job, settings: Settings
    ) -> None:
        models = len({BASELINE, *job.precision}) + (job.olive_config is not None) + (not job.quick)  # the checkpoint
        # Without a limit, no model that is four times slower than the first one runs into the timeout.
        seconds = 60 * job.minutes / models / 2 if job.minutes else settings.evaluation_timeout_s / 4
        asked = json.dumps([kind, most, digest, checkpoint.name, checkpoint.parameters, seconds])
        key = hashlib.sha256(asked.encode()).hexdigest()[:16]
        # The first one goes to the other machines of a job with the logits.
        self._files = (settings.work(name) / "logits" / f"{kind}.json", settings.home / "extents" / f"{key}.json")
        known = [file for file in self._files if file.exists()]
        self.count = int(known[0].read_text(encoding="utf-8")) if known else most
        self.budget_s = None if known else seconds

    def keep(self, count: int) -> None:
        """Let the others have as many as the one that was measured had the time for."""
        for file in self._files:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, str(count))


def affordable(kind: Kind, most: int, budget_s: float, each_s: float) -> int:
    """How many of ``most`` there is time for if one takes so long, but no fewer than ``LEAST``."""
    return min(most, max(LEAST[kind], int(budget_s / each_s)))
