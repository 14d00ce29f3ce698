"""What the Prefect page shows: progress while it works, then the comparison and where the rest is."""

from __future__ import annotations

from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from slmops.core.values import Comparison, to_name
from slmops.report import render as report


class Progress:
    """A progress bar in the flow run's artifacts."""

    def __init__(self, name: str, steps: int) -> None:
        self._steps = steps
        self._done = 0
        created = create_progress_artifact(0.0, key=key("progress", name), description=f"{name}: variants")
        self._id = UUID(str(created))

    def step(self, steps: int = 1) -> None:
        """So many steps are done."""
        self._done += steps
        update_progress_artifact(artifact_id=self._id, progress=min(100.0, 100 * self._done / self._steps))


def show_comparison(comparison: Comparison, run_url: str) -> None:
    """Publish report, table and link as artifacts of the flow run."""
    name = comparison.model
    create_markdown_artifact(
        report.markdown(comparison, run_url), key=key("report", name), description=f"{name}: comparison and choice"
    )
    rows = [
        {"variant": result.name, "status": result.status, **{k: round(v, 4) for k, v in result.metrics.items()}}
        for result in comparison.variants
    ]
    create_table_artifact(rows, key=key("metrics", name), description=f"{name}: every metric of every variant")
    create_link_artifact(run_url, link_text=f"{name} in MLflow", key=key("mlflow", name))


def key(kind: str, name: str) -> str:
    """Artifact keys take lower case, digits and dashes only."""
    return f"{kind}-{to_name(name).replace('_', '-')}"
