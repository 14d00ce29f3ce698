"""Soaks of a tiny model in Foundry Local for real, as a Prefect flow: one keeps its memory, one leaks."""

import os
from pathlib import Path

import pytest

from flows.soak import soak
from slmops.core.errors import EvaluationError, TrackingError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Registration
from slmops.evaluation.soak import Soak, SoakError, SoakResult
from slmops.foundry.register import register
from tests import making, values
from tests.shown import artifacts, flow_runs
from tests.tracked import Book

pytestmark = pytest.mark.integration

NAME, KEY = "Tiny_S", "soak-tiny-s"
REQUESTS = 60
# Python runs a file of this name when it starts. This one makes the SDK's user forget to give memory back: 500 KB a
# request, from the first one on.
LEAK = """
import sys
if "slmops.evaluation.soak" in sys.orig_argv:
    from slmops.foundry import runtime
    kept, ask = [], runtime.ask
    def leak(*arguments, **options):
        kept.append(b"x" * 500_000)
        return ask(*arguments, **options)
    runtime.ask = leak
"""


@pytest.fixture(scope="module")
def registration(job: Job, settings: Settings, stock: Settings) -> Registration:
    return register(making.variant("int8", job, stock), NAME, job, settings)


@pytest.fixture(scope="module")
def book(settings: Settings, registration: Registration, tmp_path_factory: pytest.TempPathFactory) -> Book:
    """MLflow after a job of two variants, of which one failed."""
    book = Book(str(settings.tracking_uri), NAME, tmp_path_factory.mktemp("book"))
    ok = values.result("int8", 1).model_copy(update={"foundry_id": registration.foundry_id})
    book.finish(book.start(), ok, values.failed("int4", "Olive produced no model."), chosen="int8", failed=True)
    return book


@pytest.fixture(scope="module")
def passed(book: Book, settings: Settings) -> SoakResult:
    # A fresh process of so few requests still moves by some KB.
    result = soak(Soak(requests=REQUESTS, max_kb_per_request=100))
    assert result.run_id is not None
    assert book.tracker.latest(None).run_id != result.run_id  # a soak is no comparison
    assert not list(settings.work(NAME).glob("*-soak"))
    assert f"soak: 50 of {REQUESTS} requests, " in (settings.logs / NAME / "int8.soak.log").read_text()
    return result


def test_a_variant_that_keeps_its_memory(passed: SoakResult, registration: Registration, book: Book) -> None:
    assert (passed.model, passed.variant, passed.foundry_id) == (NAME, "int8", registration.foundry_id)
    assert (passed.outcome, passed.slope.samples) == ("pass", REQUESTS)
    assert passed.slope.low <= passed.slope.value <= passed.slope.high <= 100
    assert 10 < passed.memory_start_mb < 1000
    assert passed.memory_end_mb == pytest.approx(passed.memory_start_mb, rel=0.05)
    flow_run = flow_runs("soak")[-1]
    assert flow_run.state_name == "Completed"
    assert flow_run.parameters["request"]["max_kb_per_request"] == 100
    shown = artifacts(flow_run)[KEY]
    assert f"pass: {passed.detail}" in shown
    assert f"[MLflow run]({book.tracker.run_url(passed.run_id)})" in shown
    # What MLflow has.
    run = book.run(passed.run_id)
    tags = {"kind": "soak", "model": NAME, "variant": "int8", "foundry_id": passed.foundry_id, "outcome": "pass"}
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
        soak(Soak(name=NAME, variant="int8", requests=REQUESTS, max_kb_per_request=100))
    result = caught.value.result
    assert (caught.value.exit_code, result.outcome) == (3, "fail")
    assert result.slope.value == pytest.approx(500, rel=0.1)
    assert result.memory_end_mb - result.memory_start_mb > 20
    assert result.run_id != passed.run_id
    assert book.tags(result.run_id)["slmops.outcome"] == "fail"
    flow_run = flow_runs("soak")[-1]
    assert flow_run.state_name == "Failed"
    assert f"fail: {result.detail}" in artifacts(flow_run)[KEY]


@pytest.mark.usefixtures("passed")
def test_a_variant_of_another_home(book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(book.client.search_runs([book.experiment()]))
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "other"))
    with pytest.raises(EvaluationError, match="generic-cpu:1"):
        soak(Soak(requests=30))
    assert len(book.client.search_runs([book.experiment()])) == before
    assert flow_runs("soak")[-1].state_name == "Failed"


def test_a_long_series_is_thinned(book: Book) -> None:
    memory = [float(number) for number in range(1, 1001)]
    run = book.tracker.log_soak("long", {}, {"soak_requests": 1000.0}, memory)
    history = book.client.get_metric_history(run, "soak_memory_mb")
    assert (len(history), history[-1].step) == (250, 1000)
    assert all(point.value == point.step for point in history)
    assert book.json(run, "soak.json")["memory_mb"] == memory


def test_a_repeated_attempt_leaves_one_run(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, tags = book.tracker, {"slmops.prefect_flow_run": "one"}
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_text", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(TrackingError, match="the disk is full"):
            tracker.log_soak("twice", tags, {"soak_requests": 30.0}, [1.0] * 30)
    run = tracker.log_soak("twice", tags, {"soak_requests": 30.0}, [1.0] * 30)
    other = tracker.log_soak("twice", {"slmops.prefect_flow_run": "two"}, {"soak_requests": 30.0}, [1.0] * 30)
    experiment = book.client.get_experiment_by_name("twice").experiment_id
    assert {one.info.run_id for one in book.client.search_runs([experiment])} == {run, other}
