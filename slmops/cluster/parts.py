"""The parts of a job that runs on several machines: what goes to a machine, what it does there, what comes back.

Each recipe has two parts, its conversion and its measurement, which may run on different machines. The baseline is
measured before the others begin, because they are compared with its logits. All functions that take an exchange raise
TrackingError if MLflow cannot be reached, or does not take or give a file.
"""

import json
import os
import shutil
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from slmops.checkpoints import inspection, weight_files
from slmops.checkpoints.store import RECORD, stage
from slmops.conversion import store
from slmops.core import errors
from slmops.core.errors import CheckpointError, SlmopsError, WorkError
from slmops.core.files import folder_appears_whole, remove_scratch
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.validation import problems
from slmops.core.values import (
    MANIFEST,
    Checkpoint,
    Evaluation,
    Frozen,
    Hardware,
    Measurement,
    Recipe,
    Registration,
    Variant,
    VariantFile,
)
from slmops.evaluation.quality import Quality
from slmops.evaluation.speed import Speed
from slmops.evaluation.summary import OF_MACHINE, evaluation, of_peer
from slmops.tracking.exchange import Exchange

Stage = Literal["convert", "measure"]
Files = tuple[VariantFile, ...]
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class SentJob(Frozen):
    """What all parts of a job need of it; its files are in the exchange."""

    exchange: str = Field(description="The MLflow run with the job's files.")
    name: str = Field(description="The model's.")
    job: Job = Field(description="What was asked for; its files are in `inputs`.")
    checkpoint: Checkpoint = Field(description="Its path is the one on the machine of the job.")
    weights: Files = Field(description="The files of the checkpoint.")
    inputs: dict[str, VariantFile] = Field({}, description="Field of the job to the user's file.")


class Part(SentJob):
    """What one machine does for one recipe."""

    id: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="Its result's name: recipe, stage and attempt.")
    stage: Stage
    recipe: Recipe
    key: str | None = Field(None, pattern=KEY_PATTERN, description="Key of the variant to measure.")
    variant: Files = Field((), description="Its files, manifest included.")
    references: Files = Field((), description="Logits to compare with.")


class Failure(Frozen):
    """One of our own errors that comes from another machine."""

    kind: str
    message: str
    fix: str | None

    @classmethod
    def of(cls, error: SlmopsError) -> Self:
        return cls(kind=type(error).__name__, message=error.message, fix=error.fix)

    @property
    def error(self) -> SlmopsError:
        return errors.BY_NAME.get(self.kind, WorkError)(self.message, self.fix)


class Figures(Frozen):
    """The raw results of measuring one variant."""

    speed: Speed | None = Field(description="None: its device is not there.")
    quality: Quality
    scored: Quality | None = Field(None, description="The checkpoint's own.")
    hardware: Hardware = Field(description="The machine that measured it.")


class PartResult(Frozen):
    failure: Failure | None = None
    key: str | None = Field(None, pattern=KEY_PATTERN, description="Key of the variant that was converted.")
    variant: Files = Field((), description="Its files, manifest included.")
    figures: Figures | None = None
    references: Files = Field((), description="Logits for the others to compare with; baseline only.")
    logs: Files = ()


def send_job(context: JobContext, exchange: Exchange) -> SentJob:
    """Put all that the parts need into the exchange; a CheckpointError if the checkpoint was changed while the job ran.

    The chat template has gone into the checkpoint by now, the Olive file into its recipe; the policy is for the job.
    """
    job, checkpoint = context.job, context.checkpoint
    names = _names(job, checkpoint)
    weights = exchange.put({name: checkpoint.path / name for name in names})
    if inspection.digest_of({file.name: file.sha256 for file in weights}) != checkpoint.digest:
        raise CheckpointError(f"{checkpoint.path} was changed while the job ran.", "Start it again.")
    files = {name: getattr(job, name) for name in ("evaluation_set", "perplexity_text", "calibration_text")}
    if job.matcher is not None:
        files["matcher"] = Path(job.matcher.rpartition(":")[0])
    return SentJob(
        exchange=exchange.run_id,
        name=context.name,
        job=job,
        checkpoint=checkpoint,
        weights=weights,
        inputs={field: exchange.put({path.name: path.expanduser()})[0] for field, path in files.items() if path},
    )


