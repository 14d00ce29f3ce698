"""Check, and on request mend, everything that the jobs need on this machine."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from slmops.core.settings import Settings
from slmops.local import doctor
from tasks.environment import check_environment


@task(name="install the tested packages", task_run_name="install the tested packages", cache_policy=NO_CACHE)
def install(settings: Settings) -> None:
    """``slmops doctor --fix``."""
    doctor.fix(settings)


@task(name="build ONNX Runtime GenAI", task_run_name="build ONNX Runtime GenAI", cache_policy=NO_CACHE)
def build_genai(checkout: Path, settings: Settings) -> Path:
    """``slmops doctor --build-genai``; returns the wheel."""
    return doctor.build_genai(checkout, settings)


@flow(name="prepare-environment", persist_result=False)
def prepare_environment(fix: bool = False, genai_checkout: Path | None = None) -> None:
    """Run every check of ``slmops doctor`` and show the outcome.

    Args:
        fix: Install the tested set of packages first.
        genai_checkout: Build ONNX Runtime GenAI from this source checkout first; needs CMake 3.31.

    Raises:
        PrerequisiteError: A check failed.
    """
    settings = Settings()
    if fix:
        install(settings)
    if genai_checkout is not None:
        build_genai(genai_checkout, settings)
    checks = doctor.check(settings)
    rows = [{"check": c.name, "status": c.status, "found": c.detail, "mend": c.fix or ""} for c in checks]
    create_table_artifact(rows, key="environment", description="slmops doctor")
    check_environment.fn(settings)
