"""What is deployed of a tiny model, measured and soaked again for real, after one job and one promotion."""

import os
from pathlib import Path

import pytest

from flows.optimize import optimize
from flows.promote import promote
from flows.remeasure import remeasure, soak
from slmops.core import locks, machine
from slmops.core.errors import BusyError, EvaluationError, TrackingError, UsageError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.delivery import installed, pull, remeasurement
from slmops.evaluation import dataset, speed
from slmops.evaluation.drift import MEMORY_METRICS, SPEED_METRICS, DriftError, Remeasure, Remeasured
from slmops.evaluation.soak import Soak, SoakError, SoakResult
from slmops.foundry.versions import ModelVersion, Promotion
from tests import making
from tests.shown import artifacts, flow_runs
from tests.tracked import Book

pytestmark = pytest.mark.integration

NAME = "Tiny_R"
POLICY = '[[gates]]\nmetric = "accuracy"\nmin = 0\n'
# This machine does other things too while the tests run.
LENIENT = {"max_slowdown": 50.0, "max_memory_growth": 5.0}
REQUESTS = 60
# A fresh process of so few requests still moves by some KB.
SOAK = {"requests": REQUESTS, "max_kb_per_request": 100}
# Python runs a file of this name when it starts. This one makes the SDK's user forget to give memory back: 500 KB a
# request, from the first one on.
LEAK = """
import sys
if any(one.startswith("slmops.evaluation.soak") for one in sys.orig_argv):
    from slmops.foundry import runtime
    kept, ask = [], runtime.ask
    def leak(*arguments, **options):
        kept.append(b"x" * 500_000)
        return ask(*arguments, **options)
    runtime.ask = leak
"""


