"""Training data from wherever the user has them, and the checked files that a training reads."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from slmops.checkpoints.source import MLFLOW_SCHEMES
from slmops.core import locks
from slmops.core.errors import DataError, PrerequisiteError, SlmopsError, TrackingError, TrainingError
from slmops.core.files import folder_appears_whole, remove_scratch, sha256, write_atomic
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Frozen
from slmops.evaluation import dataset as evaluation_sets
from slmops.evaluation.dataset import EvaluationSet
from slmops.processes import children
from slmops.training import checks, examples, tokens_worker, web
from slmops.training.examples import Example, Read, shown
from slmops.training.finetune import ENVIRONMENT
from slmops.training.values import DEMO, DataReport, Problem, Retrain, TrainingData

Download = Callable[[str, Path], Path]
"""Fetches an MLflow artifact URI into a folder and returns where it put it."""
Dataset = Callable[[str], list[dict[str, Any]]]
"""The records of an MLflow dataset, by its name."""

MLFLOW_DATASET = "mlflow-dataset:"
EVALUATION = ("evaluation.jsonl", "evaluation.csv")
"""What the evaluation set beside training data is called."""
LARGEST = 250_000_000
"""Bytes of all training files together, and of an evaluation set."""
SHOWN_PROBLEMS = 10
MANIFEST = "report.json"


class Fetched(Frozen):
    """Copies of the raw files, which are there until this process ends."""

    source: str
    files: tuple[Path, ...]
    evaluation: Path


class _Manifest(Frozen):
    """Content of :data:`MANIFEST`, which is written last."""

    data: TrainingData
    sha256: dict[str, str]


def fetch(request: Retrain, settings: Settings, *, download: Download, dataset: Dataset) -> Fetched:
    """Copy the training files and the evaluation set to where nobody else changes them.

    Args:
        request: What was asked for; its data and evaluation_set count here.
        settings: Where things are.
        download: Fetches an MLflow artifact URI.
        dataset: Gives the records of an MLflow dataset.

    Raises:
        DataError: There are no such data, no evaluation set, or they are too large.
        PrerequisiteError: The network or the disk is the reason.
        TrackingError: MLflow does not give them.
    """
    source = request.data.strip()
    with _disk(settings):
        scratch = _scratch(settings)
        files, beside = _find(source, scratch / "download", download, dataset)
        evaluation = _expanded(request.evaluation_set) if request.evaluation_set else beside
        if evaluation is None:
            raise DataError(
                f"There is no evaluation set for {public(source)}: questions that are not trained on.",
                f"Give one with --evaluation-set FILE, or put {' or '.join(EVALUATION)} beside the data.",
            )
        if len(files) > 1:  # of a folder, which may hold it under a name of its own
            files = [file for file in files if file.resolve() != evaluation.resolve()]
        (scratch / "training").mkdir()
        room = LARGEST
        for file in files:
            room -= _copy(file, scratch / "training" / file.name, room)
        (scratch / "evaluation").mkdir()
        copy = scratch / "evaluation" / evaluation.name
        _copy(evaluation, copy, LARGEST, longest=LARGEST)
        shutil.rmtree(scratch / "download")
    return Fetched(
        source=public(source), files=tuple(scratch / "training" / file.name for file in files), evaluation=copy
    )


def digest(fetched: Fetched) -> str:
    """SHA-256 over the training items in their order, whatever files they came in and however they are written.

    Bad lines count as what is wrong with them; :func:`prepare` is who refuses them.
    """
    return _digest(examples.read(fetched.files))


def prepare(fetched: Fetched, request: Retrain, checkpoint: Checkpoint, settings: Settings, name: str) -> TrainingData:
    """Check everything and write the files that a training reads, unless they are there already.

    Args:
        fetched: The raw files.
        request: Its training, leak_similarity and matcher count here.
        checkpoint: Whose tokenizer and chat template count the tokens.
        settings: Where things are.
        name: The model's, for logs.

    Raises:
        DataError: Items cannot be used, each named with its file, its line and the reason.
        UsageError: The evaluation set has bad lines.
        TrainingError: The tokenizer crashed.
    """
    read = examples.read(fetched.files)
    questions = evaluation_sets.load(fetched.evaluation, matcher=request.matcher, judge=settings.judge_configured)
    target = settings.trainings / "data" / _key(fetched, read, questions, request, checkpoint)
    with _disk(settings), locks.exclusive(settings.locks / "data.lock", "the checks of training data", wait=True):
        if (ready := _load(target)) is not None:
            return ready
        shutil.rmtree(target, ignore_errors=True)
        return _make(fetched, read, questions, request, checkpoint, settings, name, target)


def _make(
    fetched: Fetched,
    read: Read,
    questions: EvaluationSet,
    request: Retrain,
    checkpoint: Checkpoint,
    settings: Settings,
    name: str,
    target: Path,
) -> TrainingData:
    kept, duplicates = checks.unique(read.examples)
    tokens, unusable = _tokens(kept, request, checkpoint, settings, name) if kept else ([], [])
    found = [*read.problems, *unusable, *checks.leaks(kept, questions.items, request.leak_similarity)]
    _refuse(fetched, found, settings.logs / name / "data-problems.txt")
    if len(kept) < 2:
        raise DataError(
            f"{shown(fetched.source)} has {len(kept)} different items, and at least 2 are needed: one to train and "
            "one to validate with.",
            'A line of JSONL is an item: {"messages": [...]} or {"prompt": "...", "completion": "..."}.',
        )
    told = checks.shortened(duplicates) + checks.shortened(checks.alike(kept, request.leak_similarity))
    training, validation = checks.split(kept, request.training.validation_share, request.training.seed)
    evaluation = "evaluation.csv" if fetched.evaluation.suffix.lower() == ".csv" else "evaluation.jsonl"
    data = TrainingData(
        source=fetched.source,
        digest=_digest(read),
        train=target / "train.jsonl",
        validation=target / "validation.jsonl",
        evaluation=target / evaluation,
        evaluation_digest=questions.digest,
        report=DataReport(
            files=read.files,
            items=len(kept),
            evaluation_items=len(questions.items),
            dropped=len(duplicates),
            problems=tuple(told),
            tokens=_percentiles(tokens),
        ),
    )
    with folder_appears_whole(target) as scratch:
        _write(scratch / data.train.name, training)
        _write(scratch / data.validation.name, validation)
        shutil.copyfile(fetched.evaluation, scratch / evaluation)
        digests = {path.name: sha256(path) for path in scratch.iterdir()}
        write_atomic(scratch / MANIFEST, _Manifest(data=data, sha256=digests).model_dump_json(indent=2))
    return data


@contextmanager
def _disk(settings: Settings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PrerequisiteError(f"The disk of {settings.home} is full.", children.FREE_SPACE) from None
        raise


def _scratch(settings: Settings) -> Path:
    """A folder until this process ends; if it is killed, until the next one."""
    remove_scratch(settings.trainings)
    folder = settings.trainings / f".{uuid.uuid4().hex[:8]}.{os.getpid()}.part"
    (folder / "download").mkdir(parents=True)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _find(source: str, work: Path, download: Download, dataset: Dataset) -> tuple[list[Path], Path | None]:
    """The training files, and the evaluation set that lies beside them."""
    if source == DEMO:
        folder = Path(str(resources.files("slmops.training.demo")))
        return [folder / "train.jsonl"], _beside(folder)
    if source.startswith(MLFLOW_DATASET):
        file = work / "dataset.jsonl"
        file.write_text("".join(sorted(map(_line, dataset(source.removeprefix(MLFLOW_DATASET).strip())))), "utf-8")
        return [file], None
    if source.startswith(web.SCHEMES):
        web.download(source, work / "data.jsonl", LARGEST)
        return [work / "data.jsonl"], None
    if not source.startswith(MLFLOW_SCHEMES):
        return _local(_expanded(Path(source)))
    root = _artifact(source, work, download)
    files, beside = _local(root)
    return files, beside if root.is_dir() else _artifact_beside(source, work, download)


def public(source: str) -> str:
    """A source as it may be shown: the query of a URL often holds a key."""
    return web.public(source) if source.startswith(web.SCHEMES) else source


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {error}", "Give the whole path.") from None


def _copy(file: Path, copy: Path, room: int, longest: int = examples.LONGEST_LINE) -> int:
    """Copy up to, and with the beginning of, a line that is too long, at which reading stops anyway. Returns bytes."""
    try:
        with file.open("rb") as lines, copy.open("wb") as out:
            while line := lines.readline(longest + 1):
                out.write(line)
                if out.tell() > room:
                    raise DataError(f"{file} is too large: {LARGEST / 1e6:.0f} MB are allowed.", "Give fewer items.")
                if len(line) > longest:
                    break
            return out.tell()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise DataError(f"{file} cannot be read: {error.strerror}.", "Check the path and its permissions.") from None


def _local(root: Path) -> tuple[list[Path], Path | None]:
    """A file, or those of a folder in the order of their names, and the evaluation set beside them."""
    try:
        if root.is_dir():
            files = sorted(
                path
                for path in root.iterdir()
                if path.suffix.lower() == ".jsonl"
                and not (path.name in EVALUATION or path.name.startswith(".") or path.is_dir())
            )
            if not files:
                raise DataError(f"{root} has no .jsonl files to train on.", "Only those directly in it are looked at.")
            return files, _beside(root)
        if not root.is_file():
            raise DataError(
                f"There is no such file or folder: {shown(str(root))}",
                f"Give a .jsonl file, a folder, a URL, an MLflow artifact URI, {MLFLOW_DATASET}NAME or '{DEMO}'.",
            )
        if root.suffix.lower() != ".jsonl":
            raise DataError(f"{root} is no .jsonl file.", "Write one JSON object a line, and call the file so.")
        return [root], _beside(root.parent)
    except OSError as error:
        raise DataError(
            f"{shown(str(root))} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from None


def _beside(folder: Path) -> Path | None:
    return next((folder / name for name in EVALUATION if (folder / name).is_file()), None)


def _artifact(uri: str, target: Path, download: Download) -> Path:
    try:
        return download(uri, target)
    except SlmopsError:
        raise
    except Exception as error:  # the client libraries of storages raise what they like
        raise DataError(
            f"MLflow does not give {uri}: {error}", "Check the URI and the tracking server (SLMOPS_TRACKING_URI)."
        ) from error


def _artifact_beside(uri: str, work: Path, download: Download) -> Path | None:
    """The evaluation set in the folder of an artifact that is a file."""
    for name in EVALUATION:
        with suppress(TrackingError):  # the training file could be had just now: there is none
            return download(f"{uri.rpartition('/')[0]}/{name}", work)
    return None


def _line(record: dict[str, Any]) -> str:
    """A record of MLflow as a line of JSONL. What it has of other keys, or has not, the checks say."""
    inputs, answer = dict(record["inputs"]), record["expectations"].get("expected_response")
    if isinstance(inputs.get("messages"), list):
        inputs["messages"] = [*inputs["messages"], {"role": "assistant", "content": answer}]
    else:
        inputs["completion"] = answer
    # The id last: it differs between copies of a dataset, and the lines are sorted.
    return json.dumps({**dict(sorted(inputs.items())), "id": record["dataset_record_id"]}) + "\n"


def _digest(read: Read) -> str:
    lines = [example.json for example in read.examples]
    lines += [f"{one.file}:{one.line}: {one.detail}" for one in read.problems]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _key(fetched: Fetched, read: Read, questions: EvaluationSet, request: Retrain, checkpoint: Checkpoint) -> str:
    """Folder name of prepared data: digest of all that goes in, and of what the report shows."""
    training = request.training
    went_in = {
        "source": fetched.source,
        "files": read.files,
        "data": _digest(read),
        "evaluation": [questions.digest, fetched.evaluation.suffix.lower() == ".csv"],
        "checkpoint": checkpoint.digest,
        "asked": [training.seed, training.validation_share, training.max_tokens, request.leak_similarity],
    }
    return hashlib.sha256(json.dumps(went_in, sort_keys=True).encode()).hexdigest()[:16]


def _tokens(
    kept: Sequence[Example], request: Retrain, checkpoint: Checkpoint, settings: Settings, name: str
) -> tuple[Sequence[int], list[Problem]]:
    """Tokens of each example, and the examples that the checkpoint cannot be trained with."""
    work = settings.work(name) / "data"
    log = settings.logs / name / "data.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        result, _ = children.call(
            "slmops.training.tokens_worker",
            tokens_worker.Request(checkpoint=checkpoint.path, items=_write(work / "items.jsonl", kept)),
            tokens_worker.Result,
            work=work,
            log=log,
            timeout_s=settings.training_timeout_s,
            error=TrainingError,
            env=ENVIRONMENT,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    limit = min(request.training.max_tokens, checkpoint.context_length)
    unusable = [kept[number].problem("schema", why) for number, why in result.refused.items()]
    unusable += [
        example.problem("oversized", f"{count} tokens, and {limit} are allowed (--training.max-tokens)")
        for example, count in zip(kept, result.tokens, strict=True)
        if count > limit
    ]
    return result.tokens, unusable


def _refuse(fetched: Fetched, found: Sequence[Problem], file: Path) -> None:
    """Raise if there are problems; the whole list goes into ``file``."""
    order = {path.name: number for number, path in enumerate(fetched.files)}
    lines = [
        f"{shown(one.file)}:{one.line}: {one.detail}" for one in sorted(found, key=lambda p: (order[p.file], p.line))
    ]
    if not lines:
        return
    write_atomic(file, "\n".join(lines) + "\n")
    more = f"\n  - and {len(lines) - SHOWN_PROBLEMS} more" if len(lines) > SHOWN_PROBLEMS else ""
    listed = "\n  - ".join(lines[:SHOWN_PROBLEMS])
    raise DataError(
        f"{shown(fetched.source)} cannot be trained on:\n  - {listed}{more}",
        f"Mend or remove these lines. All of them: {file}",
    )


def _write(file: Path, lines: Iterable[Example]) -> Path:
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(f"{example.json}\n" for example in lines)
    return file


def _percentiles(counts: Sequence[int]) -> dict[str, float]:
    """Of tokens: each the smallest count that so many percent of the items do not exceed."""
    ranked = sorted(counts)
    of = {f"p{percent}": ranked[-(-percent * len(ranked) // 100) - 1] for percent in (50, 90, 99)}
    return {"min": ranked[0], **of, "max": ranked[-1], "total": sum(ranked)}


def _load(folder: Path) -> TrainingData | None:
    """What a folder holds, if all of it is there as it was written; else None."""
    try:
        manifest = _Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        intact = all(sha256(folder / name) == digest for name, digest in manifest.sha256.items())
    except (OSError, ValueError):
        return None
    if not intact:
        return None
    # The home may have been moved.
    paths = {key: folder / getattr(manifest.data, key).name for key in ("train", "validation", "evaluation")}
    return manifest.data.model_copy(update=paths)
