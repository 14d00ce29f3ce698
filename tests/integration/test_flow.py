"""The whole job as a Prefect flow on a tiny model, with a Prefect server of the tests' own and MLflow in a file."""

import contextvars
import json
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.flow_engine import run_flow

from flows.optimize import optimize
from flows.prepare_environment import prepare_environment
from slmops.conversion import store
from slmops.core import machine
from slmops.core.errors import GateError, PrerequisiteError, UsageError, WorkError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Comparison
from slmops.evaluation import speed
from slmops.processes import children
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from tests import making
from tests.shown import artifacts, flow_runs
from tests.tracked import read

pytestmark = pytest.mark.integration

NAME, KEY = "Tiny_F", "tiny-f"  # Prefect's artifact keys take neither upper case nor underscores
KEYS = ["name", "status", "reason", "path", "foundry_id", "run_id", "version"]
JUDGED = ["measurements", "gates", "dominated_by", "extent"]
# Random weights at 4 bits are far from what they were.
POLICY = """
preference: [int4, int8]
gates: [{metric: perplexity, of: ratio, to: baseline, max: 3}]
"""


@pytest.fixture(scope="module")
def job(talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    inputs = tmp_path_factory.mktemp("inputs")
    (inputs / "policy.yaml").write_text(POLICY)
    asked = {"evaluation_set": making.evaluation_set(inputs), "policy": inputs / "policy.yaml"}
    return making.job(talkative, name=NAME, precision=["int4", "int8"], **asked)


@dataclass
class First:
    """The first run of the job, and one with another policy that waited for it, and measured and chose nothing."""

    comparison: Comparison
    second: Comparison
    waiting: State[Any]


@pytest.fixture(scope="module")
def first(settings: Settings, job: Job, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> First:
    making.place(("int8", "int4"), job, stock, settings.home)
    impossible = tmp_path_factory.mktemp("policy") / "impossible.yaml"
    impossible.write_text("gates: [{metric: size_mb, max: 0.000001}]")
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "DISTURBED", math.inf)  # figures from a busy machine would not be taken over
        # Prefect keeps its settings in context variables.
        running = pool.submit(contextvars.copy_context().run, optimize, job.model_copy(update={"upload": True}))
        log = settings.logs / NAME / "fp32.olive.log"
        while not (running.done() or log.exists()):
            time.sleep(0.05)
        asked = job.model_copy(update={"policy": impossible})
        said = "No variant passes the policy's gates"
        second = pool.submit(contextvars.copy_context().run, unsuccessful, asked, GateError, said)
        waiting = None
        while waiting is None and not second.done():
            time.sleep(0.2)
            states = [run.state for run in flow_runs("optimize") if run.state is not None]
            waiting = next((state for state in states if state.name == "Waiting"), None)
        assert waiting is not None
        assert not running.done()
        return First(running.result(), second.result(), waiting)


def task_runs(run: FlowRun) -> dict[str, str]:
    """Name to state."""
    with get_client(sync_client=True) as client:
        made = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), limit=100)
    return {one.name: str(one.state_name) for one in made}


def unsuccessful(job: Job, kind: type[GateError | WorkError], said: str) -> Comparison:
    """The comparison that comes with the error of a job."""
    with pytest.raises(kind, match=said) as caught:
        optimize(job)
    return caught.value.comparison