@pytest.fixture(scope="module")
def book(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Book:
    return Book(str(settings.tracking_uri), NAME, tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="module")
def champion(talkative: Path, job: Job, stock: Settings, settings: Settings, book: Book) -> ModelVersion:
    """A version that was measured with files that are not there any more."""
    making.place(["fp32"], job, stock, settings.home)
    inputs = book.folder
    (inputs / "policy.toml").write_text(POLICY)
    (inputs / "text.txt").write_text("A text of so many words, and of so many words again. " * 20)
    asked = {"evaluation_set": making.evaluation_set(inputs), "perplexity_text": inputs / "text.txt"}
    optimize(making.job(talkative, name=NAME, precision=["fp32"], policy=inputs / "policy.toml", **asked))
    promote(Promotion(name=NAME))
    for path in asked.values():
        path.unlink()
    return book.registry.champion(NAME)


@pytest.fixture(scope="module")
def steady(champion: ModelVersion) -> Remeasured:
    return remeasure(Remeasure(name=champion.name, **LENIENT))


def test_what_is_deployed_is_what_was_recorded(
    steady: Remeasured, champion: ModelVersion, book: Book, settings: Settings
) -> None:
    assert (steady.outcome, steady.left_out, steady.answers_changed) == ("steady", (), 0)
    assert (steady.model, steady.version, steady.variant) == (NAME, champion.version, "fp32")
    assert (steady.recorded_run, steady.hardware_kind) == (champion.run_id, machine.hardware().kind)
    figures = {one.metric: one for one in steady.figures}
    assert figures.keys() == {*SPEED_METRICS, *MEMORY_METRICS, "perplexity", "accuracy"}
    assert {metric: one.recorded.value for metric, one in figures.items()} == {
        metric: book.run(champion.run_id).data.metrics[metric] for metric in figures
    }
    # The same files, text and questions; the job kept copies of them.
    assert figures["perplexity"].ratio == pytest.approx(1, abs=1e-5)
    assert (figures["accuracy"].ratio, figures["accuracy"].now.samples) == (1, 3)
    # Nothing of it is left, and what users of this device get is for others to say.
    assert not list((settings.home / "work").glob("*.remeasure"))
    assert installed.current(NAME, settings) is None
    # What MLflow and Prefect have.
    run_id = str(steady.run_id)
    run = book.run(run_id)
    tags, params = run.data.tags, run.data.params
    assert (run.info.status, tags["slmops.kind"]) == ("FINISHED", "remeasurement")
    assert (tags["slmops.version"], tags["slmops.recorded_run"]) == (str(champion.version), champion.run_id)
    assert (tags["slmops.outcome"], tags["slmops.reason"]) == ("steady", steady.detail)
    assert run.data.metrics == steady.metrics
    assert run.data.metrics["drift/perplexity"] == pytest.approx(1, abs=1e-5)
    assert params["hardware.kind"] == steady.hardware_kind
    assert params["remeasure.max_slowdown"] == "50.0"
    kept = Remeasured.model_validate(book.json(run_id, "remeasurement.json"))
    assert kept == steady.model_copy(update={"run_id": None})
    tags_now = book.registry.find(NAME, str(champion.version)).tags
    assert book.tags(tags_now["slmops.remeasurement_run"])["slmops.kind"] == "remeasurement"
    assert book.tracker.latest(NAME).run_id == champion.job_id
    [flow_run] = [one for one in flow_runs("remeasure") if str(one.id) == tags["slmops.prefect_flow_run"]]
    assert flow_run.state_name == "Completed"
    shown = artifacts(flow_run)["remeasure-tiny-r"]
    assert shown.startswith(f"**steady**: {steady.detail}")
    assert "| perplexity " in shown
    assert f"[MLflow run]({book.tracker.run_url(run_id)})" in shown


def test_drift_is_reported(
    champion: ModelVersion, book: Book, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the version had been a thousand times as fast, and much better, when it was evaluated."""
    before, figures = (book.json(champion.run_id, "measurements.json") for _ in range(2))
    request.addfinalizer(lambda: book.client.log_dict(champion.run_id, before, "measurements.json"))
    for metric, factor in {"ttft_ms_p50": 1e-3, "decode_tok_s": 1e3, "memory_peak_mb": 1e-3, "perplexity": 0.5}.items():
        ends = {end: figures[metric][end] for end in ("value", "low", "high") if figures[metric][end] is not None}
        # A figure that says that the machine was busy would not count.
        figures[metric] |= {"note": None, **{end: value * factor for end, value in ends.items()}}
    book.client.log_dict(champion.run_id, figures, "measurements.json")
    monkeypatch.setattr(speed, "DISTURBED", float("inf"))  # a busy machine's speeds would not count
    with pytest.raises(DriftError, match="ttft_ms_p50") as caught:
        remeasure(Remeasure(name=NAME, version=str(champion.version), **LENIENT))
    result = caught.value.result
    assert result.outcome == "drifted"
    drifted = {one.metric for one in result.figures if one.drifted}
    assert drifted == {"ttft_ms_p50", "decode_tok_s", "memory_peak_mb", "perplexity"}
    assert result.metrics["drift/perplexity"] == pytest.approx(2, rel=1e-5)
    assert book.tags(result.run_id)["slmops.outcome"] == "drifted"
    version = book.registry.find(NAME, str(champion.version))
    assert version.tags["slmops.remeasurement"] == "drifted"
    assert version.tags["slmops.remeasurement_run"] == result.run_id
    flow_run = flow_runs("remeasure")[-1]
    assert flow_run.state_name == "Failed"
    assert "drifted: 2 times worse, and at most 1.01 is tolerated" in artifacts(flow_run)["remeasure-tiny-r"]


def test_speeds_of_another_kind_of_machine_are_not_compared(
    champion: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded_on = machine.hardware()
    another = recorded_on.model_copy(update={"processor": "Another CPU"})
    monkeypatch.setattr(machine, "hardware", lambda: another)
    result = remeasure(Remeasure(name=NAME, version="champion"))
    assert (result.outcome, result.recorded_run) == ("steady", champion.run_id)
    assert {one.metric for one in result.figures} == {"perplexity", "accuracy"}
    [reason] = result.left_out
    assert reason.endswith(f"another kind of machine ({recorded_on.kind}; not {another.kind})")


def test_a_removed_version_is_measured_to_the_end(
    champion: ModelVersion, book: Book, settings: Settings, tmp_path: Path
) -> None:
    here = pull.install(champion, settings, str(settings.tracking_uri))
    recorded = book.tracker.recorded(champion.run_id, tmp_path)
    questions = dataset.load(recorded.evaluation_set)
    with remeasurement.copied(here, "gone", settings) as copy:
        installed.tidy(NAME, [], settings)
        assert not here.folder.exists()
        answers = remeasurement.ask_questions(copy, questions, recorded, "gone", settings)
    assert [one.answer for one in answers] == [one.answer for one in recorded.answers]
    assert not settings.work("gone").exists()
    with pytest.raises(BusyError, match=r"tiny-r|Tiny_R"), remeasurement.copied(here, "gone", settings):
        pass


@pytest.mark.usefixtures("champion")
def test_what_cannot_be_measured(
    book: Book, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ask, said in (
        (lambda: remeasure(Remeasure(name="nobody")), "nobody"),
        (lambda: remeasure(Remeasure(name=NAME, version="77")), "77"),
        (lambda: soak(Soak(name="nobody", champion=True)), "nobody"),
        (lambda: soak(Soak(champion=True)), "--champion"),
    ):
        with pytest.raises(UsageError, match=said):
            ask()
    held = locks.exclusive(settings.locks / f"{NAME}.remeasure.lock", "it", wait=False)
    with held, pytest.raises(BusyError, match="Tiny_R"):
        remeasure(Remeasure(name=NAME))
    before = len(book.client.search_runs([book.experiment()]))
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "other"))
    with pytest.raises(EvaluationError, match="generic-cpu:1"):
        soak(Soak(requests=30))
    assert len(book.client.search_runs([book.experiment()])) == before
    assert flow_runs("soak")[-1].state_name == "Failed"


# --- soaks: one variant keeps its memory, one leaks ---


@pytest.fixture(scope="module")
def passed(champion: ModelVersion, book: Book, settings: Settings) -> SoakResult:
    result = soak(Soak(**SOAK))
    assert book.tracker.latest(None).run_id == champion.job_id  # a soak is no comparison
    assert not list(settings.work(NAME).glob("*-soak"))
    assert f"soak: 50 of {REQUESTS} requests, " in (settings.logs / NAME / "fp32.soak.log").read_text()
    return result


def test_a_variant_that_keeps_its_memory(passed: SoakResult, book: Book) -> None:
    [measured] = book.tracker.latest(NAME).variants
    assert (passed.model, passed.variant, passed.foundry_id) == (NAME, "fp32", measured.foundry_id)
    assert (passed.outcome, passed.slope.samples) == ("pass", REQUESTS)
    assert passed.slope.low <= passed.slope.value <= passed.slope.high <= 100
    assert 10 < passed.memory_start_mb < 1000
    assert passed.memory_end_mb == pytest.approx(passed.memory_start_mb, rel=0.05)
    flow_run = flow_runs("soak")[-1]
    assert flow_run.state_name == "Completed"
    assert flow_run.parameters["request"]["max_kb_per_request"] == 100
    shown = artifacts(flow_run)["soak-tiny-r"]
    assert f"pass: {passed.detail}" in shown
    assert f"[MLflow run]({book.tracker.run_url(passed.run_id)})" in shown
    # What MLflow has.
    run = book.run(passed.run_id)
    tags = {"kind": "soak", "model": NAME, "variant": "fp32", "foundry_id": passed.foundry_id, "outcome": "pass"}
    assert run.info.status == "FINISHED"
    assert {name: run.data.tags[f"slmops.{name}"] for name in tags} == tags
    assert run.data.tags["slmops.reason"] == passed.detail
    assert {name: run.data.metrics[name] for name in passed.metrics} == passed.metrics
    assert len(passed.metrics) == 6
    history = book.client.get_metric_history(passed.run_id, "soak_memory_mb")
    assert [point.step for point in history] == list(range(1, REQUESTS + 1))
    raw = book.json(passed.run_id, "soak.json")
    assert (raw["memory_mb"], raw["metrics"]) == ([point.value for point in history], passed.metrics)


def test_a_leak_is_found(passed: SoakResult, book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(LEAK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SoakError, match="100") as caught:
        soak(Soak(name=NAME, variant="fp32", **SOAK))
    result = caught.value.result
    assert result.outcome == "fail"
    assert result.slope.value == pytest.approx(500, rel=0.1)
    assert result.memory_end_mb - result.memory_start_mb > 20
    assert result.run_id != passed.run_id
    assert book.tags(result.run_id)["slmops.outcome"] == "fail"
    flow_run = flow_runs("soak")[-1]
    assert flow_run.state_name == "Failed"
    assert f"fail: {result.detail}" in artifacts(flow_run)["soak-tiny-r"]


def test_the_champion_is_soaked(champion: ModelVersion, book: Book, settings: Settings) -> None:
    result = soak(Soak(name=NAME, champion=True, requests=30, max_kb_per_request=100_000))
    assert (result.outcome, result.version, result.variant) == ("pass", champion.version, "fp32")
    assert (result.model, result.foundry_id) == (NAME, champion.foundry_id)
    tags = book.tags(str(result.run_id))
    assert (tags["slmops.kind"], tags["slmops.version"]) == ("soak", str(champion.version))
    assert result.detail in artifacts(flow_runs("soak")[-1])["soak-tiny-r"]
    assert not list((settings.home / "work").glob("*.soak"))
    assert installed.current(NAME, settings) is None


def test_a_long_series_is_thinned(book: Book) -> None:
    memory = [float(number) for number in range(1, 1001)]
    run = book.tracker.log_soak("long", {}, {"soak_requests": 1000.0}, memory)
    history = book.client.get_metric_history(run, "soak_memory_mb")
    assert (len(history), history[-1].step) == (250, 1000)
    assert all(point.value == point.step for point in history)
    assert book.json(run, "soak.json")["memory_mb"] == memory


def test_a_repeated_attempt_of_a_soak_leaves_one_run(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, tags = book.tracker, {"slmops.prefect_flow_run": "one"}
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_text", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(TrackingError, match="the disk is full"):
            tracker.log_soak("twice", tags, {"soak_requests": 30.0}, [1.0] * 30)
    run = tracker.log_soak("twice", tags, {"soak_requests": 30.0}, [1.0] * 30)
    other = tracker.log_soak("twice", {"slmops.prefect_flow_run": "two"}, {"soak_requests": 30.0}, [1.0] * 30)
    experiment = book.client.get_experiment_by_name("twice").experiment_id
    assert {one.info.run_id for one in book.client.search_runs([experiment])} == {run, other}
