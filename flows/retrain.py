"""Retraining to deployment: data, fine-tuning, conversion, gates, promotion, the service, and a watch over it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect import flow, runtime

from flows.optimize import optimize
from flows.promote import promote
from slmops.core import locks
from slmops.core.errors import GateError, ServingError, SlmopsError, TrackingError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Comparison, Measurement
from slmops.foundry.versions import ModelVersion, Promotion
from slmops.local import stack
from slmops.tracking.training import TrainingTracker
from slmops.training import data, outcome
from slmops.training.fingerprint import input_digest
from slmops.training.outcome import RetrainError
from slmops.training.sources import Fetched
from slmops.training.values import Finetuned, Retrain, Retrained, TrainingData
from tasks.checkpoint import get_checkpoint
from tasks.environment import check_environment
from tasks.remeasure import find_version
from tasks.retrain import (
    find_last,
    find_outdated_champion,
    finish_tracking,
    link,
    roll_back,
    show_result,
    start_tracking,
    switch_back,
    switch_service,
    track_accuracy,
    track_data,
    track_training,
    watch_service,
)
from tasks.train import answer, check_data, fetch_data, finetune_model

log = logging.getLogger("slmops.retrain")


@flow(name="retrain", flow_run_name="retrain {request.label}", persist_result=False)
def retrain(request: Retrain) -> Retrained:
    """Fine-tune on what is new, convert and measure it, and put it into production if it is better.

    Whatever fails before the switch leaves the champion as it was; what fails after it is rolled back. An attempt that
    was killed is taken up again by the next one with the same input.

    Raises:
        RetrainError: What was made does not stay in production; the error carries the result.
        SlmopsError: What went wrong.
    """
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    checkpoint = get_checkpoint(_job(request, request.model), settings, uri)
    name = request.name or checkpoint.name
    with locks.exclusive(settings.locks / f"retrain-{name}.lock", f"the retraining of {name!r}", wait=False):
        fetched = fetch_data(request, settings, uri)
        digest = input_digest(request, checkpoint, data.digest(fetched), fetched.evaluation)
        last = find_last(uri, name, digest)
        if last is not None:
            return _nothing_new(last)
        run_id = start_tracking(uri, name, request, checkpoint, digest, runtime.flow_run.id or "")
        with _closed_if_failed(uri, run_id):
            work = _Retraining(request, name, digest, run_id, settings, uri)
            result = work.run(checkpoint, fetched)
            finish_tracking(uri, result)
        show_result(result)
    if result.outcome != "promoted":
        raise RetrainError(result, work.fix)
    return result


class _Retraining:
    """One attempt: what its stages share, and how long each took."""

    def __init__(self, request: Retrain, name: str, digest: str, run_id: str, settings: Settings, uri: str) -> None:
        self.request = request
        self.name = name
        self.settings = settings
        self.uri = uri
        self.run_id = run_id
        self.fix: str | None = None
        self._digest = digest
        self._seconds: dict[str, float] = {}
        self._accuracy: dict[str, Measurement] = {}

    def run(self, checkpoint: Checkpoint, fetched: Fetched) -> Retrained:
        """All stages, each of which may end it."""
        prepared, finetuned = self._train(checkpoint, fetched)
        if worse := outcome.worse(self._accuracy["base"], self._accuracy["finetuned"]):
            return self._result("refused", worse)
        self._measure_champion(prepared)
        with self._stage("convert and measure"):
            try:
                comparison = optimize(self._job(str(finetuned.merged), prepared))
            except GateError as error:
                if error.comparison is None:
                    raise
                self._compared(error.comparison)
                self.fix = error.fix
                return self._result("refused", f"{error.message} The champion stays.")
            self._compared(comparison)
        chosen = next(one for one in comparison.variants if one.name == comparison.choice.variant)
        version = find_version(self.uri, self.name, str(chosen.version))
        with self._stage("promote"):
            try:
                promote(Promotion(name=self.name, version=version.version, approval=self.request.approval))
            except GateError as error:
                self.fix = error.fix
                return self._result("refused", f"{error.message} The champion stays.", version)
        return self._deploy(version, prepared, chosen.measurements.get("accuracy"))

    def _train(self, checkpoint: Checkpoint, fetched: Fetched) -> tuple[TrainingData, Finetuned]:
        request, name, settings = self.request, self.name, self.settings
        with self._stage("data"):
            prepared = check_data(fetched, request, checkpoint, name, settings)
            track_data(self.uri, self.run_id, prepared)
        with self._stage("base model"):
            self._accuracy["base"] = answer(checkpoint, prepared, request, "base", name, settings)
        with self._stage("fine-tune"):
            finetuned = finetune_model(checkpoint, prepared, request, name, settings, self.uri, self.run_id)
            track_training(self.uri, self.run_id, finetuned, settings.logs / name / "finetune.log")
        with self._stage("fine-tuned model"):
            self._accuracy["finetuned"] = answer(finetuned, prepared, request, "finetuned", name, settings)
            track_accuracy(self.uri, self.run_id, self._accuracy)
        return prepared, finetuned

    def _measure_champion(self, prepared: TrainingData) -> None:
        """Measure the champion with what its challenger will be measured with; the same files stay the same version.

        If that does not work nothing compares, and the promotion will say so.
        """
        champion = find_outdated_champion(self.uri, self.name, prepared, self.request, self.settings)
        if champion is None:
            return
        log.info("%s was measured with something else: measuring it again", champion.label)
        again = self._job(champion.tags["slmops.source"], prepared).model_copy(update={"precision": [champion.variant]})
        with self._stage("measure champion"):
            try:
                optimize(again)
            except SlmopsError as error:
                log.warning("%s could not be measured again: %s", champion.label, error)

    def _compared(self, comparison: Comparison) -> None:
        self._accuracy |= outcome.accuracies(self._accuracy["base"], self._accuracy["finetuned"], comparison)
        link(self.uri, self.run_id, comparison)

    def _deploy(self, version: ModelVersion, prepared: TrainingData, measured: Measurement | None) -> Retrained:
        """The new champion is promoted: have it served, and watch it."""
        against = None
        url = None
        with self._stage("switch"):
            try:
                url = switch_service(version, self.request, self.settings, self.uri)
            except ServingError as error:
                against = error.message
        if url is None and against is None:
            said = f"{version.label} is the champion now. Nothing serves it on this machine, so it was not watched."
            return self._result("promoted", said, version)
        if url is not None and self.request.watch_s:
            with self._stage("watch"):
                watched = watch_service(url, version, self.request, prepared, measured, self.settings)
            if watched.held:
                return self._result("promoted", f"It is the champion now, served at {url}. {watched.detail}", version)
            against = watched.detail
        if against is None:
            return self._result("promoted", f"{version.label} is the champion now, served at {url}.", version)
        with self._stage("roll back"):
            now = roll_back(self.uri, version, against)
            if now is not None and url is not None:
                switch_back(url, now, self.uri)
        back = f"{now.label} is the champion again" if now else "nothing was deployed before, so it stays the champion"
        return self._result("rolled back", f"{against} So {back}.", version)

    def _job(self, model: str, prepared: TrainingData) -> Job:
        job = _job(self.request, model)
        return job.model_copy(update={"name": self.name, "evaluation_set": prepared.evaluation})

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = round(time.monotonic() - begun, 1)

    def _result(self, ended: str, detail: str, version: ModelVersion | None = None) -> Retrained:
        return Retrained.model_validate(
            {
                "model": self.name,
                "outcome": ended,
                "detail": detail,
                "input_digest": self._digest,
                "run_id": self.run_id,
                "version": version.version if version else None,
                "variant": version.variant if version else None,
                "accuracy": self._accuracy,
                "seconds": self._seconds,
                "url": TrainingTracker(self.uri).run_url(self.run_id),
            }
        )


def _job(request: Retrain, model: str) -> Job:
    """The part of the work that is a job's."""
    return Job(
        model=model,
        precision=request.precision,
        policy=request.policy or outcome.DEFAULT_POLICY,
        matcher=request.matcher,
        quick=request.quick,
    )


def _nothing_new(last: Retrained) -> Retrained:
    said = f"Data, base model and settings are those of the last retraining, which ended as: {last.outcome}."
    result = last.model_copy(update={"outcome": "nothing to do", "detail": said, "seconds": {}})
    log.info("nothing to do: %s", said)
    show_result(result)
    return result


@contextmanager
def _closed_if_failed(uri: str, run_id: str) -> Iterator[None]:
    """A retraining that fails leaves no open run in MLflow, if MLflow still listens; one that is killed is found."""
    try:
        yield
    except BaseException as error:
        said = error.message if isinstance(error, SlmopsError) else f"{type(error).__name__}: {error}"
        with suppress(TrackingError):
            TrainingTracker(uri).abort(run_id, said)
        raise
