"""What a soak leaves in MLflow: a run with its figures and the memory after each request."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric

from slmops.core.errors import TrackingError

FLOW_RUN = "slmops.prefect_flow_run"
MEMORY = "soak_memory_mb"
RAW = "soak.json"
POINTS = 300  # of the memory, at most: pages draw no more; the artifact has them all


def log(
    client: MlflowClient, experiment: str, tags: dict[str, str], metrics: dict[str, float], memory_mb: Sequence[float]
) -> str:
    """Open a run, log, check and close it; returns its id. A run that the same flow run left behind is removed.

    The memory is a metric too, with the number of the request as its step.

    Raises:
        TrackingError: A metric is missing afterwards.
    """
    if flow_run := tags.get(FLOW_RUN):
        of_flow_run = f"tags.`{FLOW_RUN}` = '{flow_run}' and tags.`slmops.kind` = 'soak'"
        for stale in client.search_runs([experiment], of_flow_run):
            client.delete_run(stale.info.run_id)
    title = f"soak {tags.get('slmops.variant', '')} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    run_id: str = client.create_run(experiment, run_name=title, tags=tags).info.run_id
    every = -(-len(memory_mb) // POINTS)
    series = {step: mb for step, mb in enumerate(memory_mb, 1) if step % every == 0}
    now = int(time.time() * 1000)
    figures = [Metric(key, value, now, 0) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=[*figures, *(Metric(MEMORY, mb, now, step) for step, mb in series.items())])
    client.log_text(run_id, json.dumps({"metrics": metrics, "memory_mb": list(memory_mb)}), RAW)
    missing = set(metrics) - set(client.get_run(run_id).data.metrics)
    if len(client.get_metric_history(run_id, MEMORY)) != len(series):
        missing.add(MEMORY)
    if missing:
        raise TrackingError(f"MLflow lost {', '.join(sorted(missing))} of a soak.")
    client.set_terminated(run_id, "FINISHED")
    return run_id
