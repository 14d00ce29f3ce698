"""Files: written so that nobody ever sees half of one, on every system, and the tables that a user writes."""

import getpass
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops.core.errors import UsageError

log = logging.getLogger(__name__)

LARGE_BYTES = 1_000_000
PAUSES_S = (0.02, 0.05, 0.1, 0.3, 1.0) if sys.platform == "win32" else ()
"""Windows does not move a file that is open, as a new one is for a moment in a virus scanner."""

_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` in one step; its lines end as they do in the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        move(part, path)
    finally:
        part.unlink(missing_ok=True)


def move(source: Path, target: Path) -> Path:
    """Rename a file, which replaces one at ``target``, or a folder. While Windows refuses, it is tried again."""
    for pause in PAUSES_S:
        with suppress(PermissionError):
            return source.replace(target)
        time.sleep(pause)
    return source.replace(target)


def account() -> str:
    """The name of the user that this process runs as."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        return "somebody"


def unreadable(error: OSError) -> tuple[str, str]:
    """Message and fix of an error about a file or folder that cannot be read: which, why, and for which user."""
    path = Path(os.fsdecode(error.filename or "a file"))  # what breaks in the middle of a file does not name it
    if not isinstance(error, PermissionError) or not hasattr(os, "getuid"):
        return f"{path} cannot be read: {error.strerror}.", "Check the path, its permissions and its disk."
    user = f"the user {account()} ({os.getuid()})"
    return f"{path} may not be read by {user}.", f"On the machine that has it: chmod -R a+rX {path.parent}"


def keep_log(log: Path) -> None:
    """Make room for a new log: the one before gets ``.1`` added, unless somebody writes it and Windows refuses."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError, PermissionError):
        move(log, log.with_name(f"{log.name}.1"))


@contextmanager
def folder_appears_whole(target: Path) -> Iterator[Path]:
    """Yield a folder beside ``target``, which becomes it if the block succeeds and no other process was faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        try:
            move(scratch, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a folder in ``parent`` that is gone afterwards, as are those that killed processes left there."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_scratch(parent)
    with TemporaryDirectory(prefix=f".{name}.", suffix=f".{os.getpid()}.part", dir=parent) as scratch:
        yield Path(scratch)


def remove_scratch(parent: Path) -> None:
    """Remove the scratch folders that killed processes left in ``parent``."""
    import psutil

    for scratch in parent.glob(".*.part"):
        pid = scratch.name.split(".")[-2]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(scratch, ignore_errors=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_json(value: object) -> str:
    """SHA-256 of a value as JSON, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def intact(path: Path, size: int | None, digest: str, origin: Path | None = None) -> bool:
    """Whether the file is there with this size in bytes (None: any) and SHA-256; a link to ``origin`` is not read."""
    if not path.is_file() or size not in (None, path.stat().st_size):
        return False
    return (origin is not None and origin.exists() and path.samefile(origin)) or sha256(path) == digest


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link ``source`` to ``target``; copy where the file system cannot link, and say so of a large file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source.resolve())
    except OSError as error:
        shutil.copy2(source, target)
        if target.stat().st_size > LARGE_BYTES:
            log.warning("%s is a copy, since it cannot be a link: %s", target, error.strerror)


def read_table(path: Path, what: str) -> dict[str, Any]:
    """What a user's file holds, TOML or JSON by its suffix, else YAML; the UsageError for a bad one names ``what``."""
    import yaml

    try:
        text = path.expanduser().read_text(encoding="utf-8")
        parse = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix.lower(), yaml.safe_load)
        table = parse(text)
    except (OSError, RuntimeError, ValueError, yaml.YAMLError) as error:  # RuntimeError: ~ of nobody
        said = " ".join(str(error).split())
        raise UsageError(f"The {what} {path} cannot be read: {said}", "Give a TOML, JSON or YAML file.") from None
    if not isinstance(table, dict) or not table:
        raise UsageError(f"The {what} {path} has no keys and values.", "Write them as key: value, or as TOML.")
    return table


def reserved(name: str) -> bool:
    """Whether a file or folder of this name is a device on Windows, such as ``nul`` and ``aux.json``."""
    return _DEVICES.fullmatch(name) is not None


def stays_below(name: str) -> bool:
    """Whether a path with forward slashes can be anywhere, and stays where it is put, on any system.

    Backslashes and colons are for Windows, which also leaves out dots and blanks at the end: "..." is "..".
    """
    parts = name.split("/")
    possible = all(part and part == part.rstrip(" .") and not reserved(part) for part in parts)
    return possible and not re.search(r'[\\:<>"|?*\x00-\x1f]', name)
