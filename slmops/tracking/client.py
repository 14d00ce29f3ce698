"""MLflow's client: set up before it is imported, and its failures as errors of ours."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before mlflow is imported: nothing is sent, no progress bars, and a dead server is noticed in seconds.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from slmops.core.errors import TrackingError


@contextmanager
def talking(uri: str) -> Iterator[None]:
    """Talk to the MLflow server at ``uri``.

    Raises:
        TrackingError: It cannot be reached, or refuses what was asked.
    """
    try:
        yield
    except (MlflowException, RequestException, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        # urllib3's words for these fill lines.
        if "ConnectionPool" in said:
            said = "it cannot be reached"
        elif "Connection broken" in said:
            said = "the connection broke"
        raise TrackingError(
            f"MLflow at {without_password(uri)} did not take or give what was asked: {said[:300]}",
            "Is it running? `slmops status` tells, `slmops up` starts the local one.",
        ) from error


def text_of(client: MlflowClient, run_id: str, path: str) -> str:
    """The content of a run's text file; MLflow's errors are the caller's."""
    with tempfile.TemporaryDirectory() as scratch:
        return Path(client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")


def without_password(uri: str) -> str:
    """A tracking URI as it may be shown.

    >>> without_password("https://me:secret@mlflow.example:5000")
    'https://***@mlflow.example:5000'
    """
    return re.sub(r"//[^/]*@", "//***@", uri)


def artifacts_of(client: MlflowClient, model: str) -> str:
    """The artifact URI behind a ``models:/`` one; MLflow's errors are the caller's.

    MLflow itself looks such a name up in the registry that the environment names, whatever address it is given.
    """
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    root, path = ModelsArtifactRepository.split_models_uri(model)
    match get_model_name_and_version(client, root):
        case name, version:
            location = client.get_model_version_download_uri(name, version)
        case (model_id,):
            location = client.get_logged_model(model_id).artifact_location
    return f"{location}/{path}" if path else location