def _names(job: Job, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the files that the checkpoint's digest is over."""
    record = checkpoint.path / RECORD
    if record.is_file():
        return tuple(json.loads(record.read_text(encoding="utf-8"))["files"])
    root = weight_files.choose(inspection.names(checkpoint.path), checkpoint.source, allow_pickle=job.allow_pickle)
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    weights = weight_files.measure(checkpoint.path, root, config, checkpoint.source).files
    return tuple(inspection.digest_files(checkpoint.path, weights, job))


class Measured(Figures):
    """A variant in Foundry Local of this machine, and the raw results of whichever machine measured it."""

    variant: Variant
    registration: Registration
    earlier: dict[str, datetime] = Field({}, description="What was taken over from an earlier job, and its age.")


class MeasuredPeer(Figures):
    """What was measured of a GGUF file."""

    size_mb: float


Outcomes = Generator[tuple[str, Measured | MeasuredPeer | SlmopsError], None, None]
"""The name of a recipe or a peer, and what became of it."""


def fetch_result(part: Part, exchange: Exchange, logs: Path) -> PartResult | None:
    """What a part has left, or a WorkError if that cannot be read, its logs in ``logs``; None: it left nothing."""
    text = exchange.result(part.id)
    if text is None:
        return None
    try:
        result = PartResult.model_validate_json(text)
    except ValidationError as error:
        wrong = f"What {part.id} left cannot be read: {'; '.join(problems(error))}."
        raise WorkError(wrong, "Do all workers have the same version of slmops?") from None
    exchange.bring(result.logs, logs)
    return result


def _against(one: Figures, baseline: Measured | None, checkpoint: Checkpoint) -> tuple[float, Quality] | None:
    """Size in MB and quality of what is compared with."""
    if one.scored and one.scored.answers:  # as those of the baseline
        return checkpoint.size_mb, one.scored
    return (baseline.variant.model_mb, baseline.quality) if baseline else None


def peer_figures(one: MeasuredPeer, baseline: Measured | None, checkpoint: Checkpoint) -> dict[str, Measurement]:
    """The metrics of a peer, relative to the baseline if there is one."""
    against, nll = _against(one, baseline, checkpoint), one.scored.nll if one.scored else None
    return of_peer(one.size_mb, checkpoint, one.speed, one.quality, against, nll)


def figures(one: Measured, baseline: Measured | None) -> tuple[Evaluation, str | None]:
    """The metrics that compare with the baseline, and why the others are left out; None: none are."""
    against = _against(one, baseline, one.variant.checkpoint)
    measured = evaluation(one.variant, one.speed, one.quality, against, one.scored.nll if one.scored else None)
    here, there = one.hardware.kind, (baseline or one).hardware.kind
    if here == there:
        return measured, None
    kept = {name: figure for name, figure in measured.measurements.items() if not name.startswith(OF_MACHINE)}
    machines = f"Speed and memory were measured on {here}, and those of the baseline on {there}"
    compared = measured.model_copy(update={"measurements": kept, "curves": (), "samples": ()})
    return compared, f"{machines}: they do not compare, and are left out."


def prepare(part: Part, exchange: Exchange, settings: Settings) -> tuple[JobContext, Recipe]:
    """Fetch and check all that a part needs; the context and the recipe have the paths of this machine.

    Work and logs go by a name that no other part has, and are gone after :func:`clear`.
    """
    name = _own_name(part)
    work = settings.work(name)
    for folder in (work.parent, settings.logs, settings.variants):
        remove_scratch(folder)
    clear(part, settings)
    hashes = {file.name: file.sha256 for file in part.weights}
    if inspection.digest_of(hashes) != part.checkpoint.digest:
        raise CheckpointError("The files of the checkpoint are not those that its digest is over.")
    exchange.bring(part.weights, work / "checkpoint")
    path, _ = stage(work / "checkpoint", hashes, None, settings)
    changes: dict[str, Any] = dict.fromkeys(("chat_template", "policy", "olive_config", "output_path"))
    for field, file in part.inputs.items():
        exchange.bring([file], work / "inputs" / field)
        changes[field] = work / "inputs" / field / file.name
    if part.job.matcher is not None:
        changes["matcher"] = f"{changes['matcher']}:{part.job.matcher.rpartition(':')[2]}"
    exchange.bring(part.references, work / "logits")
    job, checkpoint = part.job.model_copy(update=changes), part.checkpoint.model_copy(update={"path": path})
    context = JobContext(job, name, checkpoint, settings, exchange.uri)
    return context, _relocated(part.recipe, part.checkpoint.path, path)


def clear(part: Part, settings: Settings) -> None:
    for folder in (settings.work(_own_name(part)), settings.logs / _own_name(part)):
        shutil.rmtree(folder, ignore_errors=True)


def _own_name(part: Part) -> str:
    # The next part removes what a killed one left: see slmops.core.files.remove_scratch.
    return f".{part.name}-{part.id}.{os.getpid()}.part"


def send_variant(variant: Variant, exchange: Exchange) -> Files:
    names = [*(file.name for file in variant.files), MANIFEST]
    return exchange.put({name: variant.path / name for name in names})


def fetch_variant(key: str, files: Files, exchange: Exchange, settings: Settings) -> Variant:
    """Fetch a variant that was converted elsewhere into this machine's store; a WorkError if that is not possible.

    It replaces one of the same name that was converted here: what is deployed has to be the files that were measured.
    """
    target = settings.variants / key
    found = store.load(target)
    if found is None or {*found.files} != {file for file in files if file.name != MANIFEST}:
        shutil.rmtree(target, ignore_errors=True)
        with folder_appears_whole(target) as scratch:
            exchange.bring(files, scratch)
        found = store.load(target)
    if found is None or found.key != key:
        raise WorkError(f"The files of variant {key} are not what its manifest says.", "Start the job again.")
    return found


def _relocated(recipe: Recipe, path: Path, here: Path) -> Recipe:
    """A user's recipe may name the checkpoint's folder."""
    there, now = json.dumps(str(path)), json.dumps(str(here))
    return recipe.model_copy(update={"config": json.loads(json.dumps(recipe.config).replace(there, now))})
