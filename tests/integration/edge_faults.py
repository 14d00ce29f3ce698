"""Cases that do what no runtime should, for a child process that is asked to go through them."""

import os
import signal
import time

from slmops.evaluation.edge_cases import Observation, Probe


def dies(_: Probe) -> Observation:
    """As on a bad access in native code."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def leaves(_: Probe) -> Observation:
    """As a library that calls exit."""
    os._exit(0)


def hangs(_: Probe) -> Observation:
    """It never ends."""
    while True:
        time.sleep(60)


def breaks(_: Probe) -> Observation:
    """An error that is not a refusal."""
    raise RuntimeError("the kernel found no memory")