def test_the_comparison_has_the_promised_form_and_is_stored(first: First, settings: Settings, tmp_path: Path) -> None:
    kept = read(MlflowClient(settings.tracking_uri), first.comparison.run_id, "comparison.json", tmp_path)
    assert Comparison.model_validate_json(kept) == first.comparison
    shown = json.loads(first.comparison.model_dump_json())
    assert list(shown) == ["model", "run_id", "choice", "variants", "baseline", "room", "measured_earlier", "peers"]
    assert shown["baseline"] is None  # it is one of the variants
    assert shown["model"] == NAME
    assert list(shown["choice"]) == ["variant", "reason"]
    assert [variant["name"] for variant in shown["variants"]] == ["fp32", "int4", "int8"]
    for variant in shown["variants"]:
        assert list(variant) == [*KEYS, "metrics", *JUDGED]
        assert (variant["status"], variant["reason"]) == ("ok", None)
        assert variant["foundry_id"] == f"{NAME}-{variant['name']}-generic-cpu:1"
        assert Path(variant["path"]).parent == settings.variants
        stored = store.load(Path(variant["path"]))
        assert stored.name == variant["name"]
        assert variant["metrics"].keys() == {*making.UNITS, *making.RELATIVE_UNITS}
        assert all(isinstance(value, float) and math.isfinite(value) for value in variant["metrics"].values())
        assert variant["measurements"].keys() == variant["metrics"].keys()
        assert [(gate["metric"], gate["outcome"]) for gate in variant["gates"]] == [("perplexity", "pass")]
    metrics = {result.name: result.metrics for result in first.comparison.variants}
    for of_it in metrics.values():  # all are compared with the baseline
        assert of_it["size_ratio"] == pytest.approx(of_it["size_mb"] / metrics["fp32"]["size_mb"])
        assert of_it["perplexity_ratio"] == pytest.approx(of_it["perplexity"] / metrics["fp32"]["perplexity"])
    assert first.comparison.choice.variant == "int4"
    assert first.comparison.choice.reason.startswith("int4 is taken, the first in order of preference ")


