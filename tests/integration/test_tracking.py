"""MLflow on a real database, with values made by hand."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from slmops.core.errors import TrackingError, UsageError
from slmops.core.values import Measurement, VariantResult
from slmops.evaluation import dataset
from slmops.tracking import evaluation as tracking_evaluation
from slmops.tracking.tracker import Tracker
from tests import values
from tests.tracked import HARDWARE, JOB, Book, Made, read

pytestmark = pytest.mark.integration

# There is no interval of an exact figure, of one without an interval, and of one that is not a headline.
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
    *("answers.json", "edge_cases.json", "file_sizes.json", "genai_config.json", "inference_model.json"),
    *("logs/int4.evaluate.log", "logs/int4.olive.log", "measurements.json", "olive.log", "olive_config.json"),
    *("samples.json", "variant.json"),
}
KEPT = {"inputs/evaluation_set.jsonl", "inputs/perplexity_text.txt"}
REASON = "Ölive produced no model. " + "x" * 20_000


def test_a_job_from_start_to_end(book: Book) -> None:
    parent = book.start()
    opened = book.run(parent)
    assert opened.info.status == "RUNNING"
    assert opened.data.tags.items() >= {
        ("slmops.kind", "job"),
        ("slmops.model", book.name),
        ("slmops.source", "org/tiny"),
        ("slmops.base", "org/base@v1"),
        ("slmops.checkpoint_digest", "c" * 64),
        ("slmops.prefect_flow_run", "flow-run-1"),
    }
    assert opened.data.params.items() >= {
        ("job.model", "org/tiny"),
        ("job.temperature", "0.7"),
        ("checkpoint.architecture", "LlamaForCausalLM"),
        ("checkpoint.base", "org/base@v1"),
        ("hardware.cores", "2"),
        ("hardware.kind", "x (Linux x86_64), 2 cores, avx2"),
    }
    assert "job.top_p" not in opened.data.params
    experiment = book.client.get_experiment(opened.info.experiment_id)
    assert (experiment.name, experiment.tags["slmops.kind"]) == (book.name, "model")

    made = Made(book.folder)
    result = made.log(book.tracker, parent, book.name)
    failure = book.tracker.log_failure(parent, "fp32", REASON, made.logs)
    assert failure == values.failed("fp32", REASON).model_copy(update={"run_id": failure.run_id})
    run_id, failed = str(result.run_id), str(failure.run_id)
    both = book.finish(parent, result, failure, chosen="int4", report="<h1>é</h1>", note="**note**", failed=True)

    good, bad = book.run(run_id), book.run(failed)
    assert {*book.children(parent)} == {run_id, failed}
    assert book.status(run_id, failed, parent) == ["FINISHED", "FAILED", "FAILED"]
    for run, recipe in ((good, "int4"), (bad, "fp32")):
        tags = {"slmops.kind": "variant", "slmops.variant": recipe, "mlflow.parentRunId": parent}
        assert run.info.run_name == recipe
        assert run.data.tags.items() >= tags.items()
    assert good.data.metrics == METRICS
    assert good.data.params.items() >= {
        ("recipe", "int4"),
        ("foundry_id", "tiny-int4-generic-cpu:1"),
        ("weights.by_bits", '{"4": 1000}'),
        ("version.olive-ai", "1.0"),
    }
    assert (bad.data.metrics, bad.data.tags["slmops.reason"]) == ({}, REASON[:6000])
    assert bad.data.tags["mlflow.note.content"].startswith("Failed: Ölive produced no model. xxx")
    assert book.artifacts(run_id) == ARTIFACTS
    assert book.artifacts(failed) == {"logs/fp32.olive.log"}
    measured = book.json(run_id, "measurements.json")
    assert measured["perplexity"] == made.evaluation.measurements["perplexity"].model_dump()
    figures = {"size_mb": Measurement.exact(143, "MB")}
    peer = book.tracker.log_peer(parent, "llama.cpp-Q8_0", figures)
    assert peer == VariantResult(
        name="llama.cpp-Q8_0", status="ok", run_id=peer.run_id, metrics={"size_mb": 143}, measurements=figures
    )
    beside = book.run(str(peer.run_id))
    assert beside.data.tags.items() >= {"slmops.kind": "peer", "mlflow.parentRunId": parent}.items()
    assert beside.data.metrics == {"size_mb": 143}
    assert book.json(str(peer.run_id), "measurements.json") == {"size_mb": figures["size_mb"].model_dump()}
    assert book.json(run_id, "samples.json") == [{"prompt_tokens": 32, "first_s": 0.08}]
    assert book.json(run_id, "variant.json") == made.variant.model_dump(mode="json")
    tags = {"slmops.choice": "int4", "slmops.reason": "Because.", "mlflow.note.content": "**note**"}
    assert book.tags(parent).items() >= tags.items()
    assert book.artifacts(parent) == {"comparison.json", "policy.json", "report.html", *KEPT}
    assert read(book.client, parent, "report.html", book.folder) == "<h1>é</h1>"
    assert book.tracker.latest(book.name) == book.tracker.latest(None) == both

    [model] = book.models()
    assert (model.name, model.model_type, model.status) == (f"{book.name}-int4", "onnx-genai", "READY")
    assert model.source_run_id == run_id
    assert model.params == {"recipe": "int4", "key": "int4", "foundry_id": "tiny-int4-generic-cpu:1"}
    assert model.tags["slmops.path"] == str(book.folder / "foundry" / "int4")
    own = {(key, value, run_id) for key, value in METRICS.items() if not key.startswith("curves/")}
    assert {(metric.key, metric.value, metric.run_id) for metric in model.metrics} == own
    # With a model as output it would not be on MLflow's page of evaluations.
    inputs, outputs = good.inputs.model_inputs, good.outputs.model_outputs
    assert ([one.model_id for one in inputs], outputs) == ([model.model_id], [])


def test_a_job_keeps_copies_of_what_it_measures_with(book: Book) -> None:
    questions, text = book.folder / "Mine.CSV", book.folder / "text.md"
    questions.write_bytes("\ufeffprompt,expected\r\nQ,né\r\n".encode())
    text.write_bytes("né\r\nand more".encode())
    plain, own = book.start(), book.start(evaluation_set=questions, perplexity_text=text)
    for kept, original in (("evaluation_set.csv", questions), ("perplexity_text.txt", text)):
        assert book.download(own, f"inputs/{kept}").read_bytes() == original.read_bytes()
    assert book.run(own).data.params["job.evaluation_set"] == str(questions)
    # The packaged ones too: they change with slmops and with Python.
    assert book.artifacts(plain) == KEPT
    packaged = book.download(plain, "inputs")
    assert dataset.load(packaged / "evaluation_set.jsonl").digest == dataset.load(None).digest
    assert dataset.perplexity_text(packaged / "perplexity_text.txt") == dataset.perplexity_text(None)


def test_what_was_recorded_is_read_back(book: Book) -> None:
    asked = {"quick": True, "prompt_lengths": [32], "matcher": "mine.py:same"}
    made, folder = Made(book.folder), book.folder / "record"
    run_id = book.log(made, book.start(**asked))
    folder.mkdir()
    found = book.tracker.recorded(run_id, folder)
    assert found.job == JOB.model_copy(update={**asked, "precision": found.job.precision, "temperature": None})
    assert (found.run_id, found.hardware_kind) == (run_id, HARDWARE.kind)
    assert found.variant == made.variant.model_copy(update={"path": folder})
    assert found.measurements == made.evaluation.measurements
    assert (found.answers, found.tokens) == (made.evaluation.answers, 512)
    assert (found.evaluation_set_digest, found.text_digest) == ("e" * 64, "f" * 64)
    assert found.text is not None
    assert dataset.load(found.evaluation_set or Path()).digest == dataset.load(None).digest


def test_what_an_older_job_recorded(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept no copies, and a variant without answers and cases leaves no tables of them."""
    monkeypatch.setattr(tracking_evaluation, "log_inputs", lambda *_: None)
    made = Made(book.folder)
    made.evaluation = values.evaluation(answers=(), cases=(), curves=())
    run_id = book.log(made)
    assert (book.artifacts(run_id), book.traces(run_id)) == (ARTIFACTS - {"answers.json", "edge_cases.json"}, [])
    found = book.tracker.recorded(run_id, book.folder)
    assert (found.evaluation_set, found.text, found.answers) == (None, None, ())
    with pytest.raises(TrackingError, match="0" * 32):
        book.tracker.recorded("0" * 32, book.folder)


