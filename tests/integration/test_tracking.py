"""MLflow on a real database, with values made by hand."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slmops.core.errors import TrackingError, UsageError
from slmops.evaluation import dataset
from slmops.selection.policy import Policy
from slmops.tracking import remeasure as tracking_remeasure
from slmops.tracking.tracker import Tracker, as_result
from tests import values
from tests.tracked import HARDWARE, JOB, Made, artifacts, children, read, start

pytestmark = pytest.mark.integration

METRICS = {
    **values.evaluation().metrics,
    "intervals/accuracy.low": 0.1,
    "intervals/accuracy.high": 0.9,
    "intervals/ttft_ms_p50.low": 78.5,
    "intervals/ttft_ms_p50.high": 84.0,
    "curves/ttft_ms": 512 * 0.7,
    "curves/itl_ms": 512 * 0.1,
}
ARTIFACTS = {
    "answers.json",
    "edge_cases.json",
    "file_sizes.json",
    "genai_config.json",
    "inference_model.json",
    "logs/int4.evaluate.log",
    "logs/int4.olive.log",
    "measurements.json",
    "olive.log",
    "olive_config.json",
    "samples.json",
    "variant.json",
}


def test_a_job_from_start_to_end(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    parent = start(tracker, name)
    opened = client.get_run(parent)
    assert opened.info.status == "RUNNING"
    assert opened.data.tags["slmops.kind"] == "job"
    assert opened.data.tags["slmops.model"] == name
    assert opened.data.tags["slmops.source"] == "org/tiny"
    assert opened.data.tags["slmops.checkpoint_digest"] == "c" * 64
    assert opened.data.tags["slmops.prefect_flow_run"] == "flow-run-1"
    assert opened.data.params["job.model"] == "org/tiny"
    assert opened.data.params["job.temperature"] == "0.7"
    assert "job.top_p" not in opened.data.params
    assert opened.data.params["checkpoint.architecture"] == "LlamaForCausalLM"
    assert opened.data.params["hardware.cores"] == "2"
    assert opened.data.params["hardware.kind"] == "x (Linux x86_64), 2 cores, avx2"
    experiment = client.get_experiment_by_name(name)
    assert (experiment.experiment_id, experiment.tags["slmops.kind"]) == (opened.info.experiment_id, "model")

    made = Made(tmp_path)
    run_id = made.log(tracker, parent, name)
    failed = tracker.log_failure(parent, "fp32", "Olive produced no model. KeyError", made.logs)
    result = as_result(made.variant, made.registration, made.evaluation, run_id)
    both = values.comparison(result, values.failed("fp32", "Olive produced no model. KeyError"), chosen="int4")
    both = both.model_copy(update={"model": name, "run_id": parent})
    tracker.finish_job(both, Policy(), "<h1>é</h1>", "**note**", failed=True)

    good, bad = (client.get_run(run) for run in (run_id, failed))
    assert {run.info.run_id for run in children(client, parent)} == {run_id, failed}
    assert (good.info.status, bad.info.status) == ("FINISHED", "FAILED")
    assert (good.info.run_name, bad.info.run_name) == ("int4", "fp32")
    for run, recipe in ((good, "int4"), (bad, "fp32")):
        tags = run.data.tags
        assert (tags["slmops.kind"], tags["slmops.variant"]) == ("variant", recipe)
        assert tags["mlflow.parentRunId"] == parent
    assert good.data.metrics == METRICS
    assert good.data.params["recipe"] == "int4"
    assert good.data.params["foundry_id"] == "tiny-int4-generic-cpu:1"
    assert json.loads(good.data.params["weights.by_bits"]) == {"4": 1000}
    assert good.data.params["version.olive-ai"] == "1.0"
    assert bad.data.metrics == {}
    assert bad.data.tags["slmops.reason"] == "Olive produced no model. KeyError"

    assert artifacts(client, run_id) == ARTIFACTS
    assert artifacts(client, failed) == {"logs/fp32.olive.log"}
    table = json.loads(read(client, run_id, "answers.json", tmp_path))
    assert table["columns"][0] == "id"
    assert [row[table["columns"].index("answer")] for row in table["data"]] == ["Paris, né 東京", "", "Hi"]
    measured = json.loads(read(client, run_id, "measurements.json", tmp_path))
    assert measured["perplexity"] == made.evaluation.measurements["perplexity"].model_dump()
    assert json.loads(read(client, run_id, "samples.json", tmp_path)) == [{"prompt_tokens": 32, "first_s": 0.08}]
    assert json.loads(read(client, run_id, "variant.json", tmp_path)) == made.variant.model_dump(mode="json")

    closed = client.get_run(parent)
    assert closed.info.status == "FAILED"
    assert closed.data.tags["slmops.choice"] == "int4"
    assert closed.data.tags["slmops.reason"] == "Because."
    assert closed.data.tags["mlflow.note.content"] == "**note**"
    kept = {"inputs/evaluation_set.jsonl", "inputs/perplexity_text.txt"}
    assert artifacts(client, parent) == {"comparison.json", "policy.json", "report.html", *kept}
    assert read(client, parent, "report.html", tmp_path) == "<h1>é</h1>"
    assert tracker.latest(name) == both
    assert tracker.latest(None) == both


def test_the_logged_model_and_its_metrics(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    parent = start(tracker, name)
    run_id = Made(tmp_path).log(tracker, parent, name)
    [model] = client.search_logged_models([client.get_run(parent).info.experiment_id])
    assert (model.name, model.model_type, model.status) == (f"{name}-int4", "onnx-genai", "READY")
    assert model.source_run_id == run_id
    assert model.params == {"recipe": "int4", "key": "int4", "foundry_id": "tiny-int4-generic-cpu:1"}
    assert model.tags["slmops.path"] == str(tmp_path / "foundry" / "int4")
    own = {key: value for key, value in METRICS.items() if not key.startswith("curves/")}
    assert {metric.key: metric.value for metric in model.metrics} == own
    assert {metric.run_id for metric in model.metrics} == {run_id}
    run = client.get_run(run_id)
    # With a model as output it would not be on MLflow's page of evaluations.
    assert ([one.model_id for one in run.inputs.model_inputs], run.outputs.model_outputs) == ([model.model_id], [])


def test_a_job_keeps_copies_of_what_it_measures_with(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    questions, text = tmp_path / "Mine.CSV", tmp_path / "text.md"
    questions.write_bytes("\ufeffprompt,expected\r\nQ,né\r\n".encode())
    text.write_bytes("né\r\nand more".encode())
    parents = [
        tracker.start_job(name, asked, values.checkpoint(), HARDWARE, None)
        for asked in (JOB, JOB.model_copy(update={"evaluation_set": questions, "perplexity_text": text}))
    ]
    asked = client.get_run(parents[1]).data.params
    copies = [
        Path(client.download_artifacts(parents[1], f"inputs/{kept}", str(tmp_path)))
        for kept in ("evaluation_set.csv", "perplexity_text.txt")
    ]
    assert [copy.read_bytes() for copy in copies] == [questions.read_bytes(), text.read_bytes()]
    assert asked["job.evaluation_set"] == str(questions)
    # The packaged ones too: they change with slmops and with Python.
    assert artifacts(client, parents[0]) == {"inputs/evaluation_set.jsonl", "inputs/perplexity_text.txt"}
    packaged = Path(client.download_artifacts(parents[0], "inputs", str(tmp_path / "packaged")))
    assert dataset.load(packaged / "evaluation_set.jsonl").digest == dataset.load(None).digest
    assert dataset.perplexity_text(packaged / "perplexity_text.txt") == dataset.perplexity_text(None)


def test_what_was_recorded_is_read_back(tracker: Tracker, name: str, tmp_path: Path) -> None:
    asked = JOB.model_copy(update={"quick": True, "prompt_lengths": [32], "matcher": "mine.py:same"})
    parent = tracker.start_job(name, asked, values.checkpoint(), HARDWARE, None)
    made = Made(tmp_path / "made")
    run_id = made.log(tracker, parent, name)
    (tmp_path / "record").mkdir()
    found = tracker.recorded(run_id, tmp_path / "record")
    assert found.job == asked.model_copy(update={"precision": found.job.precision, "temperature": None})
    assert (found.run_id, found.hardware_kind) == (run_id, HARDWARE.kind)
    assert found.variant == made.variant.model_copy(update={"path": tmp_path / "record"})
    assert found.measurements == made.evaluation.measurements
    assert found.answers == made.evaluation.answers
    assert (found.evaluation_set_digest, found.text_digest) == ("e" * 64, "f" * 64)
    assert found.evaluation_set is not None
    assert found.text is not None
    assert dataset.load(found.evaluation_set).digest == dataset.load(None).digest


def test_what_an_older_job_recorded(
    tracker: Tracker, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept no copies, and a variant without answers leaves no table of them."""
    with monkeypatch.context() as patch:
        patch.setattr(tracking_remeasure, "log_inputs", lambda *_: None)
        parent = start(tracker, name)
    made = Made(tmp_path / "made")
    made.evaluation = made.evaluation.model_copy(update={"answers": ()})
    run_id = made.log(tracker, parent, name)
    (tmp_path / "record").mkdir()
    found = tracker.recorded(run_id, tmp_path / "record")
    assert (found.evaluation_set, found.text, found.answers) == (None, None, ())
    with pytest.raises(TrackingError, match="failed"):
        tracker.recorded("0" * 32, tmp_path / "record")


