"""The progress bar on a flow run's page."""

from __future__ import annotations

from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from slmops.core.values import artifact_key


class ProgressBar:
    """A progress bar in the flow run's artifacts."""

    def __init__(self, name: str, steps: int) -> None:
        self._steps = steps
        self._done = 0
        created = create_progress_artifact(0.0, key=artifact_key("progress", name), description=f"{name}: variants")
        self._id = UUID(str(created))

    def step(self, steps: int = 1) -> None:
        """So many steps are done."""
        self._done += steps
        update_progress_artifact(artifact_id=self._id, progress=min(100.0, 100 * self._done / self._steps))
