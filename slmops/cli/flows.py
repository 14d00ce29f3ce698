"""Run a flow from the terminal: servers up, Prefect imported after its environment is set, the result printed."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slmops.core.errors import SlmopsError, WorkError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Comparison
from slmops.evaluation.soak import Soak, SoakError, SoakResult
from slmops.foundry.versions import Promoted, Promotion
from slmops.training.outcome import RetrainError
from slmops.training.outcome import text as text_of_retraining
from slmops.training.values import Retrain, Retrained

if TYPE_CHECKING:
    from slmops.local.stack import Stack


def run(job: Job, *, json: bool) -> int:
    """The main job; returns the exit code."""
    with prefect_running() as servers:
        from flows.optimize import optimize

        try:
            _show(optimize(job), servers, json=json)
        except SlmopsError as error:
            if error.comparison is not None:
                _show(error.comparison, servers, json=json)
            raise
    return 0


def soak(request: Soak, *, json: bool) -> int:
    """A soak; returns the exit code."""
    with prefect_running() as servers:
        from flows.soak import soak

        try:
            _show_soak(soak(request), servers, json=json)
        except SoakError as error:
            _show_soak(error.result, servers, json=json)
            raise
    return 0


def retrain(request: Retrain, *, json: bool) -> int:
    """A retraining; returns the exit code."""
    with prefect_running():
        from flows.retrain import retrain

        try:
            _show_retrained(retrain(request), json=json)
        except RetrainError as error:
            _show_retrained(error.result, json=json)
            raise
        except SlmopsError as error:
            if error.comparison is not None:
                print_comparison(error.comparison, json=json)
            raise
    return 0


def promote(promotion: Promotion, *, json: bool) -> int:
    """A promotion; returns the exit code."""
    with prefect_running():
        from flows.promote import promote

        if promotion.approval:
            say("waiting for a decision on the Prefect page of this run")
        _show_promoted(promote(promotion), json=json)
    return 0


def rollback(name: str, *, json: bool) -> int:
    """A rollback; returns the exit code."""
    with prefect_running():
        from flows.promote import rollback

        _show_promoted(rollback(name), json=json)
    return 0


def print_comparison(comparison: Comparison, *, json: bool) -> None:
    """Data for stdout."""
    from slmops.report import render as report

    print(comparison.model_dump_json(indent=2) if json else report.text(comparison), flush=True)


def report(error: SlmopsError) -> int:
    """Tell what went wrong; returns the exit code."""
    say(f"error: {error}")
    return error.exit_code


def say(text: str) -> None:
    """Tell on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def prefect_running() -> Iterator[Stack]:
    """Have the servers running and the environment as Prefect reads it at import, which is for the block to do."""
    from slmops.local import stack

    settings = Settings()
    servers = stack.up(settings)
    os.environ.update(stack.prefect_environment(settings, servers))
    signal.signal(signal.SIGTERM, _terminate)
    logging.raiseExceptions = False  # records that a dead Prefect server does not take are lost without noise
    import httpx

    try:
        yield servers
    except httpx.TransportError:  # MLflow's client has errors of its own: this is Prefect's
        report(
            WorkError(
                f"Prefect at {servers.prefect_url} stopped answering, and the run with it.",
                "`slmops up` starts it again; then repeat the command: what was converted is kept.",
            )
        )
        os._exit(WorkError.exit_code)  # not by the usual way, on which Prefect tries to send its last events for long


def _show(comparison: Comparison, servers: Stack, *, json: bool) -> None:
    from slmops.tracking.tracker import Tracker

    print_comparison(comparison, json=json)
    say(f"\nin MLflow: {Tracker(servers.tracking_uri).run_url(comparison.run_id)}")
    if comparison.choice.variant is not None:
        say(f"deploy {comparison.choice.variant}: slmops promote {comparison.model}")


def _show_soak(result: SoakResult, servers: Stack, *, json: bool) -> None:
    from slmops.evaluation import soak as soaking
    from slmops.tracking.tracker import Tracker

    print(result.model_dump_json(indent=2) if json else soaking.text(result), flush=True)
    if result.run_id is not None:
        say(f"\nin MLflow: {Tracker(servers.tracking_uri).run_url(result.run_id)}")


def _show_promoted(promoted: Promoted, *, json: bool) -> None:
    print(promoted.model_dump_json(indent=2) if json else promoted.text, flush=True)
    say(f"\nin MLflow: {promoted.url}")


def _show_retrained(result: Retrained, *, json: bool) -> None:
    print(result.model_dump_json(indent=2) if json else text_of_retraining(result), flush=True)
    say(f"\nin MLflow: {result.url}")


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt  # so that children are killed and MLflow's runs closed on the way out