def test_variants_logged_at_once_keep_their_own_figures(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    parent = start(tracker, name)
    made = [Made(tmp_path, one, perplexity=float(number)) for number, one in enumerate(("int4", "int8", "fp16"))]
    first = made[0].log(tracker, parent, name)  # MLflow itself fails if two make one data set at the same moment
    with ThreadPoolExecutor(3) as pool:
        runs = [first, *pool.map(lambda one: one.log(tracker, parent, name), made[1:])]
    assert [client.get_run(run).data.metrics["perplexity"] for run in runs] == [0.0, 1.0, 2.0]
    assert {run.info.run_id for run in children(client, parent)} == set(runs)
    # Nothing went into a run that nobody opened.
    experiment = client.get_run(parent).info.experiment_id
    assert len(client.search_runs([experiment])) == 4


def test_a_repeated_attempt_leaves_one_child(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = start(tracker, name)
    made = Made(tmp_path)
    with monkeypatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> None:
            raise MlflowException("the server went away\nand more")

        patch.setattr(tracker._client, "log_artifacts", refuse)
        with pytest.raises(TrackingError) as caught:
            made.log(tracker, parent, name)
    assert caught.value.message.endswith("failed: the server went away")
    assert [run.info.status for run in children(client, parent)] == ["RUNNING"]
    run_id = made.log(tracker, parent, name)
    assert [run.info.run_id for run in children(client, parent)] == [run_id]
    again = made.log(tracker, parent, name)
    assert [run.info.run_id for run in children(client, parent)] == [again]
    assert client.get_run(again).data.metrics == METRICS
    models = client.search_logged_models([client.get_run(parent).info.experiment_id])
    assert [model.source_run_id for model in models] == [again]


def test_a_reason_of_any_length(tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path) -> None:
    parent = start(tracker, name)
    reason = "Ölive: " + "x" * 20_000
    run = client.get_run(tracker.log_failure(parent, "int4", reason, tmp_path))
    assert run.info.status == "FAILED"
    assert run.data.tags["slmops.reason"].startswith("Ölive: xxx")
    assert run.data.tags["mlflow.note.content"].startswith("Failed: Ölive: xxx")


def test_a_killed_job_is_closed_by_the_next(tracker: Tracker, client: MlflowClient, name: str) -> None:
    stale, other = start(tracker, name), start(tracker, f"{name}-2")
    parent = start(tracker, name)
    states = {run: client.get_run(run).info.status for run in (stale, other, parent)}
    assert states == {stale: "KILLED", other: "RUNNING", parent: "RUNNING"}


def test_an_aborted_job_leaves_nothing_open(
    tracker: Tracker, client: MlflowClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = start(tracker, name)
    finished = Made(tmp_path).log(tracker, parent, name)
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "set_terminated", lambda *_: None)
        unfinished = Made(tmp_path, "int8").log(tracker, parent, name)
    tracker.abort_job(parent)
    states = {run: client.get_run(run).info.status for run in (parent, finished, unfinished)}
    assert states == {parent: "KILLED", finished: "FINISHED", unfinished: "KILLED"}


def test_the_latest_is_the_newest_that_was_finished(tracker: Tracker, name: str) -> None:
    for chosen in ("int4", "int8"):
        done = values.comparison(values.result(chosen, 100), chosen=chosen)
        tracker.finish_job(done.model_copy(update={"run_id": start(tracker, name)}), Policy(), "", "", failed=False)
        time.sleep(0.01)  # MLflow orders by milliseconds
    start(tracker, name)
    assert tracker.latest(name).choice.variant == "int8"
    with pytest.raises(UsageError, match="There is no finished comparison of 'nobody'") as caught:
        tracker.latest("nobody")
    assert caught.value.exit_code == 2
    assert caught.value.fix is not None
    known = caught.value.fix.removeprefix("Known models: ").removesuffix(".").split(", ")
    assert name in known
    assert "Default" not in known  # MLflow's own experiment


def test_no_model_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="There is no finished comparison") as caught:
        Tracker("sqlite:///empty.db").latest(None)
    assert caught.value.message == "There is no finished comparison."
    assert caught.value.fix == "Run `slmops run --model SOURCE` first."


def test_a_deleted_experiment_is_taken_back(tracker: Tracker, client: MlflowClient, name: str) -> None:
    first = start(tracker, name)
    client.delete_experiment(client.get_run(first).info.experiment_id)
    second = start(tracker, name)
    assert client.get_run(second).info.experiment_id == client.get_run(first).info.experiment_id
    assert client.get_experiment_by_name(name).lifecycle_stage == "active"


def test_a_dead_server_is_noticed_in_time() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match=f"MLflow at {url} failed") as caught:
            start(Tracker(url), "tiny")
    assert time.monotonic() - started < 30
    assert "slmops up" in (caught.value.fix or "")
    assert "\n" not in caught.value.message
