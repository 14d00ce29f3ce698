"""How many tokens of the text and how many questions each model of a job gets.

The first model that is measured finds out what there is time for, and the others get the same: so they compare pair by
pair. Later jobs of this model with as much time get it too, among them the same job after it was killed.
"""

import hashlib
import json

from slmops.conversion import recipes
from slmops.core.files import write_atomic
from slmops.core.job import CHECKPOINT, Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint

LEAST_TOKENS, LEAST_QUESTIONS = 1024, 20
"""Of fewer tokens the interval is too wide for the policy's limits; of fewer questions, two that flip by chance are."""


class Share:
    """At most ``count`` tokens or questions; if nobody has found out yet, what there is time for in ``budget_s``."""

    def __init__(
        self, kind: str, most: int, digest: str, of: Checkpoint, name: str, job: Job, settings: Settings
    ) -> None:
        with_checkpoint = job.baseline == CHECKPOINT or not job.quick
        models = len(recipes.for_job(job, of)) + (job.olive_config is not None) + with_checkpoint
        # By default so much that no model runs into the timeout that is up to four times as slow as the first.
        seconds = 60 * job.minutes / models / 2 if job.minutes else settings.evaluation_timeout_s / 4
        key = json.dumps([kind, most, digest, of.name, of.parameters, seconds])
        kept = settings.home / "extents" / hashlib.sha256(key.encode()).hexdigest()[:16]
        # The first travels to the other machines of a job, with the logits.
        self._files = (settings.work(name) / "logits" / kind, kept)
        known = [int(file.read_text(encoding="utf-8")) for file in self._files if file.exists()]
        self.count = known[0] if known else most
        self.budget_s = None if known else seconds

    def keep(self, count: int) -> None:
        """Remember how many there were time for."""
        for file in self._files:
            write_atomic(file, str(count))
