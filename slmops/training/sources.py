"""Training data from wherever the user has them, copied to where nobody else changes them."""

import atexit
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from slmops.checkpoints.source import DEMO, MLFLOW_SCHEMES, Download
from slmops.core.errors import DataError, PrerequisiteError, SlmopsError, TrackingError
from slmops.core.files import remove_scratch, unreadable
from slmops.core.settings import Settings
from slmops.core.values import Frozen
from slmops.processes.children import reporting_full_disk
from slmops.training.examples import LONGEST_LINE, shown
from slmops.training.values import Retrain

DatasetRecords = Callable[[str], list[dict[str, Any]]]  # returns the records of an MLflow dataset, given its name

WEB_SCHEMES = ("http://", "https://")
MLFLOW_DATASET = "mlflow-dataset:"
EVALUATION_FILES = ("evaluation.jsonl", "evaluation.csv")
"""Names under which an evaluation set is found beside training data."""
LARGEST = 250_000_000  # bytes allowed for all training files together, and for an evaluation set
READ_TIMEOUT_S, DOWNLOAD_TIMEOUT_S = 30.0, 600.0
"""Seconds without a byte, and in total, after which a download is given up."""
_OFTEN = "Try again, or fetch the file yourself and give its path."


class Fetched(Frozen):
    """Copies of the raw files. They exist until this process ends."""

    source: str
    files: tuple[Path, ...]
    evaluation: Path


def fetch(request: Retrain, settings: Settings, *, download: Download, dataset: DatasetRecords) -> Fetched:
    """Copy the training files and the evaluation set. ``download`` fetches an MLflow artifact URI.

    It is a DataError if there are no such data, if there is no evaluation set, or if they are too large; a
    PrerequisiteError if the network failed, or the disk is full; and a TrackingError if MLflow does not return them.
    """
    source = request.data.strip()
    with reporting_full_disk(settings.home):
        # It lasts until this process ends, or until the next one starts if this one is killed.
        remove_scratch(settings.trainings)
        scratch = settings.trainings / f".{uuid.uuid4().hex[:8]}.{os.getpid()}.part"
        (scratch / "download").mkdir(parents=True)
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        files, beside = _find(source, scratch / "download", download, dataset)
        evaluation = _expanded(request.evaluation_set) if request.evaluation_set else beside
        if evaluation is None:
            raise DataError(
                f"There is no evaluation set for {public(source)}: questions that are not trained on.",
                f"Give one with --evaluation-set FILE, or put {' or '.join(EVALUATION_FILES)} beside the data.",
            )
        if len(files) > 1:  # a folder, which may hold the evaluation set under a name of the user's choice
            files = [file for file in files if file.resolve() != evaluation.resolve()]
        copies, room = [], LARGEST
        for file in files:
            copies.append(_copy(file, scratch / "training", room))
            room -= copies[-1].stat().st_size
        copy = _copy(evaluation, scratch / "evaluation", LARGEST, longest=LARGEST)
        shutil.rmtree(scratch / "download")
    return Fetched(source=public(source), files=tuple(copies), evaluation=copy)


