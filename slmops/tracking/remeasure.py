"""What a remeasurement needs from MLflow, and what it leaves there.

A job keeps copies of the files that it measured with. So whoever has its run can measure the same again, also where
the files are not there, or not any more.
"""

from __future__ import annotations

import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from slmops.tracking.client import KIND, NOTE, REASON, Client

from slmops.core.job import Job
from slmops.core.values import MANIFEST, Answer, Measurement, Variant
from slmops.evaluation import dataset
from slmops.evaluation.drift import Recorded, Remeasured, markdown
from slmops.tracking.evaluation import ANSWERS_FILE, MEASUREMENTS_FILE

INPUTS = "inputs"
"""Folder of a job's run with what it measured with."""
KEPT_SET, KEPT_TEXT = "evaluation_set", "perplexity_text.txt"
"""The files there, the first without its suffix."""
_OF_JOB = ("evaluation_set", "perplexity_text", "matcher")
_OF_JOB_AS_JSON = ("quick", "prompt_lengths", "output_lengths")


def log_inputs(client: Client, run_id: str, job: Job) -> None:
    """Keep copies of the evaluation set and of the perplexity text with the job's run.

    Also of the packaged ones: they change with slmops and with Python.
    """
    asked = job.evaluation_set
    if asked is None:
        questions = (resources.files("slmops.evaluation.data") / dataset.GENERAL_SET).read_bytes()
    else:
        questions = dataset.read_bytes(asked, "evaluation set")
    suffix = ".csv" if asked is not None and asked.name.lower().endswith(".csv") else ".jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / f"{KEPT_SET}{suffix}").write_bytes(questions)
        (Path(scratch) / KEPT_TEXT).write_bytes(dataset.perplexity_text(job.perplexity_text)[0].encode())
        client.log_artifacts(run_id, scratch, INPUTS)


def recorded(client: Client, run_id: str, hardware_kind: str, folder: Path) -> Recorded:
    """What the run of a variant and the run of its job hold; ``folder`` receives the copies, an older job kept none."""
    run = client.get_run(run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    figures = json.loads(client.text_of(run_id, MEASUREMENTS_FILE))
    manifest = json.loads(client.text_of(run_id, MANIFEST))
    kept = [
        Path(client.download_artifacts(parent.info.run_id, path, str(folder)))
        for path in client.files_in(parent.info.run_id, INPUTS)
    ]
    return Recorded(
        run_id=run_id,
        job=_job(parent.data.params),
        hardware_kind=hardware_kind,
        variant=Variant.model_validate({**manifest, "path": folder}),
        measurements={metric: Measurement.model_validate(figure) for metric, figure in figures.items()},
        answers=_answers(client, run_id),
        evaluation_set=next((path for path in kept if path.stem == KEPT_SET), None),
        evaluation_set_digest=run.data.params.get("evaluation_set_digest", ""),
        text=next((path for path in kept if path.name == KEPT_TEXT), None),
        text_digest=run.data.params.get("text_digest", ""),
    )


def log(client: Client, experiment: str, result: Remeasured, params: dict[str, Any], tags: dict[str, str]) -> str:
    """Log a remeasurement as a run of its own, and mark the version with it; returns the run's id."""
    tags = {
        KIND: "remeasurement",
        "slmops.model": result.model,
        "slmops.version": str(result.version),
        "slmops.variant": result.variant,
        "slmops.recorded_run": result.recorded_run,
        "slmops.outcome": result.outcome,
        REASON: result.detail[:4000],
        NOTE: markdown(result),
        **tags,
    }
    with client.only_run(experiment, f"remeasurement of version {result.version}", tags) as run_id:
        client.log_figures(run_id, result.metrics)
        client.log_params(run_id, params)
        client.log_text(run_id, result.model_dump_json(indent=2), "remeasurement.json")
        for key, value in {"slmops.remeasurement": result.outcome, "slmops.remeasurement_run": run_id}.items():
            client.set_model_version_tag(result.model, str(result.version), key, value)
    return run_id


def _job(params: dict[str, str]) -> Job:
    asked: dict[str, Any] = {key: params[f"job.{key}"] for key in _OF_JOB if f"job.{key}" in params}
    asked |= {key: json.loads(params[f"job.{key}"]) for key in _OF_JOB_AS_JSON if f"job.{key}" in params}
    return Job(model=params["job.model"], **asked)


def _answers(client: Client, run_id: str) -> tuple[Answer, ...]:
    if ANSWERS_FILE not in client.files_in(run_id):  # a table without rows is left out
        return ()
    table = json.loads(client.text_of(run_id, ANSWERS_FILE))
    return tuple(Answer.model_validate(dict(zip(table["columns"], row, strict=True))) for row in table["data"])
