"""What is wrong with a command line or with the settings, in the user's words."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts import CycloptsError
from cyclopts.exceptions import CoercionError, MissingArgumentError, RepeatArgumentError, UnusedCliTokensError
from pydantic import ValidationError

from slmops.core.errors import UsageError
from slmops.core.validation import KINDS, dotted, problems

Location = Sequence[int | str]


def wrong_usage(error: CycloptsError) -> UsageError:
    """The error for a command line that cannot be understood."""
    return UsageError(_said(error), "See `slmops --help`.")


def wrong_settings(error: ValidationError) -> UsageError:
    """The error for settings that cannot be understood."""
    return UsageError("\n".join(problems(error, name=_variable, got=True)), "Correct the environment or .env.")


def _said(error: CycloptsError) -> str:
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


def _flag(location: Location) -> str:
    names = [part.replace("_", "-") for part in location if isinstance(part, str)]
    return f"--{'.'.join(names)}" if names else ""


def _variable(location: Location) -> str:
    return f"SLMOPS_{dotted((str(location[0]).upper(), *location[1:]))}" if location else ""
