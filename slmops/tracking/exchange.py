"""Files that travel between the machines of a job: as artifacts of one MLflow run, by their SHA-256.

What is there is not sent again, and what is in this home's store is not fetched again. A file counts only with the
SHA-256 that it was announced with, whoever had it in between. The run is a child of the job's. It is deleted after the
job, and ``mlflow gc`` then frees the space.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from slmops.tracking.client import KIND, PARENT, Client, talking

from pydantic import BaseModel

from slmops.core import blobs
from slmops.core.errors import TrackingError, WorkError
from slmops.core.files import link_or_copy, move, sha256, stays_below
from slmops.core.locks import exclusive
from slmops.core.settings import Settings
from slmops.core.values import VariantFile
from slmops.tracking import download
from slmops.tracking.download import NotGivenError

OF_FILES = "files"  # the kind and the name of the run, and the folder of its files


class Exchange:
    """The files of one job, in the run ``run_id`` that :meth:`open` made; all methods talk to MLflow."""

    def __init__(self, uri: str, run_id: str, settings: Settings) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = Client(uri)
        self._settings = settings
        self._location: str | None = None

    @classmethod
    def open(cls, uri: str, parent: str, settings: Settings) -> tuple[Self, list[str]]:
        """Make the place for the files of the job with the run ``parent``; returns it and the runs that were deleted.

        Deleted are those that an earlier attempt of it left behind, and those of jobs that were killed.
        """
        with talking(uri):
            client = Client(uri)
            experiment = client.get_run(parent).info.experiment_id
            stale = []
            for run in client.runs_of(experiment, OF_FILES):
                job = run.data.tags.get(PARENT, parent)
                if job == parent or client.get_run(job).info.status != "RUNNING":
                    stale.append(run.info.run_id)
                    cls(uri, stale[-1], settings).close()
            made = client.open_run(experiment, OF_FILES, {PARENT: parent, KIND: OF_FILES})
        return cls(uri, made, settings), stale

    def close(self) -> None:
        """Delete the place with all its files."""
        with talking(self.uri):
            self._client.set_terminated(self.run_id, "FINISHED")
            self._client.delete_run(self.run_id)

    def put(self, paths: Mapping[str, Path]) -> tuple[VariantFile, ...]:
        """Send the files that are not there yet; each is called as it will be where it is fetched."""
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        files = tuple(VariantFile(name=name, size=sizes[name], sha256=sha256(path)) for name, path in paths.items())
        with talking(self.uri), tempfile.TemporaryDirectory() as scratch:
            there = self._client.files_in(self.run_id, OF_FILES)
            for file in files:
                # A server may have kept the beginning of an upload that broke off.
                if there.get(f"{OF_FILES}/{file.sha256}") == file.size:
                    continue
                path, renamed = paths[file.name], Path(scratch) / file.sha256
                try:
                    renamed.symlink_to(path.resolve())
                except OSError:  # Windows lets nobody make links by default
                    shutil.copyfile(path, renamed)
                self._client.log_artifact(self.run_id, str(renamed), OF_FILES)
                there[f"{OF_FILES}/{file.sha256}"] = file.size
        return files

    def get(self, file: VariantFile) -> Path:
        """The file in this home's store, only to be read; a WorkError if it is not there and the job has ended."""
        with exclusive(self._settings.locks / "exchange.lock", "the files from other machines", wait=True):
            found = blobs.find(file, self._settings)
            return found or move(self._fetch(file), self._settings.blobs / file.sha256)

    def bring(self, files: Iterable[VariantFile], folder: Path) -> None:
        """Put files into a folder under their own names; a WorkError if one leads out of it, or as in :meth:`get`."""
        for file in files:
            if not stays_below(file.name):
                raise WorkError(f"A file of this job is called {file.name!r}, which is not a name below a folder.")
            target = folder / file.name
            target.unlink(missing_ok=True)
            link_or_copy(self.get(file), target)

    def leave(self, name: str, result: BaseModel) -> None:
        """Write a result, the last thing that a part of the job does."""
        text = json.dumps(result.model_dump(mode="json"))  # pydantic's own JSON has null for what is not finite
        with talking(self.uri):
            self._client.log_text(self.run_id, text, f"results/{name}.json")

    def result(self, name: str) -> str | None:
        """What :meth:`leave` wrote under this name; None: nothing yet."""
        path = f"results/{name}.json"
        with talking(self.uri):
            there = path in self._client.files_in(self.run_id, "results")
            return self._client.text_of(self.run_id, path) if there else None

    def _fetch(self, file: VariantFile) -> Path:
        try:
            if self._location is None:
                with talking(self.uri):
                    self._location = str(self._client.get_run(self.run_id).info.artifact_uri)
            origin = download.Origin(self.uri, self._location, "this job's files")
            path = f"{OF_FILES}/{file.sha256}"
            return download.fetch(origin, path, file.size, file.sha256, self._settings.blobs / "downloads")
        except NotGivenError as error:
            said = f"{file.name} is not among this job's files: {error.message}"
            raise WorkError(said, "Start the job again.") from error
        except TrackingError as error:
            raise TrackingError(f"{file.name} could not be fetched: {error.message}", error.fix) from error
