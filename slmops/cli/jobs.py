"""The commands that convert, train and measure: run, demo, retrain, compare, soak, remeasure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from slmops import preflight
from slmops.cli.prefect import prefect_running
from slmops.cli.terminal import say, show
from slmops.core.errors import SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Comparison
from slmops.evaluation import drift
from slmops.evaluation import soak as soaking
from slmops.evaluation.drift import DriftError, Remeasure, Remeasured
from slmops.evaluation.soak import Soak, SoakError, SoakResult
from slmops.local import stack
from slmops.local.stack import Stack
from slmops.training import outcome
from slmops.training.outcome import RetrainError
from slmops.training.values import Retrain, Retrained

JobFile = Annotated[Path | None, Parameter(name="--job")]
_SOAK = Soak()


def run(*, job: Annotated[Job, Parameter(name="*")], job_file: JobFile = None, json: bool = False) -> int:
    """Convert, register, measure and compare a checkpoint.

    Parameters
    ----------
    job_file
        TOML or YAML file with any of these options; flags win.
    json
        Print the comparison as JSON.
    """
    del job_file  # read before the flags are parsed
    return _run(job, json=json)


def demo(*, quick: bool = False, json: bool = False) -> int:
    """Run the whole job on a real small model that comes as a package.

    Parameters
    ----------
    quick
        Fewer repetitions: rougher figures, sooner.
    json
        Print the comparison as JSON.
    """
    code = _run(Job(model="demo", quick=quick), json=json)
    say("Prefect and MLflow keep running until `slmops down`; `slmops up --worker` lets you start runs from Prefect.")
    return code


def retrain(
    *,
    request: Annotated[Retrain, Parameter(name="*")],
    job_file: JobFile = None,
    demo: bool = False,
    json: bool = False,
) -> int:
    """Fine-tune a checkpoint on data, convert and measure it, and deploy it if it is better.

    Does nothing if the data and the checkpoint are those of the last time.

    Ends with 3 if a gate refuses the result, or if it is rolled back.

    Parameters
    ----------
    job_file
        TOML or YAML file with any of these options; flags win.
    demo
        A real small model learns to route support tickets, and is served.
    json
        Print the result as JSON.
    """
    del job_file, demo  # read before the flags are parsed

    def show_result(result: Retrained) -> None:
        show(result, outcome.text, json=json, page=result.url)

    with prefect_running():
        from flows.retrain import retrain

        try:
            show_result(retrain(request))
        except RetrainError as error:
            show_result(error.result)
            raise
        except SlmopsError as error:
            if error.comparison is not None:
                _show(error.comparison, json=json)
            raise
    return 0


def compare(name: str | None = None, /, *, json: bool = False) -> int:
    """Print the latest comparison.

    Parameters
    ----------
    name
        The model; the latest of all by default.
    json
        Print it as JSON.
    """
    from slmops.tracking.tracker import Tracker

    _show(Tracker(stack.tracking_uri(Settings())).latest(name), json=json)
    return 0


def soak(
    name: str | None = None, /, *, request: Annotated[Soak, Parameter(name="*")] = _SOAK, json: bool = False
) -> int:
    """Send a deployed variant many requests and see whether its memory grows.

    Ends with 3 unless it is proven that the memory does not grow faster than the limit.

    Parameters
    ----------
    name
        The model; that of the latest comparison by default.
    json
        Print the result as JSON.
    """
    with prefect_running() as servers:
        from flows.soak import soak

        def show_result(result: SoakResult) -> None:
            show(result, soaking.text, json=json, page=_page(servers, result.run_id))

        try:
            show_result(soak(request.model_copy(update={"name": name or request.name})))
        except SoakError as error:
            show_result(error.result)
            raise
    return 0


def remeasure(request: Annotated[Remeasure, Parameter(name="*")], /, *, json: bool = False) -> int:
    """Measure what is deployed once more, as a device gets it.

    Ends with 3 if it is slower, needs more memory or answers worse than when it was evaluated.

    Parameters
    ----------
    json
        Print the result as JSON.
    """
    with prefect_running() as servers:
        from flows.remeasure import remeasure

        def show_result(result: Remeasured) -> None:
            show(result, drift.text, json=json, page=_page(servers, result.run_id))

        try:
            show_result(remeasure(request))
        except DriftError as error:
            show_result(error.result)
            raise
    return 0


def _run(job: Job, *, json: bool) -> int:
    preflight.check(job, Settings())
    with prefect_running() as servers:
        from flows.optimize import optimize

        def show_result(comparison: Comparison) -> None:
            _show(comparison, json=json, page=_page(servers, comparison.run_id))
            if comparison.choice.variant is not None:
                say(f"deploy {comparison.choice.variant}: slmops promote {comparison.model}")

        try:
            show_result(optimize(job))
        except SlmopsError as error:
            if error.comparison is not None:
                show_result(error.comparison)
            raise
    return 0


def _show(comparison: Comparison, *, json: bool, page: str | None = None) -> None:
    from slmops.report import tables

    show(comparison, tables.text, json=json, page=page)


def _page(servers: Stack, run_id: str | None) -> str | None:
    if run_id is None:
        return None
    from slmops.tracking.tracker import Tracker

    return Tracker(servers.tracking_uri).run_url(run_id)
