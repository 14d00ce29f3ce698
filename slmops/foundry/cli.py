"""The ``foundry`` command, which exists on Windows and macOS only: does it see what we placed?"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from slmops.errors import RegistrationError

TIMEOUT_S = 60
# An absolute folder behind some words, as in "Cache directory path: C:\Users\Jo Doe\.foundry"; it may hold blanks.
_FOLDER = re.compile(r"(?:^|\s)((?:[A-Za-z]:[\\/]|[\\/~]).*\S)", re.MULTILINE)


def confirm(called: str, models: Path) -> bool | None:
    """Ask ``foundry cache ls`` for the model ``called``, with the cache folder ``models`` for the time of asking.

    Returns:
        True if it is listed; None where there is no ``foundry`` command.

    Raises:
        RegistrationError: The command exists and does not list the model.
    """
    if shutil.which("foundry") is None:
        return None
    said = _foundry("cache", "location")
    found = _FOLDER.findall(said)
    if not found:
        raise RegistrationError(f"`foundry cache location` names no folder to go back to. It says: {said.strip()}")
    _foundry("cache", "cd", str(models))
    try:
        listed = _foundry("cache", "ls")
    finally:
        _foundry("cache", "cd", found[-1])
    # Not as the end of a longer name: bot-int4 is no support-bot-int4.
    if not re.search(rf"(?<![\w.-]){re.escape(called)}", listed):
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
