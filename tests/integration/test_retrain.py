"""Retraining to deployment on a tiny model: the flow, its records, what stops it, and the way back."""

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import httpx
import pytest
from mlflow import MlflowClient
from prefect import resume_flow_run

from flows.retrain import retrain
from slmops.core.errors import DataError, PrerequisiteError, TrainingError, UsageError
from slmops.core.settings import Settings
from slmops.core.values import Measurement
from slmops.foundry.versions import reigns
from slmops.processes import children
from slmops.serving import home_service
from slmops.serving.limits import Serve
from slmops.tracking.registry import Registry
from slmops.tracking.training import TrainingTracker
from slmops.training import finetune
from slmops.training.values import WAITING, Retrained, RetrainError
from tests import deployed, making, retraining, values
from tests.shown import artifacts, flow_runs
from tests.tracked import read

pytestmark = pytest.mark.integration

NAME = "router"
FIRST_PORT = 15273  # not where other tests' services look for a free one


@pytest.fixture(scope="module", autouse=True)
def at_work(settings: Settings) -> Iterator[dict[str, set[bool]]]:
    """Each module whose work was called, and whether this machine was held meanwhile."""
    found: dict[str, set[bool]] = defaultdict(set)
    with pytest.MonkeyPatch.context() as patch:
        making.work_in_process(patch)
        call = children.call

        def noted(handle: Any, request: Any, **how: Any) -> Any:
            found[handle.__module__.rpartition(".")[2]].add(holds_machine(settings))
            return call(handle, request, **how)

        patch.setattr(children, "call", noted)
        yield found


def holds_machine(settings: Settings) -> bool:
    try:
        holder = json.loads(settings.machine_lock.with_suffix(".json").read_text())
    except FileNotFoundError:
        return False
    return bool(holder["pid"] == os.getpid())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retraining")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return retraining.base(folder / "model")


@pytest.fixture(scope="module")
def suspended(settings: Settings, model: Path, folder: Path) -> UUID:  # noqa: ARG001 - the servers
    """A run of the first retraining, which waits for a person's approval."""
    data = retraining.write_data(folder / "data")
    run = deployed.start(retrain, retraining.request(model, data, NAME, serve=True, approval=True))
    assert deployed.work(retrain, run) is None
    return run


