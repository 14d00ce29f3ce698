"""Single files of MLflow's artifacts, from any byte on: what a download that goes on where it broke off needs."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from slmops.core.errors import TrackingError

BLOCK = 64 * 1024
"""Bytes read at a time, which is what a broken connection can lose."""
TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection counts as broken."""

_LATER = (408, 425, 429)  # client errors that the same request need not meet again


class NotGivenError(TrackingError):
    """The registry answers, and does not give the file: asking again changes nothing."""


def read(uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
    """Yield the bytes of one artifact file in blocks.

    Nothing is retried here: whoever reads knows how far it came, and asks again from there.

    Args:
        uri: MLflow's tracking URI.
        location: Artifact URI of the folder, as ``mlflow-artifacts:/1/models/m-.../artifacts``.
        path: The file below it, with forward slashes.
        offset: Bytes to leave out at the beginning. At or behind the end of the file nothing is yielded.

    Raises:
        NotGivenError: The registry does not have the file, or does not let us have it.
        TrackingError: The connection broke or stalled, or the server failed.
    """
    from slmops.tracking.client import talking

    with talking(uri):
        proxied = urlsplit(location).scheme == "mlflow-artifacts"
        yield from (_streamed if proxied else _copied)(uri, location, path, offset)


def _streamed(uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
    """From the server's own REST route, with the sign-in and TLS settings that MLflow has for it."""
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    # Compressed, the bytes would not be those that the offset counts.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
    response = http_request(
        get_default_host_creds(MlflowArtifactsRepository.resolve_uri(location, uri)),
        f"/{quote(path)}",
        "GET",
        max_retries=0,
        raise_on_status=False,
        timeout=TIMEOUT_S,
        extra_headers=headers,
        stream=True,
    )
    with response:
        if response.status_code == 416:  # the file ends before the offset
            return
        _check(response, uri, path)
        skip = 0 if response.status_code == 206 else offset
        for block in response.iter_content(BLOCK):
            if skip < len(block):
                yield block[skip:]
            skip = max(0, skip - len(block))


def _check(response: Any, uri: str, path: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in (404, 410):
        raise _gone(path)
    from slmops.tracking.client import without_password

    uri = without_password(uri)
    said = f"MLflow at {uri} answers {status} ({response.reason}) for {path}."
    if status in (401, 403):
        raise NotGivenError(
            said, "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if 300 <= status < 500 and status not in _LATER:
        raise NotGivenError(said, f"Is {uri} the address of an MLflow server that serves artifacts?")
    raise TrackingError(said, "The server's log says why.")


def _copied(uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
    """From a storage that MLflow's client reaches by itself: a folder, a bucket. It cannot begin in the middle."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with tempfile.TemporaryDirectory() as scratch:
        try:
            copy = get_artifact_repository(location, tracking_uri=uri).download_artifacts(path, scratch)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _gone(path) from error
            raise
        with Path(copy).open("rb") as file:
            file.seek(offset)
            while block := file.read(BLOCK):
                yield block


def _gone(path: str) -> NotGivenError:
    return NotGivenError(f"{path} is gone from the registry.", "Promote the variant again where it was made.")
