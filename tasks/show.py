"""What the Prefect page shows of a finished job: the comparison, and where the rest is."""

from __future__ import annotations

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from slmops.core.values import Comparison, artifact_key
from slmops.report import tables
from tasks.stage import stage


@stage()
def show_comparison(comparison: Comparison, run_url: str) -> None:
    """Publish report, table and link as artifacts of the flow run."""
    name = comparison.model
    create_markdown_artifact(
        tables.markdown(comparison, run_url),
        key=artifact_key("report", name),
        description=f"{name}: comparison and choice",
    )
    rows = [
        {"variant": result.name, "status": result.status, **{k: round(v, 4) for k, v in result.metrics.items()}}
        for result in comparison.variants
    ]
    create_table_artifact(rows, key=artifact_key("metrics", name), description=f"{name}: every metric of every variant")
    create_link_artifact(run_url, link_text=f"{name} in MLflow", key=artifact_key("mlflow", name))