@pytest.fixture(scope="module")
def first(settings: Settings, suspended: UUID) -> Iterator[Retrained]:
    """The first retraining, approved; it starts the service."""
    resume_flow_run(suspended, run_input={"promote": True, "approver": "Ada", "reason": "I have looked"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home_service, "Serve", lambda: Serve(port=FIRST_PORT))
        yield deployed.work(retrain, suspended)
    home_service.stop(settings)


def champion(settings: Settings) -> int:
    return Registry(settings.tracking_uri).champion(NAME).version


def served(settings: Settings) -> httpx.Response:
    url = home_service.status(settings.home).url
    body = {"model": NAME, "messages": [{"role": "user", "content": "Who repairs the login?"}], "max_tokens": 4}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def questions(lines: str) -> list[str]:
    return sorted(json.loads(line)["messages"][0]["content"] for line in lines.splitlines())


def test_a_promotion_waits_for_a_person(suspended: UUID, settings: Settings, model: Path, folder: Path) -> None:
    assert deployed.state(suspended).name == "Suspended"
    assert Registry(settings.tracking_uri).champion(NAME) is None
    # The data have been used, whether by somebody who waits for a decision or not.
    again = retrain(retraining.request(model, folder / "data", NAME, serve=True))
    assert (again.outcome, again.detail[-21:]) == ("nothing to do", "waiting for approval.")


def test_what_was_learnt_is_served(first: Retrained, suspended: UUID, settings: Settings) -> None:
    assert (first.model, first.outcome, first.version) == (NAME, "promoted", champion(settings))
    assert list(first.accuracy) == ["base", "finetuned", "fp32"]
    assert first.accuracy["base"].value == 0
    assert first.accuracy["finetuned"].value == first.accuracy["fp32"].value == 1
    stages = "data, base model, fine-tune, fine-tuned model, convert and measure, promote, switch, watch"
    assert list(first.seconds) == stages.split(", ")
    assert deployed.state(suspended).is_completed()
    answer = served(settings)
    assert answer.json()["choices"][0]["message"]["content"] == "ok"
    assert answer.headers["x-slmops-version"] == str(first.version)


def test_what_mlflow_and_prefect_have_of_it(first: Retrained, settings: Settings, folder: Path, tmp_path: Path) -> None:
    client = MlflowClient(settings.tracking_uri)
    # From the endpoint back to the lines.
    version = client.get_model_version(NAME, served(settings).headers["x-slmops-version"])
    run = client.get_run(version.tags["slmops.retrain_run"])
    assert run.info.run_id == first.run_id
    assert version.tags["slmops.approved"] == "I have looked"
    reign = reigns(Registry(settings.tracking_uri).versions(NAME))[0]
    assert (reign.promoter, reign.reason[-30:]) == ("retrain, started by retrain", "approved by Ada: I have looked")
    assert (reign.data, reign.data_digest) == (str(folder / "data"), version.tags["slmops.data_digest"])
    assert reign.checkpoint == run.data.tags["slmops.source"]
    given = (read(client, first.run_id, f"data/{part}.jsonl", tmp_path) for part in ("train", "validation"))
    assert questions("".join(given)) == questions((folder / "data" / "train.jsonl").read_text())
    assert run.data.params["data_digest"] == version.tags["slmops.data_digest"]
    job = client.get_run(version.tags["slmops.job_run"])
    assert job.data.tags["mlflow.parentRunId"] == run.info.run_id

    assert run.info.status == "FINISHED"
    assert run.data.tags["slmops.outcome"] == "promoted"
    for name in ("curves/train_loss", "curves/validation_loss"):
        losses = [one.value for one in sorted(client.get_metric_history(first.run_id, name), key=lambda one: one.step)]
        assert len(losses) >= 6
        assert losses[-1] < losses[0] / 5
    assert run.data.metrics["accuracy_base"] == 0
    assert run.data.metrics["accuracy_fp32"] == first.accuracy["fp32"].value
    assert run.data.params["training.learning_rate"] == "0.02"
    assert {file.path for file in client.list_artifacts(first.run_id)} >= {"adapter", "data", "logs", "training.json"}
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"training data", "evaluation set"}

    flow_run = flow_runs("retrain")[0]
    assert flow_run.state_name == "Completed"
    shown = artifacts(flow_run, processes=2)
    assert {f"{kind}-{NAME}" for kind in ("data", "training", "retraining")} <= shown.keys()
    assert shown[f"training-{NAME}"] == 100.0
    assert "promoted" in shown[f"retraining-{NAME}"]


def test_only_what_loads_the_machine_holds_it(first: Retrained, at_work: dict[str, set[bool]]) -> None:
    """So two models share a machine: neither is measured while the other trains, converts or is measured."""
    assert first.outcome == "promoted"
    held, free = ({name for name, known in at_work.items() if known == {one}} for one in (True, False))
    assert held == {"answers_worker", "finetune_worker", "olive_worker", "verify_worker", "speed", "logits_worker"}
    assert free == {"agreement_worker", "tokens_worker", "register_worker"}


def test_the_same_again_is_nothing_to_do(first: Retrained, settings: Settings, model: Path, folder: Path) -> None:
    again = retrain(retraining.request(model, folder / "data", NAME, serve=True))
    assert (again.outcome, again.version, again.run_id) == ("nothing to do", first.version, first.run_id)
    assert again.detail.endswith("ended as: promoted.")
    assert len(TrainingTracker(settings.tracking_uri)._runs(NAME)) == 1


def test_a_model_that_learnt_nonsense_is_refused(
    first: Retrained, settings: Settings, model: Path, folder: Path
) -> None:
    data = retraining.write_data(folder / "nonsense", answer="no")
    with pytest.raises(RetrainError) as caught:
        retrain(retraining.request(model, data, NAME))
    result = caught.value.result
    assert (result.outcome, result.accuracy["finetuned"].value) == ("refused", 0)
    assert "measure champion" not in result.seconds  # it was measured with the same
    assert champion(settings) == first.version
    # It has been dealt with: the same data again are nothing to do.
    assert retrain(retraining.request(model, data, NAME)).outcome == "nothing to do"


def test_a_model_that_got_worse_is_not_even_converted(
    settings: Settings, first: Retrained, model: Path, folder: Path
) -> None:
    # Whatever the base says is right, and what it learns is not; that fine-tuning is there already.
    data = retraining.write_data(folder / "unlearn", answer="no", expected=r"\A(?!\s*no)", match="regex")
    with pytest.raises(RetrainError) as caught:
        retrain(retraining.request(model, data, NAME))
    result = caught.value.result
    assert (result.outcome, result.accuracy["base"].value, result.accuracy["finetuned"].value) == ("refused", 1, 0)
    assert "convert and measure" not in result.seconds
    assert champion(settings) == first.version


