"""For all tests."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

TOGETHER = {
    "e2e/test_broken": "the demo model",  # one home, in which it has been converted
    "e2e/test_demo": "the demo model",
    "e2e/test_deploy": "the demo model",
    "e2e/test_retrain": "retraining",  # both start services, which look for a free port from the same one on
    "integration/test_retrain": "retraining",
}
LONGEST_FIRST = (
    "retraining",
    "the demo model",
    "e2e/test_faults",
    "integration/test_two_workers",
    "integration/test_convert",
    "integration/test_flow",
    "integration/test_proxy",
    "integration/test_stack",
)
"""So that no test process has a long one left when the other has nothing more to do."""


def pytest_configure() -> None:
    """Make Ctrl-C count: whoever runs the tests in the background has them, and their children, ignore it.

    Test processes that run side by side get a temporary folder each: with it a machine lock of their own.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(tempfile.gettempdir()) / f"slmops-tests-{os.getppid()}-{worker}"
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests have to run in one process: those of a file, and of some files together."""

    def group(item: pytest.Item) -> str:
        file = f"{item.path.parent.name}/{item.path.stem}"
        return TOGETHER.get(file, file)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(group(item), len(order)))
