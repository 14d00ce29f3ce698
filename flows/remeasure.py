"""Remeasurement: whether what is deployed is still what was recorded of it."""

import logging
import shutil

from prefect import flow, runtime

from flows.running import named, plainly
from slmops.core import locks, machine
from slmops.core.settings import Settings
from slmops.core.values import Answer, Measurement
from slmops.delivery import remeasurement
from slmops.evaluation.drift import DriftError, Remeasure, Remeasured, assess
from slmops.local import stack
from tasks.prepare import check_environment
from tasks.promote import check_files, find_version
from tasks.remeasure import ask_questions, find_record, measure_perplexity, measure_speed, track_remeasurement

log = logging.getLogger("slmops.remeasure")


@flow(name="remeasure", flow_run_name=named("remeasure {request.name}"), persist_result=False)
@plainly
def remeasure(request: Remeasure) -> Remeasured:
    """Measure a version once more, as a device gets it, and compare with what its evaluation recorded.

    Raises:
        DriftError: It is slower, larger in memory or worse than recorded; the error carries the result.
        SlmopsError: It could not be measured, or nothing of it can be compared.
    """
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    # The model's own work folder is emptied when a job of it begins.
    work = f"{request.name}.remeasure"
    with locks.exclusive(settings.locks / f"{work}.lock", f"the remeasurement of {request.name!r}", wait=False):
        shutil.rmtree(settings.work(work), ignore_errors=True)
        version = find_version(uri, request.name, request.version)
        here = machine.hardware().kind
        try:
            recorded = find_record(uri, version, settings.work(work) / "record")
            plan = remeasurement.plan(recorded, here, settings)
            for reason in plan.left_out:
                log.warning("not compared: %s", reason)
            now: dict[str, Measurement] = {}
            answers: tuple[Answer, ...] | None = None
            with remeasurement.copied(check_files(version, settings, uri), work, settings) as copy:
                if plan.speed:
                    now |= measure_speed(copy, recorded, work, settings)
                if plan.text is not None:
                    now |= measure_perplexity(copy, plan.text, recorded, work, settings)
                if plan.questions is not None:
                    answers = ask_questions(copy, plan.questions, recorded, work, settings)
        finally:
            shutil.rmtree(settings.work(work), ignore_errors=True)
        result = assess(version, recorded, now, answers, plan.left_out, here, request)
        result = track_remeasurement(uri, result, request, recorded, runtime.flow_run.id or "")
    if result.outcome == "drifted":
        raise DriftError(result)
    return result
