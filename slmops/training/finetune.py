"""Fine-tune a checkpoint with LoRA in a child process; taken up where it was killed, and done once for the same input.

``<trainings>/<key>/`` holds ``checkpoints/`` while it trains and ``losses.jsonl``, then ``adapter/``, ``merged/``,
``files.json`` with their digests, and last ``training.json``, without which the training is not finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from slmops.conversion import store
from slmops.core import locks, machine
from slmops.core.errors import PrerequisiteError, TrainingError
from slmops.core.files import sha256, write_atomic
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, VariantFile
from slmops.processes import children
from slmops.training import checkpoints, finetune_worker
from slmops.training.values import Finetuned, LoraSettings, LossPoint, TrainingData

log = logging.getLogger(__name__)

MANIFEST, FILES = "training.json", "files.json"
DECISIVE = ("torch", "transformers", "peft", "accelerate")
"""The packages whose version changes what comes out."""
BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Instruction sets with which products in bf16 are faster; where it is emulated they are slower."""


def finetune(
    checkpoint: Checkpoint,
    data: TrainingData,
    settings_: LoraSettings,
    settings: Settings,
    name: str,
    on_loss: Callable[[LossPoint], None],
) -> Finetuned:
    """Fine-tune ``checkpoint`` on ``data``, or return what an earlier run made of the same.

    Args:
        settings_: How the adapter is trained.
        name: The model's name; the log goes by it.
        on_loss: Called with each new point of the loss curves, in a thread of its own. What it raises is logged.

    Raises:
        TrainingError: The training diverged, or its process died; what can be resumed is kept.
        DataError: An item cannot be trained on.
        PrerequisiteError: The disk is full.
    """
    versions = machine.versions()
    folder = settings.trainings / key(checkpoint.digest, data, settings_, versions)
    with locks.exclusive(settings.machine_lock, "this machine's conversions and measurements", wait=True):
        done = load(folder)
        if done is not None:
            log.info("unchanged since it was fine-tuned")
            shutil.rmtree(folder / checkpoints.CHECKPOINTS, ignore_errors=True)
            return done
        if (folder / MANIFEST).exists():
            log.warning("%s is altered; making it again", folder)
            shutil.rmtree(folder)
        try:
            return _make(checkpoint, data, settings_, settings, name, on_loss, versions, folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise PrerequisiteError(f"The disk of {settings.home} is full.", children.FREE_SPACE) from None
            raise


def key(checkpoint_digest: str, data: TrainingData, training: LoraSettings, versions: dict[str, str]) -> str:
    """Folder name of a fine-tuning: same base model, data, split, settings and packages, same folder."""
    went_in = {
        "base": checkpoint_digest,
        "data": data.digest,
        "split": [sha256(data.train), sha256(data.validation)],
        "training": training.model_dump(mode="json"),
        "versions": {package: versions.get(package) for package in DECISIVE},
    }
    return hashlib.sha256(json.dumps(went_in, sort_keys=True).encode()).hexdigest()[:16]


def load(folder: Path) -> Finetuned | None:
    """The fine-tuning in ``folder`` if it is finished and its files are as they were made; else None."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        finetuned = Finetuned.model_validate({**content, "folder": folder})
        files = [VariantFile.model_validate(file) for file in json.loads((folder / FILES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, ValidationError):  # TypeError: JSON, but of another kind
        return None
    return finetuned if files == _files(folder) else None


def _files(folder: Path) -> list[VariantFile]:
    """What came out: the adapter and the merged checkpoint, with their digests."""
    return [
        file.model_copy(update={"name": f"{part}/{file.name}"})
        for part in (finetune_worker.ADAPTER, finetune_worker.MERGED)
        for file in store.files_of(folder / part)
    ]


def _make(
    checkpoint: Checkpoint,
    data: TrainingData,
    settings_: LoraSettings,
    settings: Settings,
    name: str,
    on_loss: Callable[[LossPoint], None],
    versions: dict[str, str],
    folder: Path,
) -> Finetuned:
    hardware = machine.hardware()
    bf16 = bool(BF16 & set(hardware.isa))
    text = settings.logs / name / "finetune.log"
    if (folder / checkpoints.CHECKPOINTS).exists():
        log.info("resuming the fine-tuning of an earlier run")
    else:
        text.unlink(missing_ok=True)
        log.info("fine-tuning, in %s", "bf16" if bf16 else "fp32")
    work = settings.work(name) / "finetune"
    try:
        result, finished = children.call(
            "slmops.training.finetune_worker",
            finetune_worker.Request(
                checkpoint=checkpoint,
                train=data.train,
                validation=data.validation,
                training=settings_,
                bf16=bf16,
                folder=folder,
            ),
            finetune_worker.Result,
            work=work,
            log=text,
            timeout_s=settings.training_timeout_s,
            error=TrainingError,
            env=ENVIRONMENT,
            on_line=lambda line: _pass_on(line, on_loss),
        )
    except TrainingError as error:
        # torch's writer hides the reason in the middle of its report.
        if children.DISK_FULL in text.read_text(encoding="utf-8", errors="replace"):
            raise PrerequisiteError("The disk became full while it trained.", children.FREE_SPACE) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    lines = (folder / finetune_worker.LOSSES).read_text(encoding="utf-8").splitlines()
    finetuned = Finetuned(
        key=folder.name,
        base_digest=checkpoint.digest,
        data_digest=data.digest,
        training=settings_,
        steps=result.steps,
        epochs=result.epochs,
        best_step=result.best_step,
        validation_loss=result.validation_loss,
        stopped=result.stopped,
        losses=tuple(LossPoint.model_validate_json(line) for line in lines),
        precision="bf16" if bf16 else "fp32",
        seconds=result.seconds,
        memory_peak_mb=finished.memory_peak_mb,
        trained_parameters=result.trained_parameters,
        versions=versions,
        hardware=hardware,
        created=datetime.now(UTC),
        folder=folder,
    )
    files = [file.model_dump() for file in _files(folder)]
    write_atomic(folder / FILES, json.dumps(files, indent=1))
    write_atomic(folder / MANIFEST, finetuned.model_dump_json(indent=1))
    shutil.rmtree(folder / checkpoints.CHECKPOINTS)
    return finetuned


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of children that load a checkpoint: nothing is sent or fetched."""


def _pass_on(line: str, on_loss: Callable[[LossPoint], None]) -> None:
    if not line.startswith(finetune_worker.POINT):
        return
    try:
        on_loss(LossPoint.model_validate_json(line.removeprefix(finetune_worker.POINT)))
    except Exception as error:
        # It must not stop the thread that empties the child's pipe: the child would wait for ever. No point is lost:
        # all of them are in the result.
        log.warning("a point of the loss curves was not taken: %s", error)
