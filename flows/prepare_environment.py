"""Check everything that the jobs need on this machine, and install what is missing if asked to."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from slmops.core.settings import Settings
from slmops.local import doctor
from tasks.prepare import build_onnxruntime_genai, check_everything, install_tested_packages


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
        install_tested_packages(settings)
    if genai_checkout is not None:
        build_onnxruntime_genai(genai_checkout, settings)
    checks = check_everything(settings)
    rows = [{"check": c.name, "status": c.status, "found": c.detail, "fix": c.fix or ""} for c in checks]
    create_table_artifact(rows, key="environment", description="slmops doctor")
    doctor.require(checks)
