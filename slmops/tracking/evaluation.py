"""What a measured variant leaves in MLflow: files, metrics, curves, tables, data sets, answers, and its gates.

Each answer is a trace with its assessments, which is what ``mlflow.genai.evaluate`` makes: so MLflow's page "Evaluation
runs" shows the answers of two variants item by item. That function needs the tracking URI and the active run of the
whole process, prints to the terminal, and only warns when an assessment is lost.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from slmops.tracking.client import NOTE, OF_CURVES, Client, dataset_input, now_ms

from mlflow import entities
from mlflow.entities import Dataset, Expectation, Feedback, Metric, Span, TraceInfo
from mlflow.exceptions import MlflowException

# Undocumented, hence the pin of mlflow in pyproject.toml. Documented functions log traces to the address of the whole
# process, at the time of the call, and one assessment a request.
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing.client import TracingClient

from slmops.core.job import Job
from slmops.core.values import MANIFEST, Answer, Comparison, Evaluation, Frozen, Measurement, Registration, Variant
from slmops.evaluation import dataset
from slmops.evaluation.drift import Recorded
from slmops.evaluation.quality import QUICK_TOKENS, TOKENS

OF_INTERVALS = "intervals/"  # how the names of the ends of intervals begin; see OF_CURVES
HEADLINES = ("ttft_ms_p50", "decode_tok_s", "perplexity_ratio", "kl_mean", "accuracy")
"""Figures whose 95 % intervals are metrics too; the others' are in the run's description and measurements.json."""
ANSWERS_FILE, CASES_FILE, GATES_FILE = "answers.json", "edge_cases.json", "gates.json"
MEASUREMENTS_FILE = "measurements.json"
EVALUATION_SET, TEXT, QUICK = "evaluation set", "perplexity text", "number of questions (--quick, --minutes)"
"""What figures of quality compare by."""
OF_ANSWERS = (
    *("accuracy", "score", "format_valid", "flips", "mcnemar_p"),
    *("length_ratio", "unscored", "truncated_", "stop_"),
)
OF_TEXT = ("perplexity", "kl_", "top1_", "hf_")
"""How the names of the metrics begin that depend on the evaluation set, and on the text."""
TAG_LIMIT, NAME_LIMIT = 8000, 250  # characters that MLflow takes for a tag, and for a trace's name
PREVIEW_LIMIT = 1000  # characters of a question or an answer in MLflow's lists
TRACES_AT_ONCE = 100

INPUTS = "inputs"
"""Folder of a job's run with copies of what it measured with, so that whoever has the run can measure it again."""
KEPT_SET, KEPT_TEXT = "evaluation_set", "perplexity_text.txt"  # the files there, the first without its suffix
_OF_JOB = ("evaluation_set", "perplexity_text", "matcher")
_OF_JOB_AS_JSON = ("quick", "prompt_lengths", "output_lengths")

_GAP = "\u00a0\u00a0"  # MLflow's pages leave no room between the columns of a table

Rows = list[dict[str, Any]]


def collect(folder: Path, variant: Variant, registration: Registration, evaluation: Evaluation, logs: Path) -> None:
    """Gather a variant's files in a folder; what is made of single answers and cases comes as tables."""
    for file in ("variant.json", "olive_config.json", "olive.log"):
        shutil.copy(variant.path / file, folder)
    for file in ("genai_config.json", "inference_model.json"):
        shutil.copy(registration.path / file, folder)
    sizes = {file.name: file.size for file in variant.files}
    (folder / "file_sizes.json").write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(evaluation.samples, indent=1), encoding="utf-8")
    measured = {name: m.model_dump() for name, m in evaluation.measurements.items()}
    (folder / MEASUREMENTS_FILE).write_text(json.dumps(measured, indent=2), encoding="utf-8")
    (folder / "logs").mkdir()
    for log in logs.glob(f"{variant.name}.*.log"):
        shutil.copy(log, folder / "logs")


def log_evaluation(client: Client, run_id: str, model_id: str, evaluation: Evaluation, sources: dict[str, str]) -> None:
    """Log an evaluation into a run and its logged model.

    ``sources`` has the file or name of what was measured with, by ``EVALUATION_SET`` and ``TEXT``.
    """
    used = {EVALUATION_SET: evaluation.evaluation_set_digest, TEXT: evaluation.text_digest}
    contexts = {EVALUATION_SET: "evaluation", TEXT: "perplexity"}
    inputs = {
        kind: dataset_input(f"{kind} {PurePath(sources[kind]).stem}", digest, sources[kind], contexts[kind])
        for kind, digest in used.items()
    }
    client.log_inputs(run_id, datasets=list(inputs.values()))
    client.log_batch(run_id, _metrics(evaluation, model_id, {kind: one.dataset for kind, one in inputs.items()}))
    client.set_tags(run_id, {NOTE: description(evaluation)})
    log_tables(client, run_id, {ANSWERS_FILE: _rows(evaluation.answers), CASES_FILE: _rows(evaluation.cases)})
    _log_answers(client, run_id, model_id, evaluation.answers)


