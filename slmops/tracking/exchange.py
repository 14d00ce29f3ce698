"""The artifacts of one MLflow run as the place where the machines of a job leave files for each other.

The run is a child of the job's. It is deleted after the job, and ``mlflow gc`` then frees the space.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from slmops.tracking import files as tracking_files
from slmops.tracking.client import talking  # first: it sets the environment that MLflow reads at import

# isort: split
from mlflow import MlflowClient

KIND, FILES = "slmops.kind", "files"
PARENT = "mlflow.parentRunId"


def open_run(uri: str, parent: str) -> tuple[str, list[str]]:
    """Make the run for a job's files.

    Those of jobs that do not run any more, because they were killed, are deleted.

    Args:
        uri: MLflow's tracking URI.
        parent: The job's run; one of its own from an attempt before is deleted, too.

    Returns:
        The new run's id, and the ids of those that were deleted.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    with talking(uri):
        client = MlflowClient(uri)
        experiment = client.get_run(parent).info.experiment_id
        stale = []
        for run in client.search_runs([experiment], f"tags.`{KIND}` = '{FILES}'"):
            job = run.data.tags.get(PARENT, parent)
            if job == parent or client.get_run(job).info.status != "RUNNING":
                _delete(client, run.info.run_id)
                stale.append(run.info.run_id)
        made = client.create_run(experiment, run_name=FILES, tags={PARENT: parent, KIND: FILES})
        return made.info.run_id, stale


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
    """The artifact URI of the run, as :func:`slmops.tracking.files.read` takes it.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such run.
    """
    with talking(uri):
        where: str = MlflowClient(uri).get_run(run_id).info.artifact_uri
        return where


def sizes(uri: str, run_id: str, folder: str) -> dict[str, int]:
    """Name and size in bytes of the files directly in a folder of the run's artifacts.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    with talking(uri):
        found = MlflowClient(uri).list_artifacts(run_id, folder)
        return {file.path.rpartition("/")[2]: file.file_size or 0 for file in found if not file.is_dir}


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
    """A text file of the run's artifacts; None: there is none.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    where = location(uri, run_id)
    folder, _, name = path.rpartition("/")
    if name not in sizes(uri, run_id, folder):
        return None
    with closing(tracking_files.read(uri, where, path, 0)) as blocks:
        return b"".join(blocks).decode("utf-8")
