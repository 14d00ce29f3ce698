"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Make Ctrl-C count: whoever runs the tests in the background has them, and their children, ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
