"""What the evaluation of a variant leaves in MLflow, on a real database."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from slmops.core.errors import TrackingError
from slmops.core.values import Answer, GateResult, Measurement, VariantResult
from slmops.foundry.versions import RELEASE
from slmops.tracking import evaluation as tracking_evaluation
from slmops.tracking.evaluation import QUICK, TAG_LIMIT, description
from tests import values
from tests.tracked import Book, Made

pytestmark = pytest.mark.integration

GATE: dict[str, Any] = {"metric": "perplexity_ratio", "limit": 1.1, "detail": "It is kept."}
PASSED = GateResult(gate="perplexity_ratio at most 1.1", outcome="pass", advisory=False, refuses=False, **GATE)
REFUSED = PASSED.model_copy(update={"outcome": "fail", "refuses": True, "value": 1.3, "low": 1.2, "high": 1.4})
UNSURE = REFUSED.model_copy(
    update={"gate": "accuracy at least 0.4", "metric": "accuracy", "outcome": "inconclusive", "more_samples": 12}
)


def test_figures_tables_and_data_sets(book: Book) -> None:
    questions = book.folder / "my set.jsonl"
    questions.write_text('{"prompt": "a", "expected": "b"}')
    made = Made(book.folder)
    run_id = book.log(made, book.start(evaluation_set=questions))
    run = book.run(run_id)
    for curve, factor in (("ttft_ms", 0.7), ("itl_ms", 0.1)):
        history = book.client.get_metric_history(run_id, f"curves/{curve}")
        assert [(point.step, point.value) for point in history] == [(n, n * factor) for n in (32, 128, 512)]
    assert (run.data.params["evaluation_set_digest"], run.data.params["text_digest"]) == ("e" * 64, "f" * 64)
    table = run.data.tags["mlflow.note.content"].replace("\u00a0", "").splitlines()
    assert table[0] == "|metric|value|95 % interval|unit|samples|note|"
    for line in ("ttft_ms_p50|81|78.5 to 84|ms|12|", "size_mb|110.5||MB|1|", "load_s|1.5||s|1|indicative: 1 sample"):
        assert f"|{line}|" in table

    answers, cases = (book.table(run_id, file) for file in ("answers.json", "edge_cases.json"))
    assert answers == [answer.model_dump() for answer in made.evaluation.answers]
    assert cases == [case.model_dump() for case in made.evaluation.cases]
    assert [row["score"] for row in answers] == [1.0, None, None]
    listed = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": "answers.json", "type": "table"}, {"path": "edge_cases.json", "type": "table"}]

    named = {"evaluation": "evaluation set my set", "perplexity": "perplexity text Python language reference"}
    inputs = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert {context: one.name for context, one in inputs.items()} == named
    for context, letter, uri in (("evaluation", "e", str(questions)), ("perplexity", "f", "Python language reference")):
        assert (inputs[context].digest, inputs[context].profile) == (letter * 12, json.dumps({"sha256": letter * 64}))
        assert inputs[context].source == json.dumps({"uri": uri})
    [model] = book.models()
    measured_with = {metric.key: metric.dataset_name for metric in model.metrics}
    assert measured_with["accuracy.low"] == measured_with["intervals/accuracy.low"] == named["evaluation"]
    assert measured_with["perplexity"] == named["perplexity"]
    assert measured_with["size_mb"] is None


def test_answers_of_two_variants_side_by_side(book: Book, capfd: pytest.CaptureFixture[str]) -> None:
    parent = book.start()
    capfd.readouterr()
    with ThreadPoolExecutor(1) as pool:
        runs = list(pool.map(lambda one: book.log(Made(book.folder, one), parent), ("fp32", "int4")))
    assert capfd.readouterr() == ("", "")
    first, second = (book.traces(run_id) for run_id in runs)
    # MLflow pairs what has the same preview; the first two items ask the same.
    assert [one.info.request_preview for one in first] == ["1: France?", "2: France?", "free: Greet."]
    assert [one.info.request_preview for one in first] == [one.info.request_preview for one in second]
    assert not {one.info.trace_id for one in first} & {one.info.trace_id for one in second}

    assessments = [{one.name: one for one in trace.info.assessments} for trace in first]
    assert [{key: one.value for key, one in of.items()} for of in assessments] == [
        {"correct": True, "score": 1.0, "expected_response": "Paris"},
        {"correct": False, "format_valid": False, "expected_response": "Paris"},
        {"correct": None},
    ]
    unjudged = assessments[2]["correct"]
    assert (unjudged.error.error_code, unjudged.error.error_message) == ("NOT_JUDGED", "?")
    assert {one.metadata["mlflow.assessment.sourceRunId"] for of in assessments for one in of.values()} == {runs[0]}

    trace = first[0]
    assert (trace.info.response_preview, trace.info.execution_duration) == ("Paris, né 東京", 500)
    assert trace.info.tags["slmops.category"] == "low"
    of_model = {one.model_id for one in book.models() if one.name.endswith("fp32")}
    assert trace.info.trace_metadata["mlflow.modelId"] in of_model
    [span] = trace.data.spans
    assert span.inputs == {"id": "1", "category": "low", "prompt": "France?"}
    assert span.outputs == "Paris, né 東京"
    assert (span.attributes["finish_reason"], span.attributes["completion_tokens"]) == ("stop", 3)
    page = book.tracker.answers_url(runs[1], runs[0])
    assert f"/evaluation-runs?selectedRunUuid={runs[1]}&compareToRunUuid={runs[0]}&" in page


def test_many_and_long_answers_to_a_server_that_is_busy_at_first(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("could not identify MLflow server version")

    monkeypatch.setattr(tracking_evaluation, "TRACES_AT_ONCE", 2)
    made = Made(book.folder)
    one = made.evaluation.answers[0].model_dump()
    long = {**one, "id": "i" * 300, "prompt": "ü" * 5000, "answer": "ö" * 50_000, "expected": "ß" * 5000}
    answers = tuple(Answer(**{**one, "id": str(number)}) for number in range(5))
    made.evaluation = values.evaluation(answers=(*answers, Answer(**long)))
    parent = book.start()
    with monkeypatch.context() as patch:
        patch.setattr(tracking_evaluation.TracingClient, "log_spans", refuse)
        with pytest.raises(TrackingError):
            book.log(made, parent)
    for _ in range(2):  # nothing is left of the attempts before
        run_id, traces = book.log(made, parent), book.traces()
        assert [trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces] == [run_id] * 6
    assert [trace.info.tags["mlflow.traceName"] for trace in traces] == [*"01234", "i" * 250]
    assert traces[-1].data.spans[0].outputs == "ö" * 50_000


def test_gates(book: Book) -> None:
    parent = book.start()
    runs = {one: book.log(Made(book.folder, one), parent) for one in ("fp32", "int8", "int4")}
    results = [values.result(one, 100).model_copy(update={"run_id": run}) for one, run in runs.items()]
    gates = {"int8": {"gates": (PASSED,)}, "int4": {"gates": (REFUSED, UNSURE), "dominated_by": "int8"}}
    judged = [result.model_copy(update=gates.get(result.name, {})) for result in results]
    for _ in range(2):  # as after a failed attempt
        book.finish(parent, *judged, values.failed("fp16", "No."), chosen="int8", note="**note**", failed=True)
    tags = {one: book.tags(run) for one, run in runs.items()}
    assert "slmops.gates" not in tags["fp32"]
    assert tags["int8"]["slmops.gates"] == "passed"
    assert tags["int4"]["slmops.gates"] == "refused: perplexity_ratio at most 1.1; accuracy at least 0.4"
    assert [of.get("slmops.dominated_by") for of in tags.values()] == [None, None, "int8"]
    rows = book.table(parent, "gates.json")
    assert rows == [
        {"variant": one, **gate.model_dump()} for one, gate in (("int8", PASSED), ("int4", REFUSED), ("int4", UNSURE))
    ]
    assert (rows[2]["more_samples"], type(rows[2]["more_samples"])) == (12, int)
    links = ", ".join(f"[{one}]({book.tracker.answers_url(runs[one], runs['fp32'])})" for one in ("int8", "int4"))
    assert book.tags(parent)["mlflow.note.content"] == f"**note**\n\nAnswers beside those of fp32: {links}"
    # A job without gates and baseline.
    parent = book.start()
    run = book.log(Made(book.folder / "lone"), parent)
    lone = values.result("int4", 100).model_copy(update={"run_id": run})
    book.finish(parent, lone, note="**note**")
    assert "gates.json" not in book.artifacts(parent)
    assert book.tags(parent)["mlflow.note.content"] == "**note**"


def promote(book: Book, location: str, run_id: str | None = None) -> None:
    version = book.client.create_model_version(book.name, location, run_id, await_creation_for=0)
    book.client.set_registered_model_alias(book.name, "champion", version.version)


def test_champion(book: Book) -> None:
    assert book.tracker.champion(book.name) is None
    book.client.create_registered_model(book.name)
    made = Made(book.folder)
    run_id = book.log(made)
    assert book.tracker.champion(book.name) is None
    promote(book, book.models()[0].artifact_location, run_id)
    assert book.tracker.champion(book.name) == made.evaluation.measurements
    promote(book, str(book.folder))  # somebody else's
    assert book.tracker.champion(book.name) == {}


def test_a_champion_is_that_of_its_release_which_is_for_the_same_target(book: Book) -> None:
    names = {"int8": 10.0, "int4-webgpu": 80.0, "fp16-webgpu": 70.0}
    made = [Made(book.folder / name, name, decode_tok_s=speed) for name, speed in names.items()]
    book.add(made[0], promote=True)
    book.add(made[1])
    challenger = book.log(made[2])
    assert "decode_tok_s" not in (book.tracker.champion(book.name, challenger) or {})  # a CPU's
    book.client.set_model_version_tag(book.name, "1", RELEASE, "2")
    for _ in range(2):
        assert (book.tracker.champion(book.name, challenger) or {})["decode_tok_s"].value == 80.0
        book.client.set_model_version_tag(book.name, "1", RELEASE, "7 2")  # the first was deleted
    assert (book.tracker.champion(book.name) or {})["decode_tok_s"].value == 10.0


def test_what_a_gpus_own_device_measures_goes_into_the_same_comparison(book: Book) -> None:
    made, parent = Made(book.folder, "int4-webgpu"), book.start()
    made.registration = made.registration.model_copy(update={"not_run": "there is no device here"})
    version, other = book.add(made, parent), values.result("int4", 100)
    result = VariantResult(name="int4-webgpu", status="ok", run_id=version.run_id, not_run="there is no device here")
    book.finish(parent, other, result, chosen="int4")
    before = book.tracker.device(version.run_id)
    figures = {name: Measurement(value=80.0, unit="x") for name in ("decode_tok_s", "memory_peak_mb")}
    hardware = made.variant.hardware.model_copy(update={"processor": "z"})
    found = book.tracker.log_measured(version, figures, hardware)
    assert [(one.not_run, one.metrics.get("decode_tok_s")) for one in found.variants] == [
        (None, other.metrics["decode_tok_s"]),
        (None, 80.0),
    ]
    assert book.run(version.run_id).data.metrics["decode_tok_s"] == 80.0
    assert book.json(version.run_id, "measurements.json")["memory_peak_mb"]["value"] == 80.0
    assert book.registry.find(book.name, str(version.version)).memory_mb == 80
    after = book.tracker.device(version.run_id)
    assert (after[0][0], before[1], after[1]) == ("z", "webgpu", "webgpu")


def test_a_champion_of_another_machine_has_no_speed(book: Book) -> None:
    of_machine = {"decode_tok_s": 40.0, "memory_peak_mb": 900.0, "energy_j_per_token": 2.0, "convert_s": 20.0}
    tracker, runs = book.tracker, []
    for number, changes in enumerate(({}, {"system": "Linux 9.9"}, {"processor": "y"})):
        made = Made(book.folder / str(number), **of_machine)
        hardware = made.variant.hardware.model_copy(update=changes)
        made.variant = made.variant.model_copy(update={"hardware": hardware})
        runs.append(book.log(made))
    own, same, other = runs
    assert book.run(other).data.params["hardware.kind"] == "y (Linux x86_64), 2 cores, avx2"
    assert tracker.hardware_kind(own) == tracker.hardware_kind(same) == "x (Linux x86_64), 2 cores, avx2"

    book.client.create_registered_model(book.name)
    promote(book, str(book.folder), own)
    everything = made.evaluation.measurements
    assert tracker.champion(book.name, same) == everything
    kept = everything.keys() - of_machine - {"ttft_ms_p50", "load_s"}
    assert {"accuracy", "perplexity", "size_mb"} <= kept
    assert (tracker.champion(book.name, other) or {}).keys() == kept
    assert tracker.differences(own, other) == ()

    # A run of an unknown machine is not taken for one of this kind.
    nowhere = book.client.create_run(book.experiment(), tags={"mlflow.parentRunId": own})
    assert tracker.hardware_kind(nowhere.info.run_id) == "an unknown machine"


def test_figures_compare_if_as_much_was_measured(book: Book) -> None:
    runs = []
    for number, (minutes, questions) in enumerate(((None, 3), (5, 3), (9, 3), (5, 2))):
        made = Made(book.folder / str(number))
        made.evaluation = values.evaluation(extent=values.EXTENT.model_copy(update={"questions": questions}))
        runs.append(book.log(made, book.start(minutes=minutes)))
    assert [book.tracker.differences(runs[1], run) for run in runs] == [(QUICK,), (), (), (QUICK,)]
    used = {"measured.tokens": "512", "measured.all_tokens": "9000", "measured.questions": "2"}
    assert book.run(runs[3]).data.params.items() >= used.items()


def test_description_stays_within_what_mlflow_takes() -> None:
    many = {f"accuracy.{'c' * 50}{n}": Measurement(value=n / 3, unit="1", note="a | b") for n in range(300)}
    text = description(values.evaluation({**many, "size_mb": Measurement.exact(1.0, "MB")}))
    assert len(text) <= TAG_LIMIT
    assert text.endswith("The other figures are in measurements.json.")
    headlines = [line.split("\u00a0")[0] for line in text.splitlines()[2:4]]
    assert headlines == ["|ttft_ms_p50", "|accuracy"]
    assert all(line.count("|") == 7 for line in text.splitlines()[:-2])
