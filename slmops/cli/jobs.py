"""The commands that convert, train and measure: run, demo, retrain, recipes, sweep, compare, soak, remeasure."""

import json as jsonlib
from importlib import import_module
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from slmops import preflight, report
from slmops.cli.prefect import hand_over, prefect_running
from slmops.cli.terminal import Flat, Json, output, say, show
from slmops.conversion import recipe_files
from slmops.core.errors import SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Comparison
from slmops.evaluation import drift
from slmops.evaluation.drift import Measure, Remeasure, Remeasured
from slmops.evaluation.soak import Soak, SoakResult
from slmops.local import stack
from slmops.selection.sweep import Sweep, Swept
from slmops.training.values import Retrain, Retrained

FlowResult = Comparison | Retrained | SoakResult | Remeasured | Swept
JobFile = Annotated[
    Path | None, Parameter(name="--job", help="TOML or YAML file with any of these options; flags win.")
]
Latest = Annotated[str | None, Parameter(help="The model; that of the latest comparison by default.")]
Quick = Annotated[bool, Parameter(help="Fewer repetitions: rougher figures, sooner.")]
Demo = Annotated[bool, Parameter(help="A real small model learns to route support tickets, and is served.")]
_JOB, _SOAK = Job(), Soak()


def run(*, job: Annotated[Job, Flat] = _JOB, job_file: JobFile = None, json: Json = False) -> None:
    del job_file  # read before the flags are parsed
    _run(job, json=json)


def demo(*, quick: Quick = False, json: Json = False) -> None:
    _run(Job(model="demo", quick=quick), json=json)
    say("Prefect and MLflow keep running until `slmops down`; `slmops up --worker` lets you start runs from Prefect.")


def retrain(
    *, request: Annotated[Retrain, Flat], job_file: JobFile = None, demo: Demo = False, json: Json = False
) -> None:
    del job_file, demo  # read before the flags are parsed
    if request.approval:
        with prefect_running():
            hand_over("retrain", request.absolute(), json=json)
    else:
        _run_flow("retrain", request, json=json)


def recipes(*, json: Json = False) -> None:
    settings = Settings()
    found = [(name, path, recipe_files.load(name, settings)) for name, path in recipe_files.find(settings).items()]
    if json:
        rows = [{"name": name, "file": str(path), "chain": one.chain, **one.model_dump()} for name, path, one in found]
        output(jsonlib.dumps(rows, indent=2))
        return
    for name, path, one in found:
        bits = f"{one.bits} bits" if one.bits else "any bits"
        place = "" if path.parent == recipe_files.FOLDER else f"\n    {path}"
        output(f"{name}: {bits}; {' > '.join(one.chain)}; for {', '.join(one.targets)}\n    {one.when}{place}")


def sweep(*, request: Annotated[Sweep, Flat], json: Json = False) -> None:
    preflight.check_sweep(request, Settings())
    _run_flow("sweep", request, json=json)


def compare(name: Latest = None, /, *, json: Json = False) -> None:
    from slmops.tracking.tracker import Tracker

    _show(Tracker(stack.tracking_uri(Settings())).latest(name), None, json=json)


def soak(name: Latest = None, /, *, request: Annotated[Soak, Flat] = _SOAK, json: Json = False) -> None:
    _run_flow("remeasure", request.model_copy(update={"name": name or request.name}), json=json, name="soak")


def remeasure(request: Annotated[Remeasure, Flat], /, *, json: Json = False) -> None:
    _run_flow("remeasure", request, json=json)


def measure(request: Annotated[Measure, Flat], /, *, json: Json = False) -> None:
    _run_flow("remeasure", request, json=json, name="measure")


def _run(job: Job, *, json: bool) -> None:
    _run_flow("optimize", preflight.check(job, Settings()), json=json)


def _run_flow(
    module: str, request: Job | Retrain | Soak | Measure | Remeasure | Sweep, *, json: bool, name: str | None = None
) -> None:
    """Run a flow and show its result. An error can carry one too: what was measured before a gate said no."""
    with prefect_running() as servers:
        flow = getattr(import_module(f"flows.{module}"), name or module)
        try:
            _show(flow(request), servers.tracking_uri, json=json)
        except SlmopsError as error:
            result = getattr(error, "result", error.comparison)
            if result is not None:
                _show(result, servers.tracking_uri, json=json)
            raise


def _show(result: FlowResult, tracking_uri: str | None, *, json: bool) -> None:
    page = None
    if tracking_uri and result.run_id:
        from slmops.tracking.tracker import Tracker

        page = Tracker(tracking_uri).run_url(result.run_id)
    if isinstance(result, Comparison):
        text = report.text(result)
    elif isinstance(result, Remeasured):
        text = drift.text(result)
    else:
        text = result.text
    show(result, text, json=json, page=page)
    if page and isinstance(result, Comparison) and result.choice.variant is not None:
        say(f"deploy {' and '.join(one.name for one in result.chosen)}: slmops promote {result.model}")