def description(evaluation: Evaluation) -> str:
    """The figures as a table, with what MLflow's metrics have no place for: units, intervals, samples and notes."""
    measured = evaluation.measurements
    lines = [_line("metric", "value", "95 % interval", "unit", "samples", "note"), "|---" * 6 + "|"]
    size = 0
    for name in sorted(measured, key=lambda name: name not in HEADLINES):
        one = measured[name]
        ends = one.interval
        interval = f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""
        line = _line(name, one.marked(f"{one.value:.6g}"), interval, one.unit, str(one.samples), one.note or "")
        size += len(line) + 1
        if size > TAG_LIMIT - 500:
            return "\n".join([*lines, "", "The other figures are in measurements.json."])
        lines.append(line)
    return "\n".join(lines)


def log_tables(client: Client, run_id: str, tables: dict[str, Rows]) -> None:
    """Log tables that MLflow's pages and ``mlflow.load_table`` read.

    ``MlflowClient.log_table`` would append to the table of an earlier attempt, and make floats of integers beside a
    None. A table without rows is left out, because it has no columns either.
    """
    tables = {name: rows for name, rows in tables.items() if rows}
    for name, rows in tables.items():
        split = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        client.log_text(run_id, json.dumps(split), name)
    listed = [{"path": name, "type": "table"} for name in tables]
    client.set_tags(run_id, {"mlflow.loggedArtifacts": json.dumps(listed)})


def log_gates(client: Client, comparison: Comparison) -> None:
    """Log what the gates said, as tags of each variant's run and as a table in the job's, and what was disturbed."""
    rows: Rows = []
    for result in comparison.variants:
        rows += [{"variant": result.name, **row} for row in _rows(result.gates)]
        tags = {}
        if result.gates:
            refusing = "; ".join(gate.gate for gate in result.gates if gate.refuses)
            tags["slmops.gates"] = f"refused: {refusing}"[:TAG_LIMIT] if refusing else "passed"
        if result.disturbed:
            tags["slmops.disturbed"] = ", ".join(result.disturbed)
        if result.dominated_by is not None:
            tags["slmops.dominated_by"] = result.dominated_by
        if result.run_id is not None and tags:
            client.set_tags(result.run_id, tags)
    log_tables(client, comparison.run_id, {GATES_FILE: rows})


def _rows(values: Sequence[Frozen]) -> Rows:
    return [json.loads(value.model_dump_json()) for value in values]  # where an infinite figure is null


def _line(*cells: str) -> str:
    return "|" + "|".join(cell.replace("|", "/") + _GAP for cell in cells) + "|"


def _metrics(evaluation: Evaluation, model_id: str, datasets: dict[str, Dataset]) -> list[Metric]:
    now = now_ms()

    def metric(key: str, value: float, of: str) -> Metric:
        kind = EVALUATION_SET if of.startswith(OF_ANSWERS) else TEXT if of.startswith(OF_TEXT) else None
        name, digest = (datasets[kind].name, datasets[kind].digest) if kind else (None, None)
        return Metric(key, value, now, 0, model_id=model_id, dataset_name=name, dataset_digest=digest)

    metrics = [metric(name, one.value, name) for name, one in evaluation.measurements.items()]
    for name in HEADLINES:
        ends = evaluation.measurements[name].interval if name in evaluation.measurements else None
        for end, value in zip(("low", "high"), ends or (), strict=False):
            metrics.append(metric(f"{OF_INTERVALS}{name}.{end}", value, name))
    # Not of the model, of which MLflow shows one figure for each metric.
    return metrics + [
        Metric(f"{OF_CURVES}{point.name}", point.measurement.value, now, point.prompt_tokens)
        for point in evaluation.curves
    ]


def log_inputs(client: Client, run_id: str, job: Job) -> None:
    """Keep copies of the evaluation set and the perplexity text; the packaged ones change with slmops and Python."""
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
    inputs = client.files_in(parent.info.run_id, INPUTS)
    job = _job(parent.data.params)
    kept = [Path(client.download_artifacts(parent.info.run_id, path, str(folder))) for path in inputs]
    return Recorded(
        run_id=run_id,
        job=job,
        hardware_kind=hardware_kind,
        variant=Variant.model_validate({**manifest, "path": folder}),
        measurements={metric: Measurement.model_validate(figure) for metric, figure in figures.items()},
        answers=_answers(client, run_id),
        tokens=int(run.data.params.get("measured.tokens", QUICK_TOKENS if job.quick else TOKENS)),
        evaluation_set=next((path for path in kept if path.stem == KEPT_SET), None),
        evaluation_set_digest=run.data.params.get("evaluation_set_digest", ""),
        text=next((path for path in kept if path.name == KEPT_TEXT), None),
        text_digest=run.data.params.get("text_digest", ""),
    )


