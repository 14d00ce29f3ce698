"""Fine-tuned small language models, converted at several precisions, measured, compared and deployed.

From Python::

    from slmops import Job, optimize

    comparison = optimize(Job(model="demo", quick=True))
    comparison.to_frame()

Public are the names in ``__all__``: :func:`optimize`, what it takes (:class:`Job`) and returns (:class:`Comparison`),
and the errors (:mod:`slmops.core.errors`). Everything else may change. Start reading in
``flows/optimize.py``, which is the story of a job; the packages below this one hold what its stages do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.api import optimize
    from slmops.core.errors import (
        BusyError,
        CheckpointError,
        ConversionError,
        EvaluationError,
        GateError,
        PrerequisiteError,
        RecipeError,
        RegistrationError,
        SlmopsError,
        TrackingError,
        UsageError,
        WorkError,
    )
    from slmops.core.job import Job
    from slmops.core.values import Comparison

__all__ = [
    "BusyError",
    "CheckpointError",
    "Comparison",
    "ConversionError",
    "EvaluationError",
    "GateError",
    "Job",
    "PrerequisiteError",
    "RecipeError",
    "RegistrationError",
    "SlmopsError",
    "TrackingError",
    "UsageError",
    "WorkError",
    "optimize",
]
_MODULES = {"optimize": "slmops.api", "Job": "slmops.core.job", "Comparison": "slmops.core.values"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "slmops.core.errors")), name)


def __dir__() -> list[str]:
    return __all__
