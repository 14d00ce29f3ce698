"""Files that travel between the machines of a job: through MLflow's artifact store, by their SHA-256.

What is there is not sent again, and what is in this machine's cache is not fetched again. A file counts only with the
SHA-256 that it was announced with, whoever had it in between.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel

from slmops.core.errors import TrackingError, WorkError
from slmops.core.files import link_or_copy, sha256, stays_below
from slmops.core.locks import exclusive
from slmops.core.settings import Settings
from slmops.core.values import VariantFile
from slmops.tracking import download
from slmops.tracking import exchange as tracking_exchange
from slmops.tracking.download import NotGivenError

_FILES, _RESULTS = "files", "results"
KEPT_S = 24 * 3600.0
"""Seconds that the cache keeps a file that nothing else of this home uses."""


class Exchange:
    """The files of one job. All methods raise TrackingError if MLflow cannot be reached or does not take a file.

    Args:
        uri: MLflow's tracking URI, as this machine knows it.
        run_id: The MLflow run, made by :func:`slmops.tracking.exchange.open_run`.
        settings: Where the cache is.
    """

    def __init__(self, uri: str, run_id: str, settings: Settings) -> None:
        self.uri = uri
        self.run_id = run_id
        self._settings = settings
        self._cache = settings.home / "exchange"
        self._location: str | None = None

    def put(self, paths: Mapping[str, Path]) -> tuple[VariantFile, ...]:
        """Send the files that are not there yet.

        Args:
            paths: Each by the name that it will have where it is fetched, with forward slashes.
        """
        files = tuple(
            VariantFile(name=name, size=path.stat().st_size, sha256=sha256(path)) for name, path in paths.items()
        )
        there = tracking_exchange.sizes(self.uri, self.run_id, _FILES)
        for file in files:
            # A server may have kept the beginning of an upload that broke off.
            if there.get(file.sha256) != file.size:
                tracking_exchange.upload(self.uri, self.run_id, paths[file.name], _FILES, file.sha256)
                there[file.sha256] = file.size
        return files

    def get(self, file: VariantFile) -> Path:
        """The file in this machine's cache, fetched if need be; only to be read.

        Raises:
            WorkError: The exchange does not have it, for example because the job has ended meanwhile.
            TrackingError: MLflow gives something else.
        """
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise WorkError(f"{file.name!r} was announced with something that is not a SHA-256.")
        cached = self._cache / file.sha256
        with exclusive(self._settings.locks / "exchange.lock", "the files from other machines", wait=True):
            if not download.intact(cached, file.size, file.sha256):
                cached.unlink(missing_ok=True)
                self._fetch(file).replace(cached)
            os.utime(cached)
        return cached

    def bring(self, files: Iterable[VariantFile], folder: Path) -> None:
        """Put files into a folder under their own names.

        Raises:
            WorkError: A name leads out of the folder; or as :meth:`get`.
        """
        for file in files:
            target = folder / _checked(file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            link_or_copy(self.get(file), target)

    def leave(self, name: str, result: BaseModel) -> None:
        """Write a result, the last thing that a part of the job does."""
        text = json.dumps(result.model_dump(mode="json"))  # pydantic's own JSON has null for what is not finite
        tracking_exchange.write(self.uri, self.run_id, f"{_RESULTS}/{name}.json", text)

    def result(self, name: str) -> str | None:
        """What :meth:`leave` wrote under this name; None: nothing yet."""
        return tracking_exchange.read(self.uri, self.run_id, f"{_RESULTS}/{name}.json")

    def _fetch(self, file: VariantFile) -> Path:
        downloads = self._cache / "downloads"
        try:
            if self._location is None:
                self._location = tracking_exchange.location(self.uri, self.run_id)
            origin = download.Origin(self.uri, self._location, "this job's files")
            return download.fetch(origin, f"{_FILES}/{file.sha256}", file.size, file.sha256, downloads)
        except NotGivenError as error:
            raise WorkError(
                f"{file.name} is not among this job's files: {error.message}", "Start the job again."
            ) from error
        except TrackingError as error:
            raise TrackingError(f"{file.name} could not be fetched: {error.message}", error.fix) from error


def prune(settings: Settings) -> None:
    """Remove what was in the cache for a day and has no link from elsewhere in this home: a checkpoint, a variant."""
    for path in (settings.home / "exchange").glob("*"):
        try:
            stat = path.stat()
            if path.is_file() and stat.st_nlink == 1 and time.time() - stat.st_mtime > KEPT_S:
                path.unlink()
        except FileNotFoundError:
            continue  # another process was faster
    for part in (settings.home / "exchange" / "downloads").rglob("*.part"):
        if time.time() - part.stat().st_mtime > KEPT_S:
            part.unlink(missing_ok=True)


def _checked(name: str) -> str:
    if not stays_below(name):
        raise WorkError(f"A file of this job is called {name!r}, which is not a name below a folder.")
    return name
