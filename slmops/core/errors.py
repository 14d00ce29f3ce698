"""All errors that a user sees, and with which exit code the command ends for each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slmops.core.values import Comparison


class SlmopsError(Exception):
    """Base of all errors that a user can cause or fix: what was wrong and where, and what to do next."""

    exit_code = 1
    comparison: "Comparison | None" = None  # what a job that failed can still show

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  {self.fix}"


class UsageError(SlmopsError):
    """What was asked for makes no sense."""

    exit_code = 2


class CheckpointError(UsageError):
    """The checkpoint cannot be used."""


class RecipeError(UsageError):
    """The precision or the Olive config cannot be used."""


class DataError(UsageError):
    """The training data cannot be used."""


class PrerequisiteError(SlmopsError):
    """Something this needs is missing: a package, disk, memory, a server, the network."""

    exit_code = 2


class BusyError(PrerequisiteError):
    """Another slmops run holds what this one needs."""


class WorkError(SlmopsError):
    """The work was started and failed."""


class TrainingError(WorkError):
    """The fine-tuning diverged, or its process died."""


class ConversionError(WorkError):
    """Olive produced nothing, or something that does not work."""


class RegistrationError(WorkError):
    """Foundry Local does not list the variant, or the variant does not answer."""


class EvaluationError(WorkError):
    """A variant could not be measured."""


class TrackingError(WorkError):
    """MLflow did not take what was logged."""


class ServingError(WorkError):
    """A version cannot be served."""


class PromotionError(WorkError):
    """A version did not become the champion, for a reason that is not in its figures."""


class GateError(WorkError):
    """The work is done, and nothing of what was measured is good enough."""

    exit_code = 3


BY_NAME: dict[str, type[SlmopsError]] = {
    name: kind for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, SlmopsError)
}
"""What a child process or another machine names an error by."""
