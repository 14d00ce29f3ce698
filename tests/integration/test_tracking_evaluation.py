"""What the evaluation of a variant leaves in MLflow, on a real database."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace

from slmops.core.values import Answer, GateResult, Measurement
from slmops.selection.policy import Policy
from slmops.tracking import answers as tracking_answers
from slmops.tracking.evaluation import TAG_LIMIT, description
from slmops.tracking.tracker import Tracker
from tests import values
from tests.tracked import HARDWARE, JOB, Made, artifacts, read, start

pytestmark = pytest.mark.integration

GATE: dict[str, Any] = {"metric": "perplexity_ratio", "limit": 1.1, "detail": "It is kept."}
PASSED = GateResult(gate="perplexity_ratio at most 1.1", outcome="pass", advisory=False, refuses=False, **GATE)
REFUSED = PASSED.model_copy(update={"outcome": "fail", "refuses": True, "value": 1.3, "low": 1.2, "high": 1.4})
UNSURE = REFUSED.model_copy(
    update={"gate": "accuracy at least 0.4", "metric": "accuracy", "outcome": "inconclusive", "more_samples": 12}
)


def traces(client: MlflowClient, run_id: str) -> list[Trace]:
    """Those of a run, as MLflow lists them."""
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_traces(locations=[experiment], run_id=run_id, order_by=["timestamp_ms DESC"]))


def test_figures_in_the_run(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    run_id = Made(tmp_path).log(tracker, start(tracker, name), name)
    run = client.get_run(run_id)
    # The interval of an exact figure, of one without and of one that is no headline is no metric of its own.
    assert {key for key in run.data.metrics if "/" in key} == {
        *(f"intervals/{headline}.{end}" for headline in ("accuracy", "ttft_ms_p50") for end in ("low", "high")),
        "curves/ttft_ms",
        "curves/itl_ms",
    }
    assert (run.data.metrics["accuracy.low"], run.data.metrics["intervals/accuracy.low"]) == (0.5, 0.1)
    for curve, factor in (("ttft_ms", 0.7), ("itl_ms", 0.1)):
        history = client.get_metric_history(run_id, f"curves/{curve}")
        assert [(point.step, point.value) for point in history] == [(n, n * factor) for n in (32, 128, 512)]
    assert (run.data.params["evaluation_set_digest"], run.data.params["text_digest"]) == ("e" * 64, "f" * 64)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in run.data.tags["mlflow.note.content"].splitlines()
    ]
    assert table[0] == ["metric", "value", "95 % interval", "unit", "samples", "note"]
    assert ["ttft_ms_p50", "81", "78.5 to 84", "ms", "12", ""] in table
    assert ["size_mb", "110.5", "", "MB", "1", ""] in table
    assert ["load_s", "1.5", "", "s", "1", "indicative: 1 sample"] in table


def test_data_sets(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    questions = tmp_path / "my set.jsonl"
    questions.write_text('{"prompt": "a", "expected": "b"}')
    job = JOB.model_copy(update={"evaluation_set": questions})
    run_id = Made(tmp_path).log(tracker, tracker.start_job(name, job, values.checkpoint(), HARDWARE, None), name)
    found = {
        one.tags[0].value: (one.dataset.name, one.dataset.digest, one.dataset.source, one.dataset.profile)
        for one in client.get_run(run_id).inputs.dataset_inputs
    }
    assert found == {
        "evaluation": (
            "evaluation set my set",
            "e" * 12,
            json.dumps({"uri": str(questions)}),
            f'{{"sha256": "{"e" * 64}"}}',
        ),
        "perplexity": (
            "perplexity text Python language reference",
            "f" * 12,
            '{"uri": "Python language reference"}',
            f'{{"sha256": "{"f" * 64}"}}',
        ),
    }
    [model] = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    measured_with = {metric.key: metric.dataset_name for metric in model.metrics}
    assert measured_with["accuracy.low"] == measured_with["intervals/accuracy.low"] == "evaluation set my set"
    assert measured_with["perplexity"] == "perplexity text Python language reference"
    assert measured_with["size_mb"] is None


def test_tables(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    made = Made(tmp_path)
    run_id = made.log(tracker, start(tracker, name), name)
    tables = {file: json.loads(read(client, run_id, file, tmp_path)) for file in ("answers.json", "edge_cases.json")}
    rows = {
        file: [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] for file, table in tables.items()
    }
    assert rows["answers.json"] == [answer.model_dump() for answer in made.evaluation.answers]
    assert rows["edge_cases.json"] == [case.model_dump() for case in made.evaluation.cases]
    assert [row["score"] for row in rows["answers.json"]] == [1.0, None, None]
    listed = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": "answers.json", "type": "table"}, {"path": "edge_cases.json", "type": "table"}]


def test_nothing_asked_leaves_no_tables(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.evaluation = values.evaluation(answers=(), cases=(), curves=())
    run_id = made.log(tracker, start(tracker, name), name)
    assert not artifacts(client, run_id) & {"answers.json", "edge_cases.json"}
    assert traces(client, run_id) == []


def test_answers_of_two_variants_side_by_side(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parent = start(tracker, name)
    runs: list[str] = []

    def work() -> None:
        runs.extend(Made(tmp_path, one).log(tracker, parent, name) for one in ("fp32", "int4"))

    capfd.readouterr()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert capfd.readouterr() == ("", "")
    first, second = (traces(client, run_id) for run_id in runs)
    # MLflow pairs what has the same preview; the first two items ask the same.
    assert [one.info.request_preview for one in first] == ["1: France?", "2: France?", "free: Greet."]
    assert [one.info.request_preview for one in first] == [one.info.request_preview for one in second]
    assert not {one.info.trace_id for one in first} & {one.info.trace_id for one in second}

    verdicts = [{one.name: one for one in trace.info.assessments} for trace in first]
    assert [{key: one.value for key, one in of.items()} for of in verdicts] == [
        {"correct": True, "score": 1.0, "expected_response": "Paris"},
        {"correct": False, "format_valid": False, "expected_response": "Paris"},
        {"correct": None},
    ]
    unjudged = verdicts[2]["correct"]
    assert (unjudged.error.error_code, unjudged.error.error_message) == ("NOT_JUDGED", "?")
    assert {one.metadata["mlflow.assessment.sourceRunId"] for of in verdicts for one in of.values()} == {runs[0]}

    trace = first[0]
    assert (trace.info.response_preview, trace.info.execution_duration) == ("Paris, né 東京", 500)
    assert trace.info.tags["slmops.category"] == "low"
    models = client.search_logged_models([trace.info.experiment_id])
    assert trace.info.trace_metadata["mlflow.modelId"] in {one.model_id for one in models if one.name.endswith("fp32")}
    [span] = trace.data.spans
    assert span.inputs == {"id": "1", "category": "low", "prompt": "France?"}
    assert span.outputs == "Paris, né 東京"
    assert (span.attributes["finish_reason"], span.attributes["completion_tokens"]) == ("stop", 3)
    page = tracker.answers_url(runs[1], runs[0])
    assert f"/evaluation-runs?selectedRunUuid={runs[1]}&compareToRunUuid={runs[0]}&" in page


def test_many_and_long_answers(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_answers, "TRACES_AT_ONCE", 2)
    made = Made(tmp_path)
    one = made.evaluation.answers[0].model_dump()
    long = {**one, "id": "i" * 300, "prompt": "ü" * 5000, "answer": "ö" * 50_000, "expected": "ß" * 5000}
    answers = tuple(Answer(**{**one, "id": str(number)}) for number in range(5))
    made.evaluation = values.evaluation(answers=(*answers, Answer(**long)))
    parent = start(tracker, name)
    run_id = made.log(tracker, parent, name)
    assert [trace.info.tags["mlflow.traceName"] for trace in traces(client, run_id)] == [*"01234", "i" * 250]
    assert traces(client, run_id)[-1].data.spans[0].outputs == "ö" * 50_000
    again = made.log(tracker, parent, name)
    # Of the first attempt nothing is left.
    everything = client.search_traces(locations=[client.get_run(parent).info.experiment_id])
    assert {trace.info.trace_metadata["mlflow.sourceRun"] for trace in everything} == {again}
    assert len(everything) == 6


def test_gates(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    parent = start(tracker, name)
    runs = {one: Made(tmp_path, one).log(tracker, parent, name) for one in ("fp32", "int8", "int4")}
    results = [values.result(one, 100).model_copy(update={"run_id": run}) for one, run in runs.items()]
    gates = {"int8": {"gates": (PASSED,)}, "int4": {"gates": (REFUSED, UNSURE), "dominated_by": "int8"}}
    judged = [result.model_copy(update=gates.get(result.name, {})) for result in results]
    done = values.comparison(*judged, values.failed("fp16", "No."), chosen="int8")
    done = done.model_copy(update={"run_id": parent})
    for _ in range(2):  # as after a failed attempt
        tracker.finish_job(done, Policy(), "", "**note**", failed=True)
    tags = {one: client.get_run(run).data.tags for one, run in runs.items()}
    assert "slmops.gates" not in tags["fp32"]
    assert tags["int8"]["slmops.gates"] == "passed"
    assert tags["int4"]["slmops.gates"] == "refused: perplexity_ratio at most 1.1; accuracy at least 0.4"
    assert [of.get("slmops.dominated_by") for of in tags.values()] == [None, None, "int8"]
    table = json.loads(read(client, parent, "gates.json", tmp_path))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert rows == [
        {"variant": one, **gate.model_dump()} for one, gate in (("int8", PASSED), ("int4", REFUSED), ("int4", UNSURE))
    ]
    assert (rows[2]["more_samples"], type(rows[2]["more_samples"])) == (12, int)
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    links = ", ".join(f"[{one}]({tracker.answers_url(runs[one], runs['fp32'])})" for one in ("int8", "int4"))
    assert note == f"**note**\n\nAnswers beside those of fp32: {links}"


def test_a_job_without_gates_and_baseline(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    parent = start(tracker, name)
    run_id = Made(tmp_path).log(tracker, parent, name)
    lone = values.result("int4", 100).model_copy(update={"run_id": run_id})
    tracker.finish_job(
        values.comparison(lone).model_copy(update={"run_id": parent}), Policy(), "", "**note**", failed=False
    )
    assert "gates.json" not in artifacts(client, parent)
    assert client.get_run(parent).data.tags["mlflow.note.content"] == "**note**"


def test_champion(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    assert tracker.champion(name) is None
    client.create_registered_model(name)
    assert tracker.champion(name) is None
    made = Made(tmp_path)
    run_id = made.log(tracker, start(tracker, name), name)
    [model] = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    version = client.create_model_version(name, model.artifact_location, run_id, await_creation_for=0)
    assert tracker.champion(name) is None
    client.set_registered_model_alias(name, "champion", version.version)
    assert tracker.champion(name) == made.evaluation.measurements
    foreign = client.create_model_version(name, str(tmp_path), await_creation_for=0)
    client.set_registered_model_alias(name, "champion", foreign.version)
    assert tracker.champion(name) == {}


def test_a_champion_of_another_machine_has_no_speed(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    of_machine = {"decode_tok_s": 40.0, "memory_peak_mb": 900.0, "energy_j_per_token": 2.0, "convert_s": 20.0}
    here, updated, elsewhere = (Made(tmp_path / folder, **of_machine) for folder in ("here", "updated", "elsewhere"))
    for made, changes in ((updated, {"system": "Linux 9.9"}), (elsewhere, {"processor": "y"})):
        hardware = made.variant.hardware.model_copy(update=changes)
        made.variant = made.variant.model_copy(update={"hardware": hardware})
    own, same, other = (made.log(tracker, start(tracker, name), name) for made in (here, updated, elsewhere))
    assert client.get_run(other).data.params["hardware.kind"] == "y (Linux x86_64), 2 cores, avx2"
    assert tracker.hardware_kind(own) == tracker.hardware_kind(same) == "x (Linux x86_64), 2 cores, avx2"

    client.create_registered_model(name)
    version = client.create_model_version(name, str(tmp_path), own, await_creation_for=0)
    client.set_registered_model_alias(name, "champion", version.version)
    everything = here.evaluation.measurements
    assert tracker.champion(name, same) == everything
    kept = everything.keys() - of_machine - {"ttft_ms_p50", "load_s"}
    assert {"accuracy", "perplexity", "size_mb"} <= kept
    assert (tracker.champion(name, other) or {}).keys() == kept
    assert tracker.differences(own, other) == ()

    # A run that nobody knows the machine of is not taken for one of this kind.
    nowhere = client.create_run(client.get_run(own).info.experiment_id, tags={"mlflow.parentRunId": own})
    assert tracker.hardware_kind(nowhere.info.run_id) == "an unknown machine"


def test_description_stays_within_what_mlflow_takes() -> None:
    many = {f"accuracy.{'c' * 50}{n}": Measurement(value=n / 3, unit="1", note="a | b") for n in range(300)}
    text = description(values.evaluation({**many, "size_mb": Measurement.exact(1.0, "MB")}))
    assert len(text) <= TAG_LIMIT
    assert text.endswith("The other figures are in measurements.json.")
    headlines = [line.split("\u00a0")[0] for line in text.splitlines()[2:4]]
    assert headlines == ["|ttft_ms_p50", "|accuracy"]
    assert all(line.count("|") == 7 for line in text.splitlines()[:-2])
