"""What is deployed, measured once more: whether it is still what was recorded, and keeps its memory over a long run."""

import logging
import shutil
from contextlib import ExitStack

from prefect import flow, runtime

from flows.running import named, plainly, turn
from slmops.core import locks, machine
from slmops.core.settings import Settings
from slmops.core.values import Answer, Comparison, Measurement
from slmops.delivery import remeasurement
from slmops.evaluation.drift import DriftError, Measure, Remeasure, Remeasured, assess
from slmops.evaluation.soak import Soak, SoakError, SoakResult, Target
from slmops.evaluation.soak import check as check_soak
from slmops.local import stack
from tasks import remeasure as steps
from tasks.prepare import check_environment
from tasks.promote import check_files, find_version

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
            recorded = steps.find_record(uri, version, settings.work(work) / "record")
            plan = remeasurement.plan(recorded, here, settings)
            for reason in plan.left_out:
                log.warning("not compared: %s", reason)
            now: dict[str, Measurement] = {}
            answers: tuple[Answer, ...] | None = None
            with remeasurement.copied(check_files(version, settings, uri), work, settings) as copy:
                if plan.speed:
                    now |= steps.measure_speed(copy, recorded, work, settings)
                if plan.text is not None:
                    now |= steps.measure_perplexity(copy, plan.text, recorded, work, settings)
                if plan.questions is not None:
                    answers = steps.ask_questions(copy, plan.questions, recorded, work, settings)
        finally:
            shutil.rmtree(settings.work(work), ignore_errors=True)
        result = assess(version, recorded, now, answers, plan.left_out, here, request)
        result = steps.track_remeasurement(uri, result, request, recorded, runtime.flow_run.id or "")
    if result.outcome == "drifted":
        raise DriftError(result)
    return result


@flow(name="measure", flow_run_name=named("measure {request.name}"), persist_result=False)
@plainly
def measure(request: Measure) -> Comparison:
    """Measure the speed and memory of a version on the device that it is for, and add them to its job's comparison.

    Raises:
        SlmopsError: Its device is not here, or it was measured already.
    """
    settings = Settings()
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    work = f"{request.name}.remeasure"
    with locks.exclusive(settings.locks / f"{work}.lock", f"the measurement of {request.name!r}", wait=False):
        shutil.rmtree(settings.work(work), ignore_errors=True)
        version = find_version(uri, request.name, str(request.version))
        try:
            recorded = steps.find_record(uri, version, settings.work(work) / "record")
            remeasurement.check_unmeasured(version, recorded)
            with remeasurement.copied(check_files(version, settings, uri), work, settings) as copy:
                figures = steps.measure_speed(copy, recorded, work, settings)
        finally:
            shutil.rmtree(settings.work(work), ignore_errors=True)
        return steps.track_measured(uri, version, figures)


@flow(name="soak", flow_run_name=named("soak"), persist_result=False)
@plainly
def soak(request: Soak) -> SoakResult:
    """Send a variant many requests, and see whether the memory of its process grows.

    Raises:
        SoakError: It grows, or it may grow; the error carries the result.
        SlmopsError: It could not be measured.
    """
    check_soak(request)
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    installed = None
    if request.champion:
        version = find_version(uri, request.name or "", None)
        installed = check_files(version, settings, uri)
        target = Target(
            model=version.name, variant=version.variant, foundry_id=version.foundry_id, version=version.version
        )
    else:
        target = steps.find_variant(uri, request)
    with turn(settings.machine_lock, locks.MACHINE), ExitStack() as held:
        home = settings.foundry
        if installed is not None:
            work = f"{installed.name}.soak"
            held.enter_context(remeasurement.copied(installed, work, settings))
            home = remeasurement.home_of(work, settings)
        measured, memory_kb = steps.soak_variant(target, request, home, settings)
    result = steps.track_soak(uri, measured, memory_kb, runtime.flow_run.id or "")
    if result.outcome != "pass":
        raise SoakError(result)
    return result
