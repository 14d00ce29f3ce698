"""The command ``slmops``: its table of commands, and how it ends.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or a missing prerequisite, 3 a gate said no, 130 interrupted.
"""

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import cyclopts
from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import CoercionError, MissingArgumentError, RepeatArgumentError, UnusedCliTokensError

from slmops.cli import terminal
from slmops.core import web
from slmops.core.errors import PrerequisiteError, SlmopsError, UsageError

COMMANDS = {
    "run": ("jobs", "Convert, register, measure and compare a checkpoint."),
    "demo": ("jobs", "Run the whole job on a real small model that comes as a package."),
    "retrain": (
        "jobs",
        "Fine-tune a checkpoint on data, convert and measure it, and deploy it if it is better.\n\n"
        "Does nothing if the data and the checkpoint are those of the last time.\n\n"
        "Ends with 3 if a gate refuses the result, or if it is rolled back.",
    ),
    "recipes": ("jobs", "List what can be made, your own recipes included: passes, bits, when to take each."),
    "sweep": (
        "jobs",
        "Search recipes and their options for the best trades of size for KL divergence.\n\n"
        "Speed is not measured: `slmops run` does that with a recipe that was saved.\n\n"
        "A sweep that was ended goes on when the same one is started again.",
    ),
    "compare": ("jobs", "Print the latest comparison."),
    "soak": (
        "jobs",
        "Send a deployed variant many requests and see whether its memory grows.\n\n"
        "Ends with 3 unless it is proven that the memory does not grow faster than the limit.",
    ),
    "measure": ("jobs", "Measure a version on the device that it is for, if the machine of its job has none."),
    "remeasure": (
        "jobs",
        "Measure what is deployed once more, as a device gets it.\n\n"
        "Ends with 3 if it is slower, needs more memory or answers worse than when it was evaluated.",
    ),
    "promote": ("deploy", "Make a version of a model the champion, if it is not worse than the one that is."),
    "approve": ("deploy", "Show the gates of a run that waits for approval, and approve it or turn it down."),
    "rollback": ("deploy", "Make the previous champion the champion again; a second rollback takes it back."),
    "deploy": (
        "deploy",
        "Make, or renew, the deployments that retrain and remeasure a model on a schedule, from its job file.\n\n"
        "What was changed on the Prefect page stays until the file says something else than the last time.",
    ),
    "undeploy": ("deploy", "Remove the deployments of a model. Its versions, and what is served, stay."),
    "serve": ("deploy", "Serve the champion of a model, and each newer one, over an OpenAI-compatible API."),
    "pull": ("deploy", "Fetch a deployed version onto this device, verify it and register it in Foundry Local."),
    "catalog": ("deploy", "Offer the promoted models to Foundry Local applications as a private catalog."),
    "doctor": ("local", "Check every prerequisite and say how to get what is missing."),
    "up": ("local", "Start the local Prefect and MLflow servers."),
    "down": ("local", "Stop the local servers, the worker, and the service that a retraining started."),
    "prune": ("local", "Say what the home holds and what refers to it, and remove what nothing refers to."),
    "list": ("deploy", "List the models: what is deployed, how the last run ended, what runs by itself, disk used."),
    "status": ("local", "Say what is running, or which versions of a model there are and which is deployed."),
}
"""Each command's module and its help; only the module of the command that is called is imported."""

