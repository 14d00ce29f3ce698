"""Files from MLflow's artifacts: each goes on where it broke off, and counts only with the right SHA-256.

MLflow takes seconds to import, and what is on a device is found without it: here functions import it.
"""

import logging
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from slmops.core.errors import TrackingError
from slmops.core.files import intact

if TYPE_CHECKING:
    from requests import Response

log = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 1024  # bytes read at a time, which is what a broken connection can lose
STALLED_S = 120.0
"""Seconds without a byte after which a connection counts as broken; the server may be fetching the file from S3."""
RESUME_AFTER_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts that bring nothing; one that brings something starts again with the first."""
SAY_EVERY_S = 10.0
UNKNOWN_LIMIT = 16_000_000  # bytes that a file of unknown size may have

_LATER = (408, 425, 429)  # client errors that the same request need not meet again


class NotGivenError(TrackingError):
    """MLflow answers, and does not give the file: asking again changes nothing."""


@dataclass(frozen=True)
class Origin:
    """Where files come from: MLflow's tracking URI, the artifact URI of their folder, and what to call them."""

    uri: str
    location: str
    label: str


def part_of(folder: Path, name: str) -> Path:
    """Where the file ``name`` lies in a download folder, complete or not."""
    return folder / f"{name}.part"


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def fetch(origin: Origin, name: str, size: int | None, digest: str, folder: Path) -> Path:
    """Complete ``name`` in the download folder ``folder``, as :func:`part_of` calls it.

    The name is already checked; ``size`` is in bytes, where that is known, and ``digest`` the SHA-256. It is a
    NotGivenError if the file is gone, or access is refused; and another TrackingError if the connection breaks again
    and again, or the content has another SHA-256.
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
            log.warning("%s of %s has the wrong SHA-256: fetching all of it again", name, origin.label)
    said = f"{name} of {origin.label} was altered: it has another SHA-256 than when it was stored."
    raise TrackingError(said, "Nothing of it was installed. Promote the variant again on the machine that made it.")


def _complete(origin: Origin, name: str, limit: int, part: Path) -> None:
    """Append to ``part`` until the file ends or has more than ``limit`` bytes."""
    failures = 0
    while True:
        before = size_of(part)
        try:
            _append(read(origin.uri, origin.location, name, before), part, name, limit)
        except NotGivenError as error:
            raise NotGivenError(f"{origin.label} cannot be fetched: {error.message}", error.fix) from error
        except TrackingError as error:
            failures = 1 if size_of(part) > before else failures + 1
            size_mb = size_of(part) / 1e6
            if failures > len(RESUME_AFTER_S):
                said = f"{name} of {origin.label} broke off at {size_mb:.1f} MB, and more attempts failed."
                fix = "The next pull goes on where this one stopped."
                raise TrackingError(f"{said} {error.message}", fix) from error
            pause = RESUME_AFTER_S[failures - 1]
            log.warning("%s broke off at %.1f MB, again in %g s: %s", name, size_mb, pause, error.message)
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


def read(uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
    """Yield the bytes of one artifact file behind the first ``offset`` in blocks; errors are those of :func:`fetch`.

    Nothing is retried here: whoever reads knows how far it came.
    """
    from slmops.tracking.client import talking

    with talking(uri):
        served = urlsplit(location).scheme == "mlflow-artifacts"
        yield from (_from_server if served else _from_storage)(uri, location, path, offset)


def _from_server(uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
    # Compressed, the bytes would not be those that the offset counts.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
    with _answer(uri, location, path, headers) as response:
        if response.status_code == 416:  # the file ends before the offset
            return
        _check(response, uri, path)
        skip = 0 if response.status_code == 206 else offset
        for block in response.iter_content(BLOCK_BYTES):
            if skip < len(block):
                yield block[skip:]
            skip = max(0, skip - len(block))


def _answer(uri: str, location: str, path: str, headers: Mapping[str, str]) -> "Response":
    """What the server says to a request for a file, or the S3 store that it points to.

    MLflow knows no ranges of what lies in S3: the server fetches the whole file before it sends the first byte. So a
    machine that reaches the store's address is better told so, by the variable of MLflow.
    """
    import requests
    from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD as DIRECT

    # Undocumented, hence the pin of mlflow in pyproject.toml. Documented functions fetch whole files only, and these
    # sign in as all of MLflow does: by environment variables, its file of credentials, or plugins.
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    from slmops.tracking import client  # noqa: F401 - it comes before mlflow

    def ask(address: str, route: str) -> "Response":
        given: dict[str, Any] = {"max_retries": 0, "raise_on_status": False, "timeout": STALLED_S, "stream": True}
        said: Response = http_request(get_default_host_creds(address), route, "GET", extra_headers=headers, **given)
        return said

    files = MlflowArtifactsRepository(location, uri)
    if DIRECT.get():
        with ask(*files._construct_artifact_uri_and_path("/mlflow-artifacts/presigned", quote(path))) as signed:
            if signed.status_code != 501:  # so says a server whose files lie in a folder
                _check(signed, uri, path)
                url, more = signed.json()["url"], signed.json()["headers"]
                return requests.get(url, headers={**more, **headers}, timeout=STALLED_S, stream=True)
    return ask(files.artifact_uri, f"/{quote(path)}")


def _check(response: "Response", uri: str, path: str) -> None:
    from slmops.tracking.client import without_password

    status, asked = response.status_code, urlsplit(response.url).netloc.rpartition("@")[2]
    if status in (200, 206):
        return
    # The second is MLflow's answer if its S3 store has no such file.
    if status in (404, 410) or (status == 500 and "(404)" in response.text):
        raise _gone(path)
    server = without_password(uri)
    who = f"MLflow at {server}" if urlsplit(uri).netloc.endswith(asked) else f"The store at {asked}"
    said = f"{who} answers {status} ({response.reason}) for {path}."
    if status in (401, 403):
        fix = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        raise NotGivenError(said, fix)
    if 300 <= status < 500 and status not in _LATER:
        raise NotGivenError(said, f"Is {server} the address of an MLflow server that serves artifacts?")
    raise TrackingError(said, "The server's log says why.")


def _from_storage(uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
    """From what MLflow's client reaches by itself: a folder, a bucket. It cannot begin in the middle."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        try:
            copy = download_artifacts(f"{location}/{path}", dst_path=scratch, tracking_uri=uri)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _gone(path) from error
            raise
        with Path(copy).open("rb") as file:
            file.seek(offset)
            while block := file.read(BLOCK_BYTES):
                yield block


def _gone(path: str) -> NotGivenError:
    return NotGivenError(f"{path} is gone from the registry.", "Promote the variant again on the machine that made it.")
