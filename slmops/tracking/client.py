"""What everything that talks to MLflow shares: the client, and its errors as ours.

Always with explicit run ids: MLflow's active run is thread-local, and a thread that logs "to the active run" silently
makes a new one. What MLflow has acknowledged is not read back.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import isfunction
from pathlib import Path
from typing import TypeVar

# Before mlflow is imported: nothing is sent, no progress bars, and a dead server is noticed in seconds. Files of an S3
# store go through the server, unless the environment says that this machine reaches the store's address, too.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from slmops.core.errors import TrackingError
from slmops.core.settings import Settings

T = TypeVar("T")

KIND = "slmops.kind"
"""Tag that says what slmops made: "model" (an experiment, a registered model), or what a run is of, such as "job"."""
PARENT, NOTE, FLOW_RUN = "mlflow.parentRunId", "mlflow.note.content", "slmops.prefect_flow_run"
REASON = "slmops.reason"
OF_CURVES = "curves/"  # how the names of curves begin; MLflow's charts have a section for each such prefix
TEXT_LIMIT = 6000  # characters that MLflow takes for a parameter
DIGEST_LENGTH = 12  # MLflow's pages allow 36 characters; the whole digest is in the data set's profile
_SIGN_IN = re.compile(r"//[^/\s]*@")
# The kind makes MLflow's page open with the runs instead of an empty dashboard for chat applications.
_EXPERIMENT = {KIND: "model", "mlflow.experimentKind": "custom_model_development"}


@contextmanager
def talking(uri: str) -> Iterator[None]:
    """Turn what goes wrong in a conversation with the MLflow server at ``uri`` into a TrackingError."""
    try:
        yield
    except (MlflowException, RequestException, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        # urllib3's words for these fill lines.
        if "error responses" in said:
            said = "each time it had an error of its own, which its log tells, such as a full disk"
        elif "ConnectionPool" in said:
            said = "it cannot be reached"
        elif "Connection broken" in said:
            said = "the connection broke"
        raise TrackingError(
            f"MLflow at {without_password(uri)} failed: {without_password(said)[:300]}",
            "Is it running? `slmops status` shows that, `slmops up` starts the local one.",
        ) from error


def without_password(text: str) -> str:
    """A text as it may be shown, with "***" for what signs in to the addresses in it."""
    return _SIGN_IN.sub("//***@", text)


def or_none(ask: Callable[[], T]) -> T | None:
    """What the registry is asked for; None if it has nothing of that name."""
    try:
        return ask()
    except MlflowException as error:
        # The second is said of an unknown alias, and of a name that cannot be one.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


class Client(MlflowClient):  # type: ignore[misc]  # MLflow has no types
    """MLflow's client of one server, and what we ask of it again and again; errors are MLflow's."""

    def __init__(self, uri: str) -> None:
        super().__init__(tracking_uri=uri, registry_uri=uri)

    def open_run(self, experiment: str, title: str, tags: Mapping[str, str]) -> str:
        return str(self.create_run(experiment, run_name=title, tags=dict(tags)).info.run_id)

    @contextmanager
    def only_run(self, experiment: str, title: str, tags: Mapping[str, str]) -> Iterator[str]:
        """Open a run for the block and close it after that; an earlier attempt of the same flow run is deleted."""
        if flow_run := tags.get(FLOW_RUN):
            for stale in self.runs_of(experiment, tags[KIND], f"tags.`{FLOW_RUN}` = '{flow_run}'"):
                self.delete_run(stale.info.run_id)
        run_id = self.open_run(experiment, f"{title} {stamp()}", tags)
        yield run_id
        self.set_terminated(run_id, "FINISHED")

    def runs_of(self, experiment: str, kind: str, *conditions: str) -> list[Run]:
        """The runs of a kind that meet MLflow's search conditions, the newest first."""
        return list(self.search_runs([experiment], " and ".join((f"tags.`{KIND}` = '{kind}'", *conditions))))

    def log_params(self, run_id: str, values: Mapping[str, object]) -> None:
        """Log parameters: text as it is, anything else as JSON."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        self.log_batch(run_id, params=[Param(key, text[:TEXT_LIMIT]) for key, text in texts.items()])

    def log_figures(self, run_id: str, figures: Mapping[str, float]) -> None:
        """Log single figures as metrics of this moment."""
        now = now_ms()
        self.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in figures.items()])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def set_version_tags(self, name: str, number: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.set_model_version_tag(name, number, key, value)

    def text_of(self, run_id: str, path: str) -> str:
        """The content of a text file among a run's artifacts."""
        with tempfile.TemporaryDirectory() as scratch:
            return Path(self.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")

    def files_in(self, run_id: str, folder: str | None = None) -> dict[str, int]:
        """Path and size in bytes of the files directly in a folder of a run's artifacts."""
        return {file.path: file.file_size or 0 for file in self.list_artifacts(run_id, folder) if not file.is_dir}

    def artifacts_of(self, model: str) -> str:
        """The artifact URI behind a ``models:/`` one.

        MLflow itself looks such a name up in the registry that the environment names, whatever address it is given.
        """
        # Undocumented, hence the pin of mlflow in pyproject.toml.
        from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        root, path = ModelsArtifactRepository.split_models_uri(model)
        match get_model_name_and_version(self, root):
            case name, version:
                location = self.get_model_version_download_uri(name, version)
            case (model_id,):
                location = self.get_logged_model(model_id).artifact_location
        return f"{location}/{path}" if path else location


class Connection:
    """One MLflow server, or a database; all public methods raise TrackingError if it cannot be reached, or refuses."""

    def __init_subclass__(cls) -> None:
        for name, method in tuple(vars(cls).items()):
            if isfunction(method) and not name.startswith("_"):
                setattr(cls, name, _talks(method))

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = Client(uri)
        self.shown = without_password(uri)  # its address as messages may have it

    def run_url(self, run_id: str) -> str:
        """The page of a run in MLflow's UI, in its view for models rather than for chat applications."""
        with talking(self.uri):
            return self._page(run_id, f"runs/{run_id}?")

    def _page(self, run_id: str, page: str) -> str:
        experiment = self._client.get_run(run_id).info.experiment_id
        return self._address(f"experiments/{experiment}/{page}workflowType=machine_learning")

    def _address(self, page: str) -> str:
        """A page of MLflow's UI, without the user name and password of the tracking URI: addresses get into logs."""
        return f"{_SIGN_IN.sub('//', Settings().mlflow_ui_url or self.uri).rstrip('/')}/#/{page}"

    def _experiment(self, name: str) -> str:
        """The id of a model's experiment, which is made or restored if need be."""
        known: Experiment | None = self._client.get_experiment_by_name(name)
        if known is None:
            return str(self._client.create_experiment(name, tags=_EXPERIMENT))
        if known.lifecycle_stage == "deleted":
            self._client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)


def _talks(method: Callable[..., T]) -> Callable[..., T]:
    """A method of a connection, in :func:`talking`."""

    @wraps(method)
    def talks(self: Connection, *args: object, **more: object) -> T:
        with talking(self.uri):
            return method(self, *args, **more)

    return talks


def stamp() -> str:
    """Now, as the names of runs show it."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def now_ms() -> int:
    """Now in milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


def dataset_input(name: str, digest: str, source: str, context: str) -> DatasetInput:
    """A data set as MLflow lists it among the inputs of a run: its SHA-256, its origin, what it was used for."""
    dataset = Dataset(
        name=name,
        digest=digest[:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({"sha256": digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
