"""Choose a variant by the policy, and show the comparison on the Prefect page."""

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from slmops import report
from slmops.core.values import Comparison, artifact_key
from slmops.selection import choice
from tasks.stage import stage

choose_variant = stage("choose variant")(choice.choose)


@stage()
def show_comparison(comparison: Comparison, run_url: str) -> None:
    """Publish report, table and link as artifacts of the flow run."""
    name = comparison.model
    page = report.markdown(comparison, run_url)
    rows = [
        {"variant": result.name, "status": result.status, **{k: round(v, 4) for k, v in result.metrics.items()}}
        for result in comparison.variants
    ]
    create_markdown_artifact(page, artifact_key("report", name), f"{name}: comparison and choice")
    create_table_artifact(rows, artifact_key("metrics", name), f"{name}: every metric of every variant")
    create_link_artifact(run_url, f"{name} in MLflow", artifact_key("mlflow", name))
