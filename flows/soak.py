"""Soak: whether a variant, or what is deployed, keeps its memory over a long run."""

import logging
from contextlib import ExitStack

from prefect import flow, runtime

from flows.running import named, plainly, turn
from slmops.core import locks
from slmops.core.settings import Settings
from slmops.delivery.remeasurement import copied, home_of
from slmops.evaluation.soak import Soak, SoakError, SoakResult, Target, check
from slmops.local import stack
from tasks.prepare import check_environment
from tasks.promote import check_files, find_version
from tasks.remeasure import find_variant, soak_variant, track_soak

log = logging.getLogger("slmops.soak")


@flow(name="soak", flow_run_name=named("soak"), persist_result=False)
@plainly
def soak(request: Soak) -> SoakResult:
    """Send a variant many requests, and see whether the memory of its process grows.

    Raises:
        SoakError: It grows, or it may grow; the error carries the result.
        SlmopsError: It could not be measured.
    """
    check(request)
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
        target = find_variant(uri, request)
    with turn(settings.machine_lock, locks.MACHINE), ExitStack() as held:
        home = settings.foundry
        if installed is not None:
            work = f"{installed.name}.soak"
            held.enter_context(copied(installed, work, settings))
            home = home_of(work, settings)
        measured, memory_kb = soak_variant(target, request, home, settings)
    result = track_soak(uri, measured, memory_kb, runtime.flow_run.id or "")
    if result.outcome != "pass":
        raise SoakError(result)
    return result