def test_what_the_job_took_is_logged_and_with_upload_the_weights_are_in_the_registry(
    first: First, settings: Settings
) -> None:
    took, fp32 = first.comparison.room, first.comparison.variants[0]
    of_olive = fp32.metrics["convert_memory_peak_mb"]  # this variant was made in this job
    assert of_olive < took.memory_peak_mb < 10_000  # its own process comes on top
    assert 0 < took.disk_peak_mb < 1000
    logged = MlflowClient(settings.tracking_uri).get_run(first.comparison.run_id).data.metrics
    assert {name: logged[f"job_{name}"] for name in took.model_dump()} == pytest.approx(took.model_dump())
    uploaded = Registry(settings.tracking_uri or "").find(NAME, "fp32")
    assert (fp32.version, uploaded.uploaded) == (uploaded.version, True)
    weights = {name: (fp32.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}
    assert {name: (Path(uploaded.location) / name).stat().st_size for name in weights} == weights


def test_what_prefect_shows(first: First, settings: Settings, job: Job) -> None:
    run = flow_runs("optimize")[0]
    logged = MlflowClient(settings.tracking_uri).get_run(first.comparison.run_id).data.metrics
    named = {name.removeprefix("stage_").removesuffix("_s") for name in logged if name.startswith("stage_")}
    assert named >= {"convert_variant", "register_variant", "measure_speed", "measure_quality", "log_variant"}
    assert sum(logged[f"stage_{name}_s"] for name in named) < logged["job_s"] < run.total_run_time.total_seconds() + 1
    assert 0 < logged["job_orchestration_s"] < logged["job_s"] - logged["stage_measure_speed_s"]
    assert (run.name, run.state_name) == (f"optimize {job.label}", "Completed")
    assert run.parameters["job"]["export_tolerance"] == 1e-3  # defaults included: it can be started again as it was
    stages = ("convert", "register", "measure quality of", "track")
    made = {f"{what} {name}" for what in stages for name in ("fp32", "int4", "int8")} | {"measure speed"}
    tasks = task_runs(run)
    assert made < tasks.keys()
    assert set(tasks.values()) == {"Completed"}

    shown = artifacts(run)
    assert shown.keys() == {f"{kind}-{KEY}" for kind in ("progress", "report", "metrics", "mlflow")}
    assert shown[f"progress-{KEY}"] == 100
    report = shown[f"report-{KEY}"]
    assert all(f"| {name} " in report for name in ("fp32", "int4", "int8"))
    assert first.comparison.choice.reason in report
    assert first.comparison.room.text in report
    page = Tracker(settings.tracking_uri or "").run_url(first.comparison.run_id)
    assert f"[MLflow run]({page})" in report
    assert page in shown[f"mlflow-{KEY}"]
    rows = json.loads(shown[f"metrics-{KEY}"])
    assert [(row["variant"], row["status"]) for row in rows] == [(name, "ok") for name in ("fp32", "int4", "int8")]
    for row, result in zip(rows, first.comparison.variants, strict=True):
        assert {name: row[name] for name in result.metrics} == pytest.approx(result.metrics, abs=1e-4)


def test_a_second_run_of_the_same_model_waits_in_a_visible_state_and_where_no_variant_passes_nothing_is_chosen(
    first: First, settings: Settings
) -> None:
    assert first.waiting.type == StateType.RUNNING
    assert f"Another run holds the job of '{NAME}' (process {os.getpid()}" in (first.waiting.message or "")
    done, waited = flow_runs("optimize")[:2]
    assert [done.state_name, waited.state_name] == ["Completed", "Failed"]
    choice, variants = first.second.choice, first.second.variants
    assert [(result.status, result.gates[0].outcome) for result in variants] == [("ok", "fail")] * 3
    assert choice.variant is None
    assert all(name in choice.reason for name in ("fp32", "int8", "size_mb"))
    with get_client(sync_client=True) as client:
        states = [state.name for state in client.read_flow_run_states(waited.id)]
    assert states[-4:] == ["Running", "Waiting", "Running", "Failed"]
    client = MlflowClient(settings.tracking_uri)
    before, after = (client.get_run(one.run_id) for one in (first.comparison, first.second))
    assert [before.info.status, after.info.status] == ["FINISHED", "FINISHED"]
    assert before.info.end_time <= after.info.start_time
    assert after.data.tags["slmops.choice"] == "none"
    assert not settings.work(NAME).exists()


def test_an_unchanged_job_takes_over_what_was_measured_and_says_so(first: First, settings: Settings) -> None:
    earlier = first.second.measured_earlier
    assert (first.comparison.measured_earlier, [*earlier]) == ({}, ["speed", "quality"])
    for before, after in zip(first.comparison.variants, first.second.variants, strict=True):
        assert after.measurements == before.measurements
        tags = MlflowClient(settings.tracking_uri).get_run(after.run_id).data.tags
        assert [tags[f"slmops.measured_earlier.{what}"] for what in earlier] == [
            when.isoformat() for when in earlier.values()
        ]
    run = flow_runs("optimize")[1]
    assert not [name for name in task_runs(run) if name.startswith(("measure", "score"))]
    assert f"measured speed on {earlier['speed']:%Y-%m-%d at %H:%M} UTC" in artifacts(run)[f"report-{KEY}"]


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("given", "kept"), [("Before the Friday meeting", True), (None, False), ("happy-owl", False)])
def test_bad_input_from_the_form_ends_as_one_message_and_a_typed_name_stays(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, given: str | None, kept: bool
) -> None:
    bad = {"model": str(tmp_path / "nowhere"), "policy": str(tmp_path / "none.toml"), "matcher": "none.py:f"}
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(flow_id=client.create_flow(optimize), name="form")
        run = client.create_flow_run_from_deployment(deployment, parameters={"job": bad}, name=given)
        with pytest.raises(UsageError):
            run_flow(optimize, flow_run=run)
        ended = client.read_flow_run(run.id)
    assert ended.state.is_failed()
    assert all(one in (ended.state.message or "") for one in ("nowhere", "none.toml", "none.py"))
    assert ended.name == (given if kept else f"optimize {bad['model']}")
    assert task_runs(ended) == {}
    assert not [record for record in caplog.records if record.exc_info]
    assert len([message for message in caplog.messages if "none.toml" in message]) == 1


