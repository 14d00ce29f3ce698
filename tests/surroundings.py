"""The environment of a test: nothing of what a developer has set."""

import os
from pathlib import Path

import pytest


def clear(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Unset all variables that slmops, Prefect and MLflow read, and go where there is no .env."""
    patch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(("SLMOPS_", "PREFECT_", "MLFLOW_")):
            patch.delenv(name)
