"""The answers of a variant in MLflow: each a trace with its assessments.

Traces with assessments are what ``mlflow.genai.evaluate`` makes, so MLflow's page "Evaluation runs" shows the answers
of two variants item by item. They are not made by that function, because it needs the tracking URI and the active run
of the whole process, prints to the terminal, and only warns when an assessment is lost.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Sequence
from typing import Any

from slmops.tracking.client import Client, now_ms

from mlflow.entities import (
    AssessmentError,
    AssessmentSource,
    Expectation,
    Feedback,
    Span,
    TraceInfo,
    TraceLocation,
    TraceState,
)

# Undocumented, hence the pin of mlflow in pyproject.toml. Documented functions log traces to the address of the whole
# process, at the time of the call, and one assessment a request.
from mlflow.tracing.client import TracingClient

from slmops.core.values import Answer

NAME_LIMIT = 250  # characters that MLflow takes for a trace's name
PREVIEW_LIMIT = 1000  # characters of a question or an answer in MLflow's lists
TRACES_AT_ONCE = 100

_BY_CODE = AssessmentSource("CODE", "slmops")


def log(uri: str, experiment: str, run_id: str, model_id: str, answers: Sequence[Answer]) -> None:
    """Log the answers of a run, in an order in which MLflow lists the first item first."""
    client = TracingClient(uri)
    now = now_ms()
    spans = []
    for number, answer in enumerate(answers):
        # It lists the newest first.
        info, span = _trace(answer, experiment, run_id, model_id, now - number)
        client.start_trace(info)
        spans.append(span)
    for start in range(0, len(spans), TRACES_AT_ONCE):
        client.log_spans(experiment, spans[start : start + TRACES_AT_ONCE])


def delete(client: Client, experiment: str, run_id: str) -> None:
    """Delete the traces of a run; they would outlive it."""
    while page := client.search_traces(
        locations=[experiment], run_id=run_id, include_spans=False, max_results=TRACES_AT_ONCE
    ):
        client.delete_traces(experiment, trace_ids=[trace.info.trace_id for trace in page])


def _trace(answer: Answer, experiment: str, run_id: str, model_id: str, start_ms: int) -> tuple[TraceInfo, Span]:
    """An answer as MLflow keeps it: what it lists, with the assessments, and what it shows when that is opened."""
    trace, span = uuid.uuid4().bytes, uuid.uuid4().bytes[:8]
    info = TraceInfo(
        trace_id=f"tr-{trace.hex()}",
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=start_ms,
        execution_duration=round(answer.seconds * 1000),
        state=TraceState.OK,
        # By this MLflow finds the trace of the same item in the other run; two items may ask the same.
        request_preview=f"{answer.id}: {answer.prompt}"[:PREVIEW_LIMIT],
        response_preview=answer.answer[:PREVIEW_LIMIT],
        trace_metadata={"mlflow.sourceRun": run_id, "mlflow.modelId": model_id},
        tags={"mlflow.traceName": answer.id[:NAME_LIMIT], "slmops.category": answer.category},
        assessments=_assessments(answer, run_id, span.hex()),
    )
    attributes = {
        "mlflow.traceRequestId": info.trace_id,
        "mlflow.spanType": "LLM",
        "mlflow.spanInputs": {"id": answer.id, "category": answer.category, "prompt": answer.prompt},
        "mlflow.spanOutputs": answer.answer,
        "finish_reason": answer.finish_reason,
        "completion_tokens": answer.completion_tokens,
    }
    start_ns = start_ms * 1_000_000
    exported: dict[str, Any] = {
        "trace_id": base64.b64encode(trace).decode(),
        "span_id": base64.b64encode(span).decode(),
        "parent_span_id": None,
        "name": "answer",
        "start_time_unix_nano": start_ns,
        "end_time_unix_nano": start_ns + round(answer.seconds * 1e9),
        "events": [],
        "status": {"code": "STATUS_CODE_OK", "message": ""},
        "attributes": {key: json.dumps(value) for key, value in attributes.items()},
    }
    return info, Span.from_dict(exported)


def _assessments(answer: Answer, run_id: str, span_id: str) -> list[Feedback | Expectation]:
    common: dict[str, Any] = {
        "source": _BY_CODE,
        "span_id": span_id,
        "metadata": {"mlflow.assessment.sourceRunId": run_id},
    }
    unjudged = AssessmentError("NOT_JUDGED", answer.reason) if answer.correct is None else None
    made = [Feedback("correct", answer.correct, error=unjudged, rationale=answer.reason, **common)]
    if answer.score is not None:
        made.append(Feedback("score", answer.score, **common))
    if answer.format_valid is not None:
        made.append(Feedback("format_valid", answer.format_valid, **common))
    if answer.expected:
        made.append(Expectation("expected_response", answer.expected, **common))
    return made
