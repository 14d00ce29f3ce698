"""Is everything there that a job needs, and getting what can be got."""

from __future__ import annotations

from pathlib import Path

from slmops.core.settings import Settings
from slmops.local import doctor
from tasks.stage import stage


@stage()
def check_environment(settings: Settings) -> None:
    """All checks of ``slmops doctor`` that take no time.

    Raises:
        PrerequisiteError: A check failed.
    """
    doctor.require(doctor.check(settings, imports=False))


@stage()
def check_everything(settings: Settings) -> list[doctor.Check]:
    """All checks of ``slmops doctor``, those that import every package too. None raises."""
    return doctor.check(settings)


@stage()
def install_tested_packages(settings: Settings) -> None:
    """``slmops doctor --fix``."""
    doctor.fix(settings)


@stage()
def build_onnxruntime_genai(checkout: Path, settings: Settings) -> Path:
    """``slmops doctor --build-genai``; returns the wheel."""
    return doctor.build_genai(checkout, settings)
