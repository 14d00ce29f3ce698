"""Find a variant, ask it many times, log and show what its memory did."""

from prefect.artifacts import create_markdown_artifact

from slmops.core.values import artifact_key
from slmops.evaluation import soak
from slmops.evaluation.soak import Soak, SoakResult, Target
from slmops.tracking.tracker import Tracker
from tasks.stage import stage


@stage(tracking=True)
def find_variant(uri: str, request: Soak) -> Target:
    """The variant of the latest comparison."""
    return soak.find(Tracker(uri).latest(request.name), request.variant)


soak_variant = stage("soak {target.variant}")(soak.measure)


@stage(tracking=True)
def track_soak(uri: str, result: SoakResult, memory_kb: tuple[float, ...], flow_run: str) -> SoakResult:
    """Log it as a run of the model's experiment, and publish it on the Prefect page; returns it with the run's id."""
    tracker = Tracker(uri)
    version = {} if result.version is None else {"slmops.version": str(result.version)}
    run_id = tracker.log_soak(
        result.model,
        {
            "slmops.variant": result.variant,
            "slmops.foundry_id": result.foundry_id,
            **version,
            "slmops.outcome": result.outcome,
            "slmops.reason": result.detail,
            "slmops.prefect_flow_run": flow_run,
        },
        result.metrics,
        [kb / 1e3 for kb in memory_kb],
    )
    page = f"```\n{soak.text(result)}\n```\n\n[MLflow run]({tracker.run_url(run_id)})"
    create_markdown_artifact(page, artifact_key("soak", result.model), f"{result.model}: soak of {result.variant}")
    return result.model_copy(update={"run_id": run_id})
