"""Soak: whether a deployed variant keeps its memory over a long run."""

from __future__ import annotations

import logging

from prefect import flow, runtime

from slmops import locks, stack
from slmops.evaluation.soak import Soak, SoakError, SoakResult
from slmops.settings import Settings
from tasks.environment import check_environment
from tasks.soak import find_variant, show_soak, soak_variant, track_soak

log = logging.getLogger("slmops.soak")


@flow(name="soak", flow_run_name="soak", persist_result=False)
def soak(request: Soak) -> SoakResult:
    """Send a variant many requests, and see whether the memory of its process grows.

    Raises:
        SoakError: It grows, or it is not proven that it does not; the error carries the result.
        SlmopsError: It could not be measured.
    """
    settings = Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    check_environment(settings)
    uri = stack.tracking_uri(settings)
    name, variant, foundry_id = find_variant(uri, request)
    with locks.exclusive(settings.machine_lock, "this machine's conversions and measurements", wait=True):
        measured, memory_kb = soak_variant(name, variant, foundry_id, request, settings)
    result, url = track_soak(uri, measured, memory_kb, runtime.flow_run.id or "")
    show_soak(result, url)
    if result.outcome != "pass":
        raise SoakError(result)
    return result
