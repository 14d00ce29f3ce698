"""The command ``slmops``. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or a missing prerequisite, 3 a gate said no, 130 interrupted.
"""

from __future__ import annotations

import json as jsonlib
import logging
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError

from slmops.cli import deploy as cli_deploy
from slmops.cli import operate as cli_operate
from slmops.cli.flows import print_comparison as _print
from slmops.cli.flows import report as _report
from slmops.cli.flows import retrain as _retrain
from slmops.cli.flows import run as _run
from slmops.cli.flows import say as _say
from slmops.cli.flows import soak as _soak
from slmops.core.errors import SlmopsError, UsageError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.validation import dotted, problems
from slmops.evaluation.soak import Soak
from slmops.training.values import Retrain

INTERRUPTED = 130
Location = Sequence[int | str]
_SOAK = Soak()
_DEMO: dict[str, Any] = {
    "model": "demo",
    "data": "demo",
    "name": "ticket-router",
    "training": {"epochs": 2},
    "serve": True,
    "watch-s": 30,
}
"""A real small model learns to route support tickets."""

app = App(
    name="slmops",
    help="Convert a fine-tuned small language model at several precisions, measure each, choose one.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,  # _main tells the user and returns the code
)


@app.command
def run(
    *,
    job: Annotated[Job, Parameter(name="*")],
    job_file: Annotated[Path | None, Parameter(name="--job")] = None,
    json: bool = False,
) -> int:
    """Convert, register, measure and compare a checkpoint; start the local servers if needed.

    Parameters
    ----------
    job_file
        TOML or YAML file with any of these options; flags win.
    json
        Print the comparison as JSON.
    """
    del job_file  # read by main(), before the flags are parsed
    return _run(job, json=json)


@app.command
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
    _say("Prefect and MLflow keep running until `slmops down`; `slmops up --worker` lets you start runs from Prefect.")
    return code


@app.command
def retrain(
    *,
    request: Annotated[Retrain, Parameter(name="*")],
    job_file: Annotated[Path | None, Parameter(name="--job")] = None,
    demo: bool = False,
    json: bool = False,
) -> int:
    """Fine-tune a checkpoint on data, convert and measure it, and deploy it if it is better; nothing new, nothing done.

    Ends with 3 if a gate refuses what was made, or if it is rolled back.

    Parameters
    ----------
    job_file
        TOML or YAML file with any of these options; flags win.
    demo
        A real small model learns to route support tickets, and is served.
    json
        Print the result as JSON.
    """
    del job_file, demo  # read by main(), before the flags are parsed
    return _retrain(request, json=json)


@app.command
def compare(name: str | None = None, /, *, json: bool = False) -> int:
    """Print the latest comparison.

    Parameters
    ----------
    name
        The model; the latest of all by default.
    json
        Print it as JSON.
    """
    from slmops.local import stack
    from slmops.tracking.tracker import Tracker

    _print(Tracker(stack.tracking_uri(Settings())).latest(name), json=json)
    return 0


@app.command
def soak(
    name: str | None = None, /, *, request: Annotated[Soak, Parameter(name="*")] = _SOAK, json: bool = False
) -> int:
    """Send a deployed variant many requests and see whether its memory grows; start the local servers if needed.

    Ends with 3 unless it is proven that the memory does not grow faster than the limit.

    Parameters
    ----------
    name
        The model; that of the latest comparison by default.
    json
        Print the result as JSON.
    """
    return _soak(request.model_copy(update={"name": name or request.name}), json=json)


@app.command
def doctor(
    *,
    fix: bool = False,
    build_genai: Annotated[Path | None, Parameter(name="--build-genai")] = None,
    json: bool = False,
) -> int:
    """Check every prerequisite and say how to mend what is missing.

    Parameters
    ----------
    fix
        Install the tested set of packages first.
    build_genai
        Build ONNX Runtime GenAI from this source checkout and install the wheel first.
    json
        Print the checks as JSON.
    """
    from slmops.local import doctor as checks

    settings = Settings()
    if fix:
        checks.fix(settings)
    if build_genai is not None:
        _say(f"installed {checks.build_genai(build_genai, settings)}")
    found = checks.check(settings)
    if json:
        print(jsonlib.dumps([check.model_dump() for check in found], indent=2))
    else:
        for check in found:
            print(f"{check.status:8} {check.name}: {check.detail}")
            if check.fix and check.status != "ok":
                print(f"{'':8}   {check.fix}")
    return 2 if any(check.status == "failure" for check in found) else 0


