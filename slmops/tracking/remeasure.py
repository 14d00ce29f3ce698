"""What a remeasurement needs from MLflow, and what it leaves there.

A job keeps copies of the files that it measured with, so that whoever has its run can measure the same again, also
where the files are not, or not any more.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from slmops.core.errors import TrackingError
from slmops.core.job import Job
from slmops.core.values import MANIFEST, Answer, Measurement, Variant
from slmops.evaluation import dataset
from slmops.evaluation.drift import Recorded, Remeasured, markdown
from slmops.tracking.client import text_of
from slmops.tracking.evaluation import ANSWERS, MEASUREMENTS

INPUTS = "inputs"
"""Folder of a job's run with what it measured with."""
EVALUATION_SET, TEXT = "evaluation_set", "perplexity_text.txt"
RAW = "remeasurement.json"
FLOW_RUN = "slmops.prefect_flow_run"
KIND = "remeasurement"
_OF_JOB = ("evaluation_set", "perplexity_text", "matcher")
_OF_JOB_AS_JSON = ("quick", "prompt_lengths", "output_lengths")


def log_inputs(client: MlflowClient, run_id: str, job: Job) -> None:
    """Keep copies of the evaluation set and of the perplexity text with the job's run, also of the packaged ones: they
    change with slmops and with Python.

    Raises:
        UsageError: One of them cannot be read.
    """
    asked = job.evaluation_set
    if asked is None:
        questions = (resources.files("slmops.evaluation.data") / dataset.GENERAL_SET).read_bytes()
    else:
        questions = dataset.read_bytes(asked, "evaluation set")
    suffix = ".csv" if asked is not None and asked.name.lower().endswith(".csv") else ".jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / f"{EVALUATION_SET}{suffix}").write_bytes(questions)
        (Path(scratch) / TEXT).write_bytes(dataset.perplexity_text(job.perplexity_text)[0].encode())
        client.log_artifacts(run_id, scratch, INPUTS)


def recorded(client: MlflowClient, run_id: str, hardware_kind: str, folder: Path) -> Recorded:
    """What a variant's run and its job's tell.

    Args:
        client: Of the server.
        run_id: The variant's run.
        hardware_kind: Of the machine that measured it.
        folder: Receives the copies of the job's files.
    """
    run = client.get_run(run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    figures = json.loads(text_of(client, run_id, MEASUREMENTS))
    manifest = json.loads(text_of(client, run_id, MANIFEST))
    kept = _kept(client, parent, folder)
    return Recorded(
        run_id=run_id,
        job=_job(parent.data.params),
        hardware_kind=hardware_kind,
        variant=Variant.model_validate({**manifest, "path": folder}),
        measurements={metric: Measurement.model_validate(figure) for metric, figure in figures.items()},
        answers=_answers(client, run_id),
        evaluation_set=next((path for path in kept if path.stem == EVALUATION_SET), None),
        evaluation_set_digest=run.data.params.get("evaluation_set_digest", ""),
        text=next((path for path in kept if path.name == TEXT), None),
        text_digest=run.data.params.get("text_digest", ""),
    )


def log(client: MlflowClient, experiment: str, result: Remeasured, params: dict[str, str], tags: dict[str, str]) -> str:
    """Open a run, log, check and close it, and mark the version with it; returns its id. A run that the same flow run
    left behind is removed.

    Raises:
        TrackingError: A metric is missing afterwards.
    """
    if flow_run := tags.get(FLOW_RUN):
        of_flow_run = f"tags.`{FLOW_RUN}` = '{flow_run}' and tags.`slmops.kind` = '{KIND}'"
        for stale in client.search_runs([experiment], of_flow_run):
            client.delete_run(stale.info.run_id)
    title = f"remeasurement of version {result.version} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    of_result = {
        "slmops.kind": KIND,
        "slmops.model": result.model,
        "slmops.version": str(result.version),
        "slmops.variant": result.variant,
        "slmops.recorded_run": result.recorded_run,
        "slmops.outcome": result.outcome,
        "slmops.reason": result.detail[:4000],
        "mlflow.note.content": markdown(result),
    }
    run_id: str = client.create_run(experiment, run_name=title, tags={**of_result, **tags}).info.run_id
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now, 0) for key, value in result.metrics.items()],
        params=[Param(key, value) for key, value in params.items()],
    )
    client.log_text(run_id, result.model_dump_json(indent=2), RAW)
    missing = set(result.metrics) - set(client.get_run(run_id).data.metrics)
    if missing:
        raise TrackingError(f"MLflow lost {', '.join(sorted(missing))} of a remeasurement.")
    for key, value in {"slmops.remeasurement": result.outcome, "slmops.remeasurement_run": run_id}.items():
        client.set_model_version_tag(result.model, str(result.version), key, value)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _job(params: dict[str, str]) -> Job:
    asked: dict[str, Any] = {key: params[f"job.{key}"] for key in _OF_JOB if f"job.{key}" in params}
    asked |= {key: json.loads(params[f"job.{key}"]) for key in _OF_JOB_AS_JSON if f"job.{key}" in params}
    return Job(model=params["job.model"], **asked)


def _answers(client: MlflowClient, run_id: str) -> tuple[Answer, ...]:
    if ANSWERS not in {file.path for file in client.list_artifacts(run_id)}:  # a table without rows is left out
        return ()
    table = json.loads(text_of(client, run_id, ANSWERS))
    return tuple(Answer.model_validate(dict(zip(table["columns"], row, strict=True))) for row in table["data"])


def _kept(client: MlflowClient, parent: Run, folder: Path) -> list[Path]:
    """Copies of what the job keeps; an older one kept nothing."""
    run_id = parent.info.run_id
    return [
        Path(client.download_artifacts(run_id, file.path, str(folder)))
        for file in client.list_artifacts(run_id, INPUTS)
    ]
