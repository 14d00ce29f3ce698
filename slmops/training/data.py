"""The checked files that a training reads, made from training data as they were fetched."""

import hashlib
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from tabulate import tabulate

from slmops.core import locks
from slmops.core.errors import DataError, TrainingError
from slmops.core.files import digest_of_json, folder_appears_whole, sha256, write_atomic
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Frozen
from slmops.evaluation import dataset as evaluation_sets
from slmops.processes import children
from slmops.training import checks, examples, tokens_worker
from slmops.training.examples import Example, ExamplesRead, shown
from slmops.training.finetune import OFFLINE_ENVIRONMENT
from slmops.training.sources import Fetched
from slmops.training.values import DataProblem, DataReport, Retrain, TrainingData

PROBLEMS_IN_ERROR, DIGEST_CHARACTERS = 10, 16
REPORT_FILE = "report.json"


class _PreparedManifest(Frozen):
    """Content of :data:`REPORT_FILE`, which is written last."""

    data: TrainingData
    sha256: dict[str, str]


def digest(fetched: Fetched) -> str:
    """SHA-256 over the training items in their order, independent of files and formatting.

    A bad line counts as the problem that it has; :func:`prepare` refuses it later.
    """
    return _digest(examples.read(fetched.files))


def prepare(fetched: Fetched, request: Retrain, checkpoint: Checkpoint, settings: Settings, name: str) -> TrainingData:
    """Check everything, and write the files that a training reads unless they exist already.

    It is a DataError if items cannot be used, each named with its file, line and reason; a UsageError if the evaluation
    set has bad lines; and a TrainingError if the tokenizer, which counts the tokens, crashed.
    """
    questions = evaluation_sets.load(fetched.evaluation, matcher=request.matcher, judge=settings.judge_configured)
    read, training = examples.read(fetched.files), request.training
    is_csv = fetched.evaluation.suffix.lower() == ".csv"
    inputs = {  # including what only the report shows
        "source": fetched.source,
        "files": read.files,
        "data": _digest(read),
        "evaluation": [questions.digest, is_csv],
        "checkpoint": checkpoint.digest,
        "asked": [training.seed, training.validation_share, training.max_tokens, request.leak_similarity],
    }
    key = digest_of_json(inputs)[:16]
    target = settings.trainings / "data" / key
    with (
        children.reporting_full_disk(settings.home),
        locks.exclusive(settings.locks / "data.lock", "the checks of training data", wait=True),
    ):
        if (ready := _load(target)) is not None:
            return ready
        shutil.rmtree(target, ignore_errors=True)
        kept, duplicates = checks.unique(read.examples)
        tokens, unusable = _tokens(kept, request, checkpoint, settings, name) if kept else ([], [])
        found = [*read.problems, *unusable, *checks.leaks(kept, questions.items, request.leak_similarity)]
        _refuse(fetched, found, settings.logs / name / "data-problems.txt")
        if len(kept) < 2:
            raise DataError(
                f"{shown(fetched.source)} has {len(kept)} different items. At least 2 are needed: one to train with "
                "and one to validate with.",
                'Add items, one per line: {"messages": [...]} or {"prompt": "...", "completion": "..."}.',
            )
        notes = checks.shortened(duplicates) + checks.shortened(checks.alike(kept, request.leak_similarity))
        data = TrainingData(
            source=fetched.source,
            digest=_digest(read),
            train=target / "train.jsonl",
            validation=target / "validation.jsonl",
            evaluation=target / f"evaluation{'.csv' if is_csv else '.jsonl'}",
            evaluation_digest=questions.digest,
            report=DataReport(
                files=read.files,
                items=len(kept),
                evaluation_items=len(questions.items),
                dropped=len(duplicates),
                problems=tuple(notes),
                tokens=_percentiles(tokens),
            ),
        )
        with folder_appears_whole(target) as scratch:
            sides = checks.split(kept, training.validation_share, training.seed)
            for file, side in zip((data.train, data.validation), sides, strict=True):
                text = "".join(f"{example.json}\n" for example in side)
                (scratch / file.name).write_text(text, encoding="utf-8", newline="\n")
            shutil.copyfile(fetched.evaluation, scratch / data.evaluation.name)
            digests = {path.name: sha256(path) for path in scratch.iterdir()}
            write_atomic(scratch / REPORT_FILE, _PreparedManifest(data=data, sha256=digests).model_dump_json(indent=2))
        return data