def test_variants_logged_at_once_keep_their_own_figures(book: Book) -> None:
    parent = book.start()
    made = [Made(book.folder, one, perplexity=float(number)) for number, one in enumerate(("int4", "int8", "fp16"))]
    first = book.log(made[0], parent)  # MLflow itself fails if two make one data set at the same moment
    with ThreadPoolExecutor(3) as pool:
        runs = [first, *pool.map(lambda one: book.log(one, parent), made[1:])]
    assert [book.run(run).data.metrics["perplexity"] for run in runs] == [0.0, 1.0, 2.0]
    assert {*book.children(parent)} == {*runs}
    # Nothing went into a run that nobody opened.
    assert len(book.client.search_runs([book.experiment()])) == 4


def test_a_repeated_attempt_leaves_one_child(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("the server went away\nand more")

    parent, made = book.start(), Made(book.folder)
    with monkeypatch.context() as patch:
        patch.setattr(book.tracker._client, "log_artifacts", refuse)
        with pytest.raises(TrackingError, match="the server went away") as caught:
            book.log(made, parent)
    assert "and more" not in caught.value.message
    assert book.status(*book.children(parent)) == ["RUNNING"]
    for _ in range(2):
        run_id = book.log(made, parent)
        assert book.children(parent) == [run_id]
    assert book.run(run_id).data.metrics == METRICS
    assert [model.source_run_id for model in book.models()] == [run_id]


def test_a_killed_job_is_closed_by_the_next_and_an_aborted_one_leaves_nothing_open(
    book: Book, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, other = book.start(), Book(database, f"{book.name}-2", book.folder).start()
    parent = book.start()
    assert book.status(stale, other, parent) == ["KILLED", "RUNNING", "RUNNING"]
    finished = book.log(parent=parent)
    with monkeypatch.context() as patch:
        patch.setattr(book.tracker._client, "set_terminated", lambda *_: None)
        unfinished = book.log(Made(book.folder, "int8"), parent)
    book.tracker.abort_job(parent)
    assert book.status(parent, finished, unfinished, other) == ["KILLED", "FINISHED", "KILLED", "RUNNING"]


def test_the_latest_is_the_newest_that_was_finished(book: Book) -> None:
    for chosen in ("int4", "int8"):
        book.finish(book.start(), values.result(chosen, 100), chosen=chosen)
        time.sleep(0.01)  # MLflow orders by milliseconds
    book.client.delete_experiment(book.experiment())
    book.start()  # and the experiment is taken back
    assert book.tracker.latest(book.name).choice.variant == "int8"
    with pytest.raises(UsageError, match="'nobody'") as caught:
        book.tracker.latest("nobody")
    known = (caught.value.fix or "").removeprefix("Known models: ").removesuffix(".").split(", ")
    assert book.name in known
    assert "Default" not in known  # MLflow's own experiment
    with pytest.raises(UsageError, match="slmops run --model"):
        Tracker("sqlite:///empty.db").latest(None)