def _job(params: dict[str, str]) -> Job:
    asked: dict[str, Any] = {key: params[f"job.{key}"] for key in _OF_JOB if f"job.{key}" in params}
    asked |= {key: json.loads(params[f"job.{key}"]) for key in _OF_JOB_AS_JSON if f"job.{key}" in params}
    return Job(model=params["job.model"], **asked)


def _answers(client: Client, run_id: str) -> tuple[Answer, ...]:
    if ANSWERS_FILE not in client.files_in(run_id):  # a table without rows is left out
        return ()
    table = json.loads(client.text_of(run_id, ANSWERS_FILE))
    return tuple(Answer.model_validate(dict(zip(table["columns"], row, strict=True))) for row in table["data"])


def _log_answers(client: Client, run_id: str, model_id: str, answers: Sequence[Answer]) -> None:
    tracing, experiment, now = TracingClient(client.tracking_uri), client.get_run(run_id).info.experiment_id, now_ms()
    spans = []
    for number, answer in enumerate(answers):
        # MLflow lists the newest first.
        info, span = _trace(answer, experiment, run_id, model_id, now - number)
        tracing.start_trace(info)
        spans.append(span)
    for start in range(0, len(spans), TRACES_AT_ONCE):
        try:
            tracing.log_spans(experiment, spans[start : start + TRACES_AT_ONCE])
        except NotImplementedError as error:
            # MLflow gives a server 3 s to tell its version, and remembers for good that a busy one did not.
            RestStore._get_server_version.cache_clear()
            raise MlflowException(str(error)) from error  # which is tried again


def delete_answers(client: Client, experiment: str, run_id: str) -> None:
    """Delete the traces of a run; they would outlive it."""
    asked = {"locations": [experiment], "run_id": run_id, "include_spans": False, "max_results": TRACES_AT_ONCE}
    while page := client.search_traces(**asked):
        client.delete_traces(experiment, trace_ids=[trace.info.trace_id for trace in page])


def _trace(answer: Answer, experiment: str, run_id: str, model_id: str, start_ms: int) -> tuple[TraceInfo, Span]:
    """An answer as MLflow keeps it: what it lists, with the assessments, and what it shows when that is opened."""
    span_id = uuid.uuid4().hex[:16]
    info = TraceInfo(
        trace_id=f"tr-{uuid.uuid4().hex}",
        trace_location=entities.TraceLocation.from_experiment_id(experiment),
        request_time=start_ms,
        execution_duration=round(answer.seconds * 1000),
        state=entities.TraceState.OK,
        # By this MLflow finds the trace of the same item in the other run; two items may ask the same.
        request_preview=f"{answer.id}: {answer.prompt}"[:PREVIEW_LIMIT],
        response_preview=answer.answer[:PREVIEW_LIMIT],
        trace_metadata={"mlflow.sourceRun": run_id, "mlflow.modelId": model_id},
        tags={"mlflow.traceName": answer.id[:NAME_LIMIT], "slmops.category": answer.category},
        assessments=_assessments(answer, run_id, span_id),
    )
    attributes = {
        "mlflow.traceRequestId": info.trace_id,
        "mlflow.spanType": "LLM",
        "mlflow.spanInputs": {"id": answer.id, "category": answer.category, "prompt": answer.prompt},
        "mlflow.spanOutputs": answer.answer,
        "finish_reason": answer.finish_reason,
        "completion_tokens": answer.completion_tokens,
    }
    exported: dict[str, Any] = {
        "trace_id": info.trace_id,
        "span_id": span_id,
        "parent_span_id": None,
        "name": "answer",
        "start_time_unix_nano": start_ms * 1_000_000,
        "end_time_unix_nano": start_ms * 1_000_000 + round(answer.seconds * 1e9),
        "status": {"code": "STATUS_CODE_OK"},
        "attributes": {key: json.dumps(value) for key, value in attributes.items()},
    }
    return info, Span.from_dict(exported)


def _assessments(answer: Answer, run_id: str, span_id: str) -> list[Feedback | Expectation]:
    common: dict[str, Any] = {
        "source": entities.AssessmentSource("CODE", "slmops"),
        "span_id": span_id,
        "metadata": {"mlflow.assessment.sourceRunId": run_id},
    }
    unjudged = entities.AssessmentError("NOT_JUDGED", answer.reason) if answer.correct is None else None
    made = [Feedback("correct", answer.correct, error=unjudged, rationale=answer.reason, **common)]
    for name, value in (("score", answer.score), ("format_valid", answer.format_valid)):
        if value is not None:
            made.append(Feedback(name, value, **common))
    if answer.expected:
        made.append(Expectation("expected_response", answer.expected, **common))
    return made
