"""Retraining to deployment: data, fine-tuning, conversion, gates, promotion, the service, and a watch over it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import flow, runtime

from flows.optimize import optimize
from flows.promote import check_can_wait, make_champion
from flows.running import aborted_on_error, named, plainly, turn
from slmops import preflight
from slmops.core.errors import GateError, ServingError, SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.targets import split
from slmops.core.values import Checkpoint
from slmops.foundry.versions import ModelVersion, Promotion
from slmops.local import stack
from slmops.tracking.registry import Registry
from slmops.tracking.training import TrainingTracker
from slmops.training import data, finetune
from slmops.training.finetune import input_digest
from slmops.training.sources import Fetched
from slmops.training.values import DEFAULT_POLICY, WAITING, Finetuned, Retrain, Retrained, RetrainError, TrainingData
from tasks import retrain as steps
from tasks.prepare import check_environment, get_checkpoint
from tasks.promote import find_version

log = logging.getLogger("slmops.retrain")


@flow(name="retrain", flow_run_name=named("retrain {request.label}"), persist_result=False)
@plainly
def retrain(request: Retrain) -> Retrained:
    """Fine-tune on what is new, convert and measure it, and put it into production if it is better.

    If it fails before the switch, the champion stays as it was; if it fails after it, it is rolled back. If it is
    killed, a worker runs it again (see :mod:`flows.automations`), or the next one with the same input resumes it. If it
    waits for approval, it is suspended: it runs again when somebody has decided, and goes on with the promotion.

    Raises:
        RetrainError: What was made does not stay in production; the error carries the result.
        SlmopsError: What went wrong.
    """
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_can_wait(approval=request.approval)
    preflight.check(_job(request, request.model), settings)
    check_environment(settings)
    tracker = TrainingTracker(stack.tracking_uri(settings))
    checkpoint = get_checkpoint(_job(request, request.model), settings, tracker.uri)
    name = request.name or checkpoint.name
    flow_run = runtime.flow_run.id or ""
    with turn(settings.locks / f"retrain-{name}.lock", f"the retraining of {name!r}"):
        waited = steps.find_waiting(tracker, name, flow_run) if request.approval else None
        if waited is None:
            fetched = steps.fetch_data(request, settings, tracker.uri)
            digest = input_digest(request, checkpoint, data.digest(fetched), fetched.evaluation)
            last = steps.find_last(tracker, name, digest)
            if last is not None:
                why = f"Data, base model and settings are those of the last retraining, which ended as: {last.outcome}."
                log.info("nothing to do: %s", why)
                result = last.model_copy(update={"outcome": "nothing to do", "detail": why, "seconds": {}})
                steps.show_result(result)
                return result
            begun = steps.start_tracking(tracker, name, request, checkpoint, digest, flow_run)
        attempt = _Attempt(request, settings, tracker, waited or begun)
        with aborted_on_error(partial(tracker.abort, attempt.so_far.run_id)):
            result = _go_on(attempt) if waited else _make(attempt, checkpoint, fetched)
            steps.finish_tracking(tracker, result)
        steps.show_result(result)
    if result.outcome != "promoted":
        raise RetrainError(result, attempt.fix)
    return result


@dataclass
class _Attempt:
    """One retraining: what its stages share. They add to the accuracy and the seconds of ``so_far``."""

    request: Retrain
    settings: Settings
    tracker: TrainingTracker
    so_far: Retrained
    fix: str | None = None

    @property
    def name(self) -> str:
        return self.so_far.model

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.so_far.seconds[name] = round(time.monotonic() - begun, 1)

    def job(self, model: str, prepared: TrainingData) -> Job:
        return _job(self.request, model).model_copy(update={"name": self.name, "evaluation_set": prepared.evaluation})

    def ended(self, outcome: str, detail: str) -> Retrained:
        return self.so_far.model_copy(update={"outcome": outcome, "detail": detail})

    def refused(self, error: GateError) -> Retrained:
        self.fix = error.fix
        return self.ended("refused", f"{error.message} The champion stays.")


def _make(attempt: _Attempt, checkpoint: Checkpoint, fetched: Fetched) -> Retrained:
    """All stages; each of them may end it."""
    prepared, finetuned = _train(attempt, checkpoint, fetched)
    accuracy = attempt.so_far.accuracy
    if worse := finetune.worse(accuracy["base"], accuracy["finetuned"]):
        return attempt.ended("refused", worse)
    _measure_champion(attempt, prepared)
    try:
        version = _convert_and_measure(attempt, finetuned, prepared)
    except GateError as error:
        return attempt.refused(error)
    attempt.so_far = attempt.so_far.model_copy(update={"version": version.version, "variant": version.variant})
    if attempt.request.approval:
        waiting = attempt.ended(WAITING, f"{version.label} becomes the champion if somebody approves.")
        steps.track_waiting(attempt.tracker, waiting, time.time() + Promotion(name=attempt.name).approval_timeout_s)
    return _deploy(attempt, version, prepared.evaluation)


def _go_on(attempt: _Attempt) -> Retrained:
    """What is left to do for one that was suspended to wait for approval."""
    version = find_version(attempt.tracker.uri, attempt.name, str(attempt.so_far.version))
    with TemporaryDirectory() as folder:
        evaluation = steps.fetch_evaluation_set(attempt.tracker, attempt.so_far.run_id, Path(folder))
        return _deploy(attempt, version, evaluation)


def _train(attempt: _Attempt, checkpoint: Checkpoint, fetched: Fetched) -> tuple[TrainingData, Finetuned]:
    request, settings, tracker, name = attempt.request, attempt.settings, attempt.tracker, attempt.name
    run_id, accuracy = attempt.so_far.run_id, attempt.so_far.accuracy
    with attempt.stage("data"):
        prepared = steps.check_data(fetched, request, checkpoint, name, settings)
        steps.track_data(tracker, run_id, prepared, data.markdown(prepared))
    with attempt.stage("base model"):
        accuracy["base"] = steps.answer(checkpoint, prepared, request, "base", name, settings)
    with attempt.stage("fine-tune"):
        finetuned = steps.finetune_model(checkpoint, prepared, request, name, settings, tracker, run_id)
        steps.track_training(tracker, run_id, finetuned, settings.logs / name / "finetune.log")
    with attempt.stage("fine-tuned model"):
        accuracy["finetuned"] = steps.answer(finetuned, prepared, request, "finetuned", name, settings)
        steps.track_accuracy(tracker, run_id, accuracy)
    return prepared, finetuned


def _measure_champion(attempt: _Attempt, prepared: TrainingData) -> None:
    """Measure the champion with the same questions as its challenger; if that fails, the promotion says so."""
    uri = attempt.tracker.uri
    champion = steps.find_outdated_champion(uri, attempt.name, prepared, attempt.request, attempt.settings)
    if champion is None:
        return
    log.info("%s was measured with something else: measuring it again", champion.label)
    precision, target = split(champion.variant)
    only = {"precision": [precision], "target": [target]}
    again = attempt.job(champion.tags["slmops.source"], prepared).model_copy(update=only)
    with attempt.stage("measure champion"):
        try:
            optimize(again)
        except SlmopsError as error:
            log.warning("%s could not be measured again: %s", champion.label, error)


def _convert_and_measure(attempt: _Attempt, finetuned: Finetuned, prepared: TrainingData) -> ModelVersion:
    """The variants of the fine-tuned checkpoint; returns the version that was chosen."""
    refused: GateError | None = None
    with attempt.stage("convert and measure"):
        try:
            comparison = optimize(attempt.job(str(finetuned.merged), prepared))
        except GateError as error:
            if error.comparison is None:
                raise
            refused, comparison = error, error.comparison
        measured = (one for one in comparison.variants if "accuracy" in one.measurements)
        attempt.so_far.accuracy.update({one.name: one.measurements["accuracy"] for one in measured})
        steps.link(attempt.tracker, attempt.so_far.run_id, comparison)
    if refused is not None:
        raise refused
    chosen = next(one for one in comparison.variants if one.name == comparison.choice.variant)
    return find_version(attempt.tracker.uri, attempt.name, str(chosen.version))


def _deploy(attempt: _Attempt, version: ModelVersion, evaluation: Path) -> Retrained:
    """Promote the version, have it served, and watch it. If it does not hold, roll it back."""
    request, settings, uri = attempt.request, attempt.settings, attempt.tracker.uri
    promotion = Promotion(name=version.name, version=version.version, approval=request.approval)
    with attempt.stage("promote"):
        try:
            make_champion(promotion, settings, uri)
        except GateError as error:
            return attempt.refused(error)
    served = against = None
    with attempt.stage("switch"):
        try:
            served = steps.switch_service(version, request, settings, uri)
        except ServingError as error:
            against = error.message
    if served is not None and request.watch_s:
        url, serving = served
        with attempt.stage("watch"):
            measured = attempt.so_far.accuracy.get(serving.variant)
            watched = steps.watch_service(url, serving, request, evaluation, measured, settings)
        if watched.held:
            return attempt.ended("promoted", f"It is the champion now, served at {url}. {watched.detail}")
        against = watched.detail
    if against is None:
        where = f", served at {served[0]}." if served else ". Nothing serves it on this machine, so it was not watched."
        return attempt.ended("promoted", f"{version.label} is the champion now{where}")
    with attempt.stage("roll back"):
        now = steps.roll_back(Registry(uri), version, against)
        if now is not None and served is not None:
            steps.switch_back(served[0], now, uri)
    back = f"{now.label} is the champion again" if now else "nothing was deployed before, so it stays the champion"
    return attempt.ended("rolled back", f"{against} So {back}.")


def _job(request: Retrain, model: str) -> Job:
    return Job(
        model=model,
        precision=request.precision,
        target=request.target,
        policy=request.policy or DEFAULT_POLICY,
        matcher=request.matcher,
        quick=request.quick,
    )
