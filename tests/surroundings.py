"""The environment of a test: nothing of what a developer has set, and nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def clear(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Unset all variables that slmops, Prefect and MLflow read, and go where there is no .env."""
    patch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(("SLMOPS_", "PREFECT_", "MLFLOW_")):
            patch.delenv(name)


def imported(program: str) -> set[str]:
    """The packages that are there when a program has run."""
    program += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())
