"""Locks that the kernel releases when their holder dies, with a note of who holds them."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from slmops.core.errors import BusyError, PrerequisiteError
from slmops.core.settings import Settings

log = logging.getLogger(__name__)

MACHINE = "this machine's conversions and measurements"


@contextmanager
def exclusive(path: Path, what: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock file at ``path``, whose folder is made, readable by this user alone.

    Messages call it ``what`` it stands for: "the measurement of this machine". With ``wait`` a holder is waited for,
    which is said; else it is a BusyError. It is a PrerequisiteError if the folder belongs to somebody else.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and path.parent.stat().st_uid != os.getuid():
        raise PrerequisiteError(
            f"{path.parent} belongs to another user.", "Remove it, or set TMPDIR to a folder of yours."
        )
    lock = FileLock(path)
    holder = path.with_suffix(".json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise BusyError(
                f"Another run holds {what} ({_who(holder)}).", "Wait until it has ended, or stop it, then try again."
            ) from None
        log.info("waiting for %s, held by another run (%s)", what, _who(holder))
        lock.acquire()
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}))
        yield
    finally:
        with suppress(OSError):  # on Windows somebody may be reading it
            holder.unlink()
        lock.release()


def machine(settings: Settings) -> AbstractContextManager[None]:
    """Hold this machine, to convert or to measure; whoever else does it has to wait."""
    return exclusive(settings.machine_lock, MACHINE, wait=True)


def _who(holder: Path) -> str:
    try:
        data = json.loads(holder.read_text())
        return f"process {data['pid']}, since {data['since']}"
    except (OSError, ValueError, KeyError):
        return "process unknown"