def public(source: str) -> str:
    """A source as it may be shown: a URL without user, password, query and fragment, which may be secret.

    It is a DataError if it begins like a URL, and is not one.
    """
    if not source.startswith(WEB_SCHEMES):
        return source
    try:
        parts = urlsplit(source)
    except ValueError:
        raise DataError("The address of the training data is not a URL.", "Check it.") from None
    return shown(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


def _find(source: str, work: Path, download: Download, dataset: DatasetRecords) -> tuple[list[Path], Path | None]:
    """Return the training files, and the evaluation set that lies beside them."""
    if source == DEMO:
        return _local(Path(__file__).with_name("demo"))
    if source.startswith(MLFLOW_DATASET):
        file = work / "dataset.jsonl"
        lines = sorted(map(_line, dataset(source.removeprefix(MLFLOW_DATASET).strip())))
        file.write_text("".join(lines), encoding="utf-8", newline="")
        return [file], None
    if source.startswith(WEB_SCHEMES):
        _download(source, work / "data.jsonl")
        return [work / "data.jsonl"], None
    if not source.startswith(MLFLOW_SCHEMES):
        return _local(_expanded(Path(source)))
    try:
        root = download(source, work)
    except SlmopsError:
        raise
    except Exception as error:  # the clients of storage services raise errors of any class
        fix = "Check the URI and the tracking server (SLMOPS_TRACKING_URI)."
        raise DataError(f"MLflow does not return {source}: {error}", fix) from error
    files, beside = _local(root)
    if root.is_file():
        for name in EVALUATION_FILES:
            with suppress(TrackingError):  # MLflow just returned the training file, so this one does not exist
                return files, download(f"{source.rpartition('/')[0]}/{name}", work)
    return files, beside


def _download(url: str, file: Path) -> None:
    import httpx

    where = public(url)
    if "@" in urlsplit(url).netloc:
        fix = "Leave them out: they would end up in logs."
        raise DataError(f"The URL of {where} contains a name or a password.", fix)
    # httpx's timeout covers a single read, so data that trickle in would never time out.
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    try:
        with (
            httpx.Client(follow_redirects=True, max_redirects=5, timeout=READ_TIMEOUT_S) as client,
            client.stream("GET", url) as response,
            file.open("wb") as out,
        ):
            if not response.is_success:
                raise DataError(f"{where} answers {response.status_code} {response.reason_phrase}.", "Check the URL.")
            if "html" in response.headers.get("content-type", ""):
                raise DataError(f"{where} is a web page, not data.", "Give the address of the .jsonl file itself.")
            for block in response.iter_bytes():  # no block size: httpx would wait until a block is full
                out.write(block)
                if out.tell() > LARGEST:
                    raise DataError(f"{where} is too large: {LARGEST / 1e6:.0f} MB are allowed.", "Give fewer items.")
                if time.monotonic() > deadline:
                    raise PrerequisiteError(f"{where} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s.", _OFTEN)
    except httpx.TimeoutException:
        raise PrerequisiteError(f"{where} does not answer, or stopped halfway.", _OFTEN) from None
    except httpx.TransportError as error:
        raise PrerequisiteError(f"{where} cannot be fetched ({type(error).__name__}).", _OFTEN) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise DataError(f"{where} cannot be fetched ({type(error).__name__}).", "Check the URL.") from None


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {error}", "Give the whole path.") from None


def _copy(file: Path, folder: Path, room: int, longest: int = LONGEST_LINE) -> Path:
    """Copy a file up to the beginning of a line that is too long, where reading stops anyway."""
    folder.mkdir(exist_ok=True)
    copy = folder / file.name
    try:
        with file.open("rb") as lines, copy.open("wb") as out:
            while line := lines.readline(longest + 1):
                out.write(line)
                if out.tell() > room:
                    raise DataError(f"{file} is too large: {LARGEST / 1e6:.0f} MB are allowed.", "Give fewer items.")
                if len(line) > longest:
                    break
        return copy
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise DataError(*unreadable(error)) from None


def _local(root: Path) -> tuple[list[Path], Path | None]:
    """Return a file, or the files of a folder sorted by name, and the evaluation set beside them."""
    try:
        if root.is_dir():
            found = sorted(path for path in root.iterdir() if path.suffix.lower() == ".jsonl" and not path.is_dir())
            files = [path for path in found if path.name not in EVALUATION_FILES and not path.name.startswith(".")]
            if not files:
                raise DataError(f"{root} has no .jsonl files to train on.", "Put them directly into this folder.")
            return files, _beside(root)
        if not root.is_file():
            raise DataError(
                f"There is no such file or folder: {shown(str(root))}",
                f"Give a .jsonl file, a folder, a URL, an MLflow artifact URI, {MLFLOW_DATASET}NAME or '{DEMO}'.",
            )
        if root.suffix.lower() != ".jsonl":
            fix = "Write one JSON object per line, and let its name end in .jsonl."
            raise DataError(f"{root} is not a .jsonl file.", fix)
        return [root], _beside(root.parent)
    except OSError as error:
        raise DataError(*unreadable(error)) from None


def _beside(folder: Path) -> Path | None:
    return next((folder / name for name in EVALUATION_FILES if (folder / name).is_file()), None)


def _line(record: dict[str, Any]) -> str:
    """An MLflow record as a line of JSONL. The checks report keys that are missing or unknown."""
    inputs, answer = dict(record["inputs"]), record["expectations"].get("expected_response")
    if isinstance(inputs.get("messages"), list):
        inputs["messages"] = [*inputs["messages"], {"role": "assistant", "content": answer}]
    else:
        inputs["completion"] = answer
    # The id comes last: it differs between copies of a dataset, and the lines are sorted.
    return json.dumps({**dict(sorted(inputs.items())), "id": record["dataset_record_id"]}) + "\n"
