"""The ``foundry`` command, which exists on Windows and macOS only: does it see what we placed?"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from slmops.errors import RegistrationError

TIMEOUT_S = 60


def confirm(called: str, models: Path) -> bool | None:
    """Ask ``foundry cache ls`` for the model ``called``, with the cache folder ``models`` for the time of asking.

    Returns:
        True if it is listed; None where there is no ``foundry`` command.

    Raises:
        RegistrationError: The command exists and does not list the model.
    """
    if shutil.which("foundry") is None:
        return None
    before = _foundry("cache", "location").strip().rpartition(" ")[2]
    _foundry("cache", "cd", str(models))
    try:
        listed = _foundry("cache", "ls")
    finally:
        if before:
            _foundry("cache", "cd", before)
    if called not in listed:
        raise RegistrationError(f"`foundry cache ls` does not list {called} in {models}. It says: {listed.strip()}")
    return True


def _foundry(*arguments: str) -> str:
    program = shutil.which("foundry") or "foundry"
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistrationError(f"`foundry {' '.join(arguments)}` does not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RegistrationError(f"`foundry {' '.join(arguments)}` ended with status {done.returncode}: {said}")
    return done.stdout