def test_failing_precisions_leave_the_others_and_without_a_baseline_nothing_is_chosen(
    first: First,
    settings: Settings,
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "slmops")

    def kill(_mb: float) -> None:
        for process in making.workers("int4.olive.log"):
            process.kill()

    monkeypatch.setattr(children, "watchers", [kill])
    config = tmp_path / "half.json"  # which Olive takes, and of which it makes nothing
    passes = {"export": {"type": "ModelBuilder", "precision": "fp16"}}
    config.write_text(json.dumps({"input_model": {"model_path": job.model}, "passes": passes}))
    update = {"model": "", "precision": ["int4", "int8"], "int4_block_size": 64, "olive_config": config}
    asked = job.model_copy(update={**update, "export_tolerance": 1e-12})
    comparison = unsuccessful(asked, WorkError, r"3 of 4 variants failed: fp32, int4, half\.")
    results = {result.name: result for result in comparison.variants}
    statuses = {name: result.status for name, result in results.items()}
    assert statuses == {"fp32": "failed", "int4": "failed", "int8": "ok", "half": "failed"}
    assert "differs from the checkpoint by" in (results["fp32"].reason or "")
    assert store.load(first.comparison.variants[0].path) is not None  # it stays for others
    assert "The process was killed by SIGKILL" in (results["int4"].reason or "")
    reason = "half: Olive produced no model. FP16 is not supported on CPU."
    assert (results["half"].reason or "").startswith(reason)
    assert (results["half"].path, results["half"].foundry_id, results["half"].metrics) == (None, None, {})
    int8 = results["int8"]
    assert int8.metrics.keys() == making.UNITS.keys()  # none that is relative to what is not there
    assert comparison.choice.variant is None
    assert "no fp32 baseline" in comparison.choice.reason
    # What the first run made is used again: folder and registration.
    [before] = (result for result in first.comparison.variants if result.name == "int8")
    assert (int8.path, int8.foundry_id) == (before.path, before.foundry_id)
    assert int8.run_id != before.run_id
    assert any(message.startswith("int8: unchanged since it was converted") for message in caplog.messages)

    client = MlflowClient(settings.tracking_uri)
    parent, killed, failed = (
        client.get_run(run) for run in (comparison.run_id, results["int4"].run_id, results["half"].run_id)
    )
    assert (killed.info.status, killed.data.tags["slmops.reason"]) == ("FAILED", results["int4"].reason)
    assert (parent.info.status, failed.info.status) == ("FAILED", "FAILED")
    assert failed.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert failed.data.tags["slmops.reason"].startswith(reason)
    assert [entry.path for entry in client.list_artifacts(failed.info.run_id, "logs")] == ["logs/half.olive.log"]
    assert Tracker(settings.tracking_uri or "").latest(NAME) == comparison

    run = flow_runs("optimize")[-1]
    assert run.state_name == "Failed"
    assert "3 of 4 variants failed: fp32, int4, half." in str(run.state.message if run.state else "")
    shown = artifacts(run)
    assert shown[f"progress-{KEY}"] == 100
    assert f"half failed: {reason}" in shown[f"report-{KEY}"]
    assert "int4 failed: The process was killed by SIGKILL" in shown[f"report-{KEY}"]
    assert task_runs(run)["convert half"] == "Failed"
    assert not settings.work(NAME).exists()


@pytest.mark.usefixtures("settings")
def test_prepare_environment_shows_every_check_and_fails_if_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One in which none does: test_compose.py."""
    monkeypatch.setattr(machine, "PACKAGES", ("tabulate", "psutil"))
    (tmp_path / "tabulate.py").write_text("raise ImportError('spoiled')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(PrerequisiteError, match="spoiled"):
        prepare_environment()
    rows = json.loads(artifacts(flow_runs("prepare-environment")[-1])["environment"])
    status = {row["check"]: row["status"] for row in rows}
    assert status.keys() >= {"Python", "memory", "disk", "CPU", "psutil", "MLflow server"}
    assert (status["tabulate"], status["psutil"]) == ("failure", "ok")