def test_what_stops_it_before_any_work(first: Retrained, settings: Settings, model: Path, folder: Path) -> None:
    data, poisoned = folder / "data", retraining.write_data(folder / "poisoned")
    with (poisoned / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"\n')
    wrong = {"policy": folder / "no.toml", "matcher": "no.py:right"}
    for items, changes, error, said in (
        (data, wrong, UsageError, r"(?s)(?=.*no\.toml).*no\.py"),  # all that is wrong is said at once
        (poisoned, {}, DataError, r"train\.jsonl.*28"),
        (data, {"approval": True}, PrerequisiteError, "."),  # only a run of a deployment can wait for it
    ):
        with pytest.raises(error, match=said):
            retrain(retraining.request(model, items, NAME, **changes))
    assert champion(settings) == first.version


def test_a_training_that_diverges_stops_it(
    first: Retrained, settings: Settings, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It really does in the tests of the fine-tuning.
    monkeypatch.setattr(finetune, "finetune", mock.Mock(side_effect=TrainingError("It diverged.", "Lower the rate.")))
    with pytest.raises(TrainingError, match="diverged"):
        retrain(retraining.request(model, folder / "data", NAME, quick=False))
    assert champion(settings) == first.version
    newest = TrainingTracker(settings.tracking_uri)._runs(NAME)[0]
    assert newest.info.status == "FAILED"
    assert "diverged" in newest.data.tags["mlflow.note.content"]


def test_a_version_that_fails_in_service_is_rolled_back(
    first: Retrained, settings: Settings, model: Path, folder: Path
) -> None:
    """The new version answers as the evaluation wants it, until it is served.

    That its evaluation set is another keeps nothing from being compared: the champion answers it, too.
    """
    data = retraining.write_data(folder / "fails-later", answer="no", expected="no")
    fails = retraining.spoilt(data)

    def spoil() -> None:
        while served(settings).headers["x-slmops-version"] == str(first.version):
            time.sleep(0.2)
        fails.touch()

    spoiler = threading.Thread(target=spoil, daemon=True)
    spoiler.start()
    with pytest.raises(RetrainError) as caught:
        retrain(retraining.request(model, data, NAME, precision=["fp32", "fp16"], target=["cpu", "webgpu"]))
    spoiler.join()
    fails.unlink()
    result = caught.value.result
    assert result.outcome == "rolled back"
    assert result.version != first.version
    assert "measure champion" in result.seconds
    versions = {version.version: version for version in Registry(settings.tracking_uri).versions(NAME)}
    (other,) = versions[result.version].others  # one release for both targets
    assert versions[int(other)].variant == "fp16-webgpu"
    assert champion(settings) == first.version
    assert served(settings).headers["x-slmops-version"] == str(first.version)
    tags = MlflowClient(settings.tracking_uri).get_model_version(NAME, str(result.version)).tags
    assert "worse than measured" in tags["slmops.withdrawn"]


def test_what_nobody_decided_about_is_refused(settings: Settings) -> None:
    tracker = TrainingTracker(settings.tracking_uri)
    begun = tracker.start("late", retraining.request(Path("x"), Path("x"), "late"), values.checkpoint(), "a", "flow")
    found = {"version": 3, "accuracy": {"fp32": Measurement(value=0.5, unit="1")}, "seconds": {"data": 1.5}}
    waiting = begun.model_copy(update={"outcome": WAITING, **found})
    tracker.wait(waiting, time.time() + 60)
    assert tracker.last("late", "a") == waiting == tracker.waiting("late", "flow")
    assert tracker.waiting("late", "another flow") is None
    tracker.wait(waiting, time.time() - 1)
    assert (tracker.last("late", "a") or waiting).outcome == "refused"
    assert tracker.waiting("late", "flow") is None


def test_the_last_retraining_is_the_last_whatever_the_clock_says(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = TrainingTracker(settings.tracking_uri)
    request = retraining.request(Path("x"), Path("x"), "clock")
    now = time.time

    def attempt(digest: str) -> Retrained:
        begun = tracker.start("clock", request, values.checkpoint(), digest, "flow")
        tracker.finish(begun)
        return begun

    attempt("a")
    monkeypatch.setattr(time, "time", lambda: now() - 86400)  # set back by a day
    assert attempt("b") == tracker.last("clock", "b")
    assert tracker.last("clock", "a") is None
