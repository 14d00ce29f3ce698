"""The artifacts of one MLflow run as the place where the machines of a job leave files for each other.

The run is a child of the job's. It is deleted after the job, and ``mlflow gc`` then frees the space.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from slmops.tracking.client import KIND, PARENT, create_run, names_in, runs_of, talking, text_of

from mlflow import MlflowClient

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

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    with talking(uri):
        client = MlflowClient(uri)
        experiment = client.get_run(parent).info.experiment_id
        stale = []
        for run in runs_of(client, experiment, OF_FILES):
            job = run.data.tags.get(PARENT, parent)
            if job == parent or client.get_run(job).info.status != "RUNNING":
                _delete(client, run.info.run_id)
                stale.append(run.info.run_id)
        return create_run(client, experiment, OF_FILES, {PARENT: parent, KIND: OF_FILES}), stale


def close_run(uri: str, run_id: str) -> None:
    """Delete the run.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    with talking(uri):
        _delete(MlflowClient(uri), run_id)


def _delete(client: MlflowClient, run_id: str) -> None:
    client.set_terminated(run_id, "FINISHED")
    client.delete_run(run_id)


def location(uri: str, run_id: str) -> str:
    """The artifact URI of the run, as :func:`slmops.tracking.download.read` takes it.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such run.
    """
    with talking(uri):
        return str(MlflowClient(uri).get_run(run_id).info.artifact_uri)


def sizes(uri: str, run_id: str, folder: str) -> dict[str, int]:
    """Name and size in bytes of the files directly in a folder of the run's artifacts.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    with talking(uri):
        found = names_in(MlflowClient(uri), run_id, folder)
    return {path.rpartition("/")[2]: size for path, size in found.items()}


def upload(uri: str, run_id: str, path: Path, folder: str, name: str) -> None:
    """Put a file into a folder of the run's artifacts under another name.

    Raises:
        TrackingError: MLflow cannot be reached, or does not take it.
    """
    with talking(uri), tempfile.TemporaryDirectory() as scratch:
        renamed = Path(scratch) / name
        try:
            renamed.symlink_to(path.resolve())
        except OSError:  # Windows lets nobody make links by default
            shutil.copyfile(path, renamed)
        MlflowClient(uri).log_artifact(run_id, str(renamed), folder)


def write(uri: str, run_id: str, path: str, text: str) -> None:
    """Put a text file into the run's artifacts.

    Raises:
        TrackingError: MLflow cannot be reached, or does not take it.
    """
    with talking(uri):
        MlflowClient(uri).log_text(run_id, text, path)


def read(uri: str, run_id: str, path: str) -> str | None:
    """A text file of the run's artifacts; None if there is none.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    with talking(uri):
        client = MlflowClient(uri)
        listed = names_in(client, run_id, path.rpartition("/")[0])
        return text_of(client, run_id, path) if path in listed else None
