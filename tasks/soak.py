"""Find a variant, ask it many times, log and show what its memory did."""

from __future__ import annotations

from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from tabulate import tabulate

from slmops.core.settings import Settings
from slmops.core.values import artifact_key
from slmops.evaluation import soak
from slmops.evaluation.soak import Soak, SoakResult, Target
from slmops.tracking.tracker import Tracker
from tasks.stage import stage


@stage(tracking=True)
def find_variant(uri: str, request: Soak) -> Target:
    """The variant of the latest comparison."""
    return soak.find(Tracker(uri).latest(request.name), request.variant)


@stage("soak {target.variant}")
def soak_variant(target: Target, request: Soak, home: Path, settings: Settings) -> tuple[SoakResult, tuple[float, ...]]:
    """All requests, in one fresh process."""
    return soak.measure(target, request, home, settings)


@stage(tracking=True)
def track_soak(uri: str, result: SoakResult, memory_kb: tuple[float, ...], flow_run: str) -> tuple[SoakResult, str]:
    """Log it as a run of the model's experiment; returns the result with the run's id, and the address of its page."""
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
    return result.model_copy(update={"run_id": run_id}), tracker.run_url(run_id)


@stage()
def show_soak(result: SoakResult, run_url: str) -> None:
    """Publish the outcome as an artifact of the flow run."""
    rows = [
        ("outcome", result.outcome),
        *([] if result.version is None else [("version", str(result.version))]),
        ("growth in KB a request", f"{result.slope.value:.2f}"),
        ("95 % interval", "-" if result.slope.low is None else f"{result.slope.low:.2f} to {result.slope.high:.2f}"),
        ("limit", f"{result.limit:g}"),
        ("requests", f"{result.slope.samples}"),
        ("memory at the start", f"{result.memory_start_mb:.1f} MB"),
        ("memory at the end", f"{result.memory_end_mb:.1f} MB"),
    ]
    table = tabulate(rows, headers=["", ""], tablefmt="pipe", disable_numparse=True)
    create_markdown_artifact(
        f"{result.detail}\n\n{table}\n\n[MLflow run]({run_url})",
        key=artifact_key("soak", result.model),
        description=f"{result.model}: soak of {result.variant}",
    )
