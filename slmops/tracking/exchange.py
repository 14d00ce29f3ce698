"""The artifacts of one MLflow run as the place where the machines of a job leave files for each other.

The run is a child of the job's. It is deleted after the job, and ``mlflow gc`` then frees the space.
All functions raise TrackingError if MLflow cannot be reached, or refuses a request.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from slmops.tracking.client import KIND, PARENT, Client, talking

OF_FILES = "files"
"""The kind and the name of the run."""


def open_run(uri: str, parent: str) -> tuple[str, list[str]]:
    """Make the run for a job's files.

    Those of jobs that do not run any more, because they were killed, are deleted.

    Args:
        uri: MLflow's tracking URI.
        parent: The job's run. A run for files that an earlier attempt of it left behind is deleted, too.

    Returns:
        The new run's id, and the ids of those that were deleted.
    """
    with talking(uri):
        client = Client(uri)
        experiment = client.get_run(parent).info.experiment_id
        stale = []
        for run in client.runs_of(experiment, OF_FILES):
            job = run.data.tags.get(PARENT, parent)
            if job == parent or client.get_run(job).info.status != "RUNNING":
                _delete(client, run.info.run_id)
                stale.append(run.info.run_id)
        return client.open_run(experiment, OF_FILES, {PARENT: parent, KIND: OF_FILES}), stale


def close_run(uri: str, run_id: str) -> None:
    """Delete the run."""
    with talking(uri):
        _delete(Client(uri), run_id)


def _delete(client: Client, run_id: str) -> None:
    client.set_terminated(run_id, "FINISHED")
    client.delete_run(run_id)


def location(uri: str, run_id: str) -> str:
    """The artifact URI of the run, as :func:`slmops.tracking.download.read` takes it."""
    with talking(uri):
        return str(Client(uri).get_run(run_id).info.artifact_uri)


def sizes(uri: str, run_id: str, folder: str) -> dict[str, int]:
    """Name and size in bytes of the files directly in a folder of the run's artifacts."""
    with talking(uri):
        found = Client(uri).files_in(run_id, folder)
    return {path.rpartition("/")[2]: size for path, size in found.items()}


def upload(uri: str, run_id: str, path: Path, folder: str, name: str) -> None:
    """Put a file into a folder of the run's artifacts under another name."""
    with talking(uri), tempfile.TemporaryDirectory() as scratch:
        renamed = Path(scratch) / name
        try:
            renamed.symlink_to(path.resolve())
        except OSError:  # Windows lets nobody make links by default
            shutil.copyfile(path, renamed)
        Client(uri).log_artifact(run_id, str(renamed), folder)


def write(uri: str, run_id: str, path: str, text: str) -> None:
    """Put a text file into the run's artifacts."""
    with talking(uri):
        Client(uri).log_text(run_id, text, path)


def read(uri: str, run_id: str, path: str) -> str | None:
    """A text file of the run's artifacts; None if there is none."""
    with talking(uri):
        client = Client(uri)
        listed = client.files_in(run_id, path.rpartition("/")[0])
        return client.text_of(run_id, path) if path in listed else None
