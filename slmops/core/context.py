"""What all stages of one job share."""

from dataclasses import dataclass
from pathlib import Path

from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Room


@dataclass(frozen=True)
class JobContext:
    """One job on one machine."""

    job: Job
    name: str  # the model's in MLflow and Foundry Local
    checkpoint: Checkpoint
    settings: Settings
    tracking_uri: str
    run_id: str = ""  # the job's run in MLflow; empty until there is one
    room: Room | None = None  # what it is estimated to take of this machine

    @property
    def logs(self) -> Path:
        return self.settings.logs / self.name

    @property
    def work(self) -> Path:
        return self.settings.work(self.name)