def markdown(data: TrainingData) -> str:
    """What the checks found, for people: files, items, tokens and problems. Markup in the data is escaped."""
    report = data.report
    validation = _validation_items(data)
    facts = [
        ["source", data.source],
        ["training items", str(report.items - validation)],
        ["validation items", str(validation)],
        ["evaluation items", str(report.evaluation_items)],
        ["exact duplicates, dropped", str(report.dropped)],
        ["SHA-256 of the items", data.digest[:DIGEST_CHARACTERS]],
        ["SHA-256 of the evaluation set", data.evaluation_digest[:DIGEST_CHARACTERS]],
    ]
    rows = [[f"{one.file}:{one.line}", one.kind.replace("_", " "), one.detail] for one in report.problems]
    parts = [
        "# Training data",
        _table(["", ""], facts),
        "## Files",
        _table(["file", "items"], [[name, str(count)] for name, count in report.files.items()]),
        "## Tokens per item",
        _table(list(report.tokens), [[f"{value:.0f}" for value in report.tokens.values()]]),
        "## Worth a look",
        _table(["line", "kind", "what"], rows) if rows else "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(data: TrainingData) -> str:
    """The same in one line."""
    report = data.report
    validation = _validation_items(data)
    said = (
        f"{report.items - validation} items to train and {validation} to validate with, {report.evaluation_items} to "
        f"evaluate; {report.tokens['p50']:.0f} tokens each, {report.tokens['max']:.0f} at most"
    )
    return f"{said}; {report.dropped} duplicates dropped" if report.dropped else said


def _validation_items(data: TrainingData) -> int:
    return len(data.validation.read_bytes().splitlines())


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose cells show exactly these texts."""
    cells = [[re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(cell, quote=False)) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _digest(read: ExamplesRead) -> str:
    lines = [example.json for example in read.examples]
    lines += [f"{one.file}:{one.line}: {one.detail}" for one in read.problems]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tokens(
    kept: Sequence[Example], request: Retrain, checkpoint: Checkpoint, settings: Settings, name: str
) -> tuple[Sequence[int], list[DataProblem]]:
    """Count the tokens of each example, and find those that the checkpoint cannot be trained with."""
    log = settings.logs / name / "data.log"
    log.unlink(missing_ok=True)
    result, _ = children.call(
        tokens_worker.handle,
        tokens_worker.TokensRequest(checkpoint=checkpoint.path, items=tuple(one.json for one in kept)),
        log=log,
        timeout_s=settings.training_timeout_s,
        error=TrainingError,
        env=OFFLINE_ENVIRONMENT,
    )
    limit = min(request.training.max_tokens, checkpoint.context_length)
    unusable = [kept[number].problem("schema", why) for number, why in result.refused.items()]
    unusable += [
        example.problem("oversized", f"{count} tokens, and {limit} are allowed (--training.max-tokens)")
        for example, count in zip(kept, result.tokens, strict=True)
        if count > limit
    ]
    return result.tokens, unusable


def _refuse(fetched: Fetched, found: Sequence[DataProblem], file: Path) -> None:
    """Raise if there are problems. The whole list goes into ``file``."""
    if not found:
        return
    order = {path.name: number for number, path in enumerate(fetched.files)}
    ordered = sorted(found, key=lambda problem: (order[problem.file], problem.line))
    lines = [f"{shown(problem.file)}:{problem.line}: {problem.detail}" for problem in ordered]
    write_atomic(file, "\n".join(lines) + "\n")
    listed = lines[:PROBLEMS_IN_ERROR]
    if more := len(lines) - len(listed):
        listed.append(f"and {more} more")
    raise DataError(
        "\n  - ".join([f"{shown(fetched.source)} cannot be trained on:", *listed]),
        f"Fix or remove these lines. The whole list: {file}",
    )


def _percentiles(counts: Sequence[int]) -> dict[str, float]:
    """Nearest-rank percentiles of tokens: the smallest count that this percentage of the items does not exceed."""
    ranked = sorted(counts)
    of = {f"p{percent}": ranked[-(-percent * len(ranked) // 100) - 1] for percent in (50, 90, 99)}
    return {"min": ranked[0], **of, "max": ranked[-1], "total": sum(ranked)}


def _load(folder: Path) -> TrainingData | None:
    """Return what a folder holds if all of it is as it was written; else None."""
    manifest = _PreparedManifest.from_file(folder / REPORT_FILE)
    with suppress(OSError):
        if manifest and all(sha256(folder / name) == digest for name, digest in manifest.sha256.items()):
            # The home may have been moved since.
            paths = {key: folder / getattr(manifest.data, key).name for key in ("train", "validation", "evaluation")}
            return manifest.data.model_copy(update=paths)
    return None
