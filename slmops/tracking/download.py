"""Files of a version from the registry: each goes on where it broke off, and counts only with the right SHA-256."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from slmops.core.errors import TrackingError
from slmops.core.files import sha256
from slmops.tracking import files as tracking_files
from slmops.tracking.files import NotGivenError

log = logging.getLogger(__name__)

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts that bring nothing; one that brings something begins the row anew."""
SAY_EVERY_S = 10.0
UNKNOWN_LIMIT = 16_000_000
"""Bytes that a file of unknown size may have."""


@dataclass(frozen=True)
class Origin:
    """Where the files of a version come from.

    Attributes:
        uri: MLflow's tracking URI.
        location: Artifact URI of the version's folder.
        label: What to call the version in messages.
    """

    uri: str
    location: str
    label: str


def part_of(folder: Path, name: str) -> Path:
    """Where the file ``name`` lies in a download folder, complete or not."""
    return folder / f"{name}.part"


def intact(path: Path, size: int | None, digest: str) -> bool:
    """Whether the file is there with this size (None: any) and this SHA-256."""
    return path.is_file() and size in (None, path.stat().st_size) and sha256(path) == digest


def fetch(origin: Origin, name: str, size: int | None, digest: str, folder: Path) -> Path:
    """Complete ``name`` in the download folder ``folder``, as :func:`part_of` calls it.

    Args:
        origin: Where it comes from.
        name: Path of the file in the version's folder, already checked.
        size: Its size in bytes, where that is known.
        digest: Its SHA-256.
        folder: Where earlier attempts may have left a part of it.

    Raises:
        TrackingError: The connection breaks again and again, the file is gone, or it is not what was promoted.
    """
    part = part_of(folder, name)
    part.parent.mkdir(parents=True, exist_ok=True)
    if intact(part, size, digest):
        return part
    if part.exists() and (part.stat().st_nlink > 1 or (size is not None and part.stat().st_size >= size)):
        part.unlink()  # nothing to go on from: it is whole and wrong, or another file that was linked here
    for attempt in (1, 2):
        _complete(origin, name, UNKNOWN_LIMIT if size is None else size, part)
        if intact(part, size, digest):
            return part
        part.unlink()
        if attempt == 1:
            log.warning(
                "%s of %s has not the SHA-256 that it should have: fetching all of it again", name, origin.label
            )
    raise TrackingError(
        f"{name} of {origin.label} was altered: what the registry gives has another SHA-256 than was promoted.",
        "Nothing of it was installed. Promote the variant again where it was made.",
    )


def _complete(origin: Origin, name: str, limit: int, part: Path) -> None:
    """Append to ``part`` until the file ends or has more than ``limit`` bytes."""
    failures = 0
    while True:
        before = size_of(part)
        try:
            _append(tracking_files.read(origin.uri, origin.location, name, before), part, name, limit)
        except NotGivenError as error:
            raise NotGivenError(f"{origin.label} cannot be had: {error.message}", error.fix) from error
        except TrackingError as error:
            failures = 1 if size_of(part) > before else failures + 1
            if failures > len(PAUSES_S):
                raise TrackingError(
                    f"{name} of {origin.label} broke off at {size_of(part) / 1e6:.1f} MB, "
                    f"and {len(PAUSES_S)} more attempts brought nothing. {error.message}",
                    "The next pull goes on where this one stopped.",
                ) from error
            pause = PAUSES_S[failures - 1]
            log.warning("%s broke off at %.1f MB, again in %g s: %s", name, size_of(part) / 1e6, pause, error.message)
            time.sleep(pause)
            continue
        # Some servers end a broken answer as if it were whole: only one that brings nothing more is the end.
        if size_of(part) >= limit or size_of(part) == before:
            return


def _append(blocks: Generator[bytes, None, None], part: Path, name: str, limit: int) -> None:
    said = time.monotonic()
    with part.open("ab") as out, closing(blocks):  # closed, a connection does not stay open
        for block in blocks:
            out.write(block)
            if out.tell() > limit:
                return
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                log.info("%s: %.0f of %.0f MB", name, out.tell() / 1e6, limit / 1e6)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