@app.command
def up(*, worker: bool = False) -> int:
    """Start the local Prefect and MLflow servers.

    Parameters
    ----------
    worker
        Also register the deployments and start a worker, so that runs can be started from the Prefect page.
    """
    from slmops.local import stack

    running = stack.up(Settings(), worker=worker)
    print(f"Prefect {running.prefect_url}\nMLflow  {running.tracking_uri}")
    return 0


@app.command
def down() -> int:
    """Stop the local servers, the worker, and the service that a retraining started."""
    from slmops.local import stack
    from slmops.serving import detached

    settings = Settings()
    service = ["service"] if detached.stop(settings) else []
    stopped = [*service, *stack.down(settings)]
    _say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")
    return 0


@app.command
def status(name: str | None = None, /, *, json: bool = False) -> int:
    """Say what is running; or of a model, which versions there are and which of them is deployed.

    Parameters
    ----------
    name
        The model.
    json
        Print it as JSON.
    """
    if name is not None:
        return cli_deploy.versions(name, json=json)
    found = _status()
    if json:
        print(jsonlib.dumps(found, indent=2))
        return 0
    print(f"home     {found['home']}")
    for server in ("prefect", "mlflow"):
        state = found[server]
        print(f"{server:8} {state['url'] or '-'}  {'ok' if state['ok'] else 'not running'}")
    if serving := found["serving"]:
        print(f"serving  {serving['url']}  {serving['model']}  {'ok' if serving['ok'] else 'not answering'}")
    return 0


for _command in (cli_deploy.promote, cli_deploy.rollback, cli_deploy.serve, cli_deploy.pull, cli_deploy.catalog):
    app.command(_command)
app.command(cli_operate.remeasure)


def main() -> None:
    """Entry point."""
    sys.exit(_main(sys.argv[1:]))


def _main(argv: list[str]) -> int:
    _log_to_stderr()
    try:
        _read_options(argv)
        # The commands return their exit code.
        code = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else 0
    except SlmopsError as error:
        return _report(error)
    except cyclopts.CycloptsError as error:
        return _report(UsageError(_usage(error), "See `slmops --help`."))
    except ValidationError as error:  # of the environment
        return _report(UsageError(_lines(error, _variable), "Correct the environment or .env."))
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _unexpected(error)


def _status() -> dict[str, Any]:
    from slmops.local import stack
    from slmops.serving import status

    settings = Settings()
    return stack.status(settings).model_copy(update={"serving": status.status(settings.home)}).model_dump(mode="json")


def _read_options(argv: list[str]) -> None:
    """Let the options of ``--job FILE`` or of the demo stand in for the flags that are not given."""
    for position, argument in enumerate(argv):
        if argument == "--job" and position + 1 < len(argv):
            path = Path(argv[position + 1])
        elif argument.startswith("--job="):
            path = Path(argument.removeprefix("--job="))
        else:
            continue
        options = {str(key).replace("_", "-"): value for key, value in _load(path).items()}
        app.config = cyclopts.config.Dict({argv[0]: options}, source=str(path))
    if argv[:1] == ["retrain"] and "--demo" in argv:
        app.config = cyclopts.config.Dict({"retrain": _DEMO}, source="the demo")


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.expanduser().read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"The job file {path} cannot be read: {error}", "Give a TOML or YAML file.") from None
    if not isinstance(data, dict):
        raise UsageError(f"The job file {path} holds no options.", "Write them as key: value.")
    return data


def _usage(error: cyclopts.CycloptsError) -> str:
    cause = error.__cause__
    return _lines(cause, _flag) if isinstance(cause, ValidationError) else str(error)


def _lines(error: ValidationError, name: Callable[[Location], str]) -> str:
    return "\n".join(problems(error, name=name, got=True))


def _flag(location: Location) -> str:
    return f"--{str(location[0]).replace('_', '-')}" if location else ""


def _variable(location: Location) -> str:
    return f"SLMOPS_{dotted((str(location[0]).upper(), *location[1:]))}" if location else ""


def _unexpected(error: Exception) -> int:
    """Something that no check foresaw: the traceback goes into a file, the terminal gets one line."""
    story = "".join(traceback.format_exception(error))
    try:
        logs = Settings().logs
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"crash-{datetime.now():%Y%m%d-%H%M%S}.log"
        log.write_text(story, encoding="utf-8")
    except (OSError, ValidationError):  # the home can be what is wrong
        with tempfile.NamedTemporaryFile(
            "w", prefix="slmops-crash-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(story)
        log = Path(file.name)
    said = str(error).splitlines()[0] if str(error) else ""
    _say(f"error: {type(error).__name__}: {said}\n  The whole story is in {log}. If a server stopped: `slmops status`.")
    return 1


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{datetime.now():%H:%M:%S} {level}{record.getMessage()}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Format())
    logger = logging.getLogger("slmops")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


if __name__ == "__main__":
    main()
