"""Fine-tune a checkpoint with LoRA in a child process: once for the same input, and resumed if it was killed. Also how
well a checkpoint answers an evaluation set, before anything is converted.

``<trainings>/<key>/`` holds ``checkpoints/`` while it trains and ``losses.jsonl``, then ``adapter/``, ``merged/``,
``files.json`` with their digests, and last ``training.json``, without which the training is not finished.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter

from slmops.conversion import store
from slmops.core import locks, machine
from slmops.core.errors import EvaluationError, PrerequisiteError, TrainingError
from slmops.core.files import digest_of_json, sha256, write_atomic
from slmops.core.settings import Settings
from slmops.core.values import Answer, Checkpoint, Measurement, VariantFile
from slmops.evaluation import answers_worker, dataset, quality, scoring, statistics
from slmops.processes import children
from slmops.training import finetune_worker
from slmops.training.finetune_worker import FinetuneRequest
from slmops.training.values import Finetuned, LoraSettings, LossPoint, Retrain, TrainingData, TrainingResult

log = logging.getLogger(__name__)

TRAINING_FILE, DIGESTS_FILE = "training.json", "files.json"
FILE_LIST = TypeAdapter(list[VariantFile])
TRAINING_PACKAGES = ("torch", "transformers", "peft", "accelerate")  # the packages whose version changes the result
NO_INPUT = {"data", "evaluation_set", "name", "serve", "watch_s", "approval"}
"""Fields of a request that do not count: locations, since contents are digested, and what happens to the result."""
BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Instruction sets that make products in bf16 faster. Without them bf16 is emulated, which is slower."""
OFFLINE_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""For children that load a checkpoint: nothing is sent or fetched."""


def finetune(
    checkpoint: Checkpoint,
    data: TrainingData,
    training: LoraSettings,
    settings: Settings,
    name: str,
    on_loss: Callable[[LossPoint], None],
) -> Finetuned:
    """Fine-tune ``checkpoint`` on ``data``, or return the result of an earlier call with the same input.

    ``on_loss`` is called in another thread with each new point of the loss curves. Its errors are logged. It is a
    TrainingError if the training diverged, or if its process died, which the next call resumes; a DataError if an item
    has no answer to learn; and a PrerequisiteError if the disk is full.
    """
    versions, hardware = machine.versions(), machine.hardware()
    folder = settings.trainings / key(checkpoint.digest, data, training, versions)
    bf16 = bool(BF16 & set(hardware.isa))
    request = FinetuneRequest(checkpoint=checkpoint, data=data, training=training, bf16=bf16, folder=folder)
    with children.reporting_full_disk(settings.home), locks.machine(settings):
        if (done := load(folder)) is not None:
            log.info("unchanged since it was fine-tuned")
            shutil.rmtree(folder / finetune_worker.STATES, ignore_errors=True)
            return done
        if (folder / TRAINING_FILE).exists():
            log.warning("%s was changed since it was made, so it is made again", folder)
            shutil.rmtree(folder)
        result, finished = _train(request, settings, name, on_loss)
        lines = (folder / finetune_worker.LOSSES_FILE).read_text(encoding="utf-8").splitlines()
        finetuned = Finetuned(
            key=folder.name,
            base_digest=checkpoint.digest,
            data_digest=data.digest,
            training=training,
            **result.model_dump(),
            losses=tuple(LossPoint.model_validate_json(line) for line in lines),
            precision="bf16" if bf16 else "fp32",
            memory_peak_mb=finished.memory_peak_mb,
            versions=versions,
            hardware=hardware,
            created=datetime.now(UTC),
            folder=folder,
        )
        write_atomic(folder / DIGESTS_FILE, FILE_LIST.dump_json(_files(folder), indent=1).decode())
        write_atomic(folder / TRAINING_FILE, finetuned.model_dump_json(indent=1))
        shutil.rmtree(folder / finetune_worker.STATES)
        return finetuned


def answer_with_checkpoint(
    folder: Path, evaluation_set: Path, matcher: str | None, name: str, label: str, settings: Settings
) -> tuple[Measurement, tuple[Answer, ...]]:
    """Have a checkpoint answer, greedily and in fp32: its accuracy over the answers that could be judged, and all.

    ``label`` says which of the model's checkpoints it is. It is an EvaluationError if no answer could be judged.
    """
    items = dataset.load(evaluation_set, matcher=matcher, judge=settings.judge_configured).items
    part = f"{label}.answers"
    (settings.logs / name / f"{part}.log").unlink(missing_ok=True)
    request = answers_worker.AnswersRequest(folder=folder, items=items, matcher=matcher)
    with locks.machine(settings):
        asked = quality.in_child(answers_worker.handle, request, name, part, settings, OFFLINE_ENVIRONMENT)
    answers = scoring.ask_judge(items, asked.answers, settings)
    judged = [answer.correct for answer in answers if answer.correct is not None]
    if not judged:
        said = f"None of the {len(answers)} answers could be judged: {answers[0].reason}"
        raise EvaluationError(said, "Fix the evaluation set, the matcher or the judging model.")
    return statistics.of_proportion(sum(judged), len(judged)), answers


def worse(base: Measurement, finetuned: Measurement) -> str | None:
    """Say why a fine-tuned checkpoint of this accuracy is not worth converting; None if it is."""
    if finetuned.value >= base.value:
        return None
    accuracy = f"{base.value:.2f} before it, {finetuned.value:.2f} after it"
    return f"The fine-tuning made the model worse: accuracy {accuracy}. The champion stays."


def key(checkpoint_digest: str, data: TrainingData, training: LoraSettings, versions: dict[str, str]) -> str:
    """Folder name of a fine-tuning: a digest of base model, data, split, settings and package versions."""
    inputs = {
        "base": checkpoint_digest,
        "data": data.digest,
        "split": [sha256(data.train), sha256(data.validation)],
        "training": training.model_dump(mode="json"),
        "versions": {package: versions.get(package) for package in TRAINING_PACKAGES},
    }
    return digest_of_json(inputs)[:16]


def input_digest(request: Retrain, checkpoint: Checkpoint, data_digest: str, evaluation: Path) -> str:
    """SHA-256 over data, base model, settings and package versions of a retraining: is there anything new?

    ``data_digest`` is of the training items, from :func:`slmops.training.data.digest`.
    """
    asked = request.model_dump(mode="json", exclude=NO_INPUT)
    # Files count by content, not by path.
    asked["policy"] = None if request.policy is None else sha256(request.policy)
    if request.matcher is not None:
        file, _, function = request.matcher.rpartition(":")
        asked["matcher"] = [sha256(Path(file).expanduser()), function]
    versions = machine.versions()
    inputs = {
        "asked": asked,
        "base": checkpoint.digest,
        "data": data_digest,
        "evaluation": sha256(evaluation),
        "versions": {name: versions.get(name) for name in {*store.DECISIVE, *TRAINING_PACKAGES}},
    }
    return digest_of_json(inputs)


def load(folder: Path) -> Finetuned | None:
    """Return the fine-tuning in ``folder`` if it is finished and its files are unchanged; else None."""
    with suppress(OSError, ValueError):
        if FILE_LIST.validate_json((folder / DIGESTS_FILE).read_bytes()) == _files(folder):
            return Finetuned.from_file(folder / TRAINING_FILE, folder=folder)
    return None


def _files(folder: Path) -> list[VariantFile]:
    return [
        file.model_copy(update={"name": f"{part}/{file.name}"})
        for part in (finetune_worker.ADAPTER, finetune_worker.MERGED)
        for file in store.files_of(folder / part)
    ]


def _train(
    request: FinetuneRequest, settings: Settings, name: str, on_loss: Callable[[LossPoint], None]
) -> tuple[TrainingResult, children.Finished]:
    text = settings.logs / name / "finetune.log"
    if (request.folder / finetune_worker.STATES).exists():
        log.info("resuming the fine-tuning of an earlier run")
    else:
        text.unlink(missing_ok=True)
        log.info("fine-tuning, in %s", "bf16" if request.bf16 else "fp32")
    try:
        return children.call(
            finetune_worker.handle,
            request,
            log=text,
            timeout_s=settings.training_timeout_s,
            error=TrainingError,
            env=OFFLINE_ENVIRONMENT,
            on_line=lambda line: _pass_on(line, on_loss),
        )
    except TrainingError as error:
        # torch puts this reason in the middle of a long report.
        if children.DISK_FULL in text.read_text(encoding="utf-8", errors="replace"):
            raise PrerequisiteError("The disk became full while it trained.", children.FREE_SPACE) from error
        raise


def _pass_on(line: str, on_loss: Callable[[LossPoint], None]) -> None:
    if not line.startswith(finetune_worker.POINT):
        return
    try:
        on_loss(LossPoint.model_validate_json(line.removeprefix(finetune_worker.POINT)))
    except Exception as error:
        # An error must not stop the thread that empties the child's pipe, or the child would wait forever. No point is
        # lost: the result has all of them.
        log.warning("a point of the loss curves was not recorded: %s", error)
