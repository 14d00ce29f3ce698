"""For all tests."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path


def pytest_configure() -> None:
    """Make Ctrl-C count: whoever runs the tests in the background has them, and their children, ignore it.

    Test processes that run side by side get a temporary folder each: with it a machine lock of their own.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(tempfile.gettempdir()) / f"slmops-tests-{os.getppid()}-{worker}"
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