_DEMO: dict[str, Any] = {
    "model": "demo",
    "data": "demo",
    "name": "ticket-router",
    "training": {"epochs": 2},
    "serve": True,
    "watch-s": 30,
}
"""A real small model learns to route support tickets."""


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    terminal.speak_utf8()
    terminal.log_to_stderr()
    os.environ.update(web.past_proxies())
    try:
        # Only a command that ends with another exit code than 0 returns it.
        return _app(argv)(argv, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except SlmopsError as error:
        return _report(error)
    except CycloptsError as error:
        return _report(UsageError(_said(error), "See `slmops --help`."))
    except KeyboardInterrupt:
        terminal.say("interrupted")
        return 130
    except Exception as error:
        return _unexpected(error)


def _app(argv: Sequence[str]) -> App:
    app = App(
        name="slmops",
        help="Convert a fine-tuned small language model at several precisions, measure each, choose one. "
        "Commands that need the local servers start them.",
        help_format="plaintext",
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,  # run() tells the user and returns the code
        config=_options(argv),
    )
    for name, (module, about) in COMMANDS.items():
        app.command(f"slmops.cli.{module}:{name}", name=name, help=about)
    return app


def _options(argv: Sequence[str]) -> list[cyclopts.config.Dict]:
    """The options of a job file or of the demo, which stand in for the flags that are not given."""
    if argv[:1] == ["retrain"] and "--demo" in argv:
        return [cyclopts.config.Dict({"retrain": _DEMO}, source="the demo")]
    files = [value for option, value in pairwise(argv) if option == "--job"]
    files += [argument.removeprefix("--job=") for argument in argv if argument.startswith("--job=")]
    if argv[:1] == ["deploy"]:
        files = [argument for argument in argv[1:2] if not argument.startswith("-")]
    if not files:
        return []
    from slmops.core.files import read_table

    options = {str(key).replace("_", "-"): value for key, value in read_table(Path(files[0]), "job file").items()}
    if argv[0] == "retrain":
        for deployed in ("schedule", "notify"):  # what `slmops deploy` reads of the same file
            options.pop(deployed, None)
    return [cyclopts.config.Dict({argv[0]: options}, source=files[0])]


def _report(error: SlmopsError) -> int:
    terminal.say(f"error: {error}")
    return error.exit_code


def _unexpected(error: Exception) -> int:
    """Something that a command did not expect: settings or a home that cannot be used, or a bug."""
    from pydantic import ValidationError

    from slmops.core.settings import Settings
    from slmops.core.validation import problems

    try:
        settings = Settings()
    except ValidationError as wrong:
        said = "\n".join(problems(wrong, name=_variable, got=True))
        return _report(UsageError(said, "Correct the environment or .env."))
    if isinstance(error, OSError) and _of_home(error, settings.home):
        what = f"{error.filename} cannot be used: {error.strerror}."
        return _report(PrerequisiteError(what, "Set SLMOPS_HOME to a folder that you can write to."))
    story = "".join(traceback.format_exception(error))
    try:
        settings.logs.mkdir(parents=True, exist_ok=True)
        log = settings.logs / f"crash-{datetime.now():%Y%m%d-%H%M%S}.log"
        log.write_text(story, encoding="utf-8")
    except OSError:  # the home can be what is wrong
        log = Path(tempfile.mkstemp(".log", "slmops-crash-")[1])
        log.write_text(story, encoding="utf-8")
    said = str(error).splitlines()[0] if str(error) else ""
    terminal.say(f"error: {type(error).__name__}: {said}\n  The traceback is in {log}. `slmops status` says what runs.")
    return 1


def _of_home(error: OSError, home: Path) -> bool:
    """Whether the folder of all state is missing and cannot be made, or cannot be written to."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) or not error.filename:
        return False
    path = Path(os.fsdecode(error.filename))
    return path.is_relative_to(home) or home.is_relative_to(path)


def _said(error: CycloptsError) -> str:
    """What is wrong with a command line, in the user's words."""
    from pydantic import ValidationError

    from slmops.core.validation import KINDS, problems

    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return "\n".join(problems(cause, name=_flag, got=True))
    name = error.argument.name if error.argument else ""
    match error:
        case RepeatArgumentError():
            return f"{error.token.keyword} is given more than once."
        case UnusedCliTokensError():
            return f"There are too many arguments: {' '.join(error.unused_tokens or ())}."
        case MissingArgumentError() if error.keyword:
            return f"{error.keyword} needs a value."
        case MissingArgumentError():
            return f"`slmops {' '.join(error.command_chain or ())}` needs {name}."
        case CoercionError() if error.token is not None and error.target_type is not None:
            kind = KINDS.get(error.target_type.__name__, "something else")
            return f"{name} must be {kind} (got {error.token.value!r})."
        case _:
            return str(error)


def _flag(location: Sequence[int | str]) -> str:
    names = [part.replace("_", "-") for part in location if isinstance(part, str)]
    return f"--{'.'.join(names)}" if names else ""


def _variable(location: Sequence[int | str]) -> str:
    return "SLMOPS_" + ".".join([str(location[0]).upper(), *map(str, location[1:])]) if location else ""
