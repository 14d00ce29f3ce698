"""Make one variant: Olive in a child process, checked, with a manifest, in its folder whole or not at all."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmops.checkpoints import generation
from slmops.conversion import olive_worker, recipes, store, thin_worker, verify_worker
from slmops.core import blobs, locks, machine
from slmops.core.errors import ConversionError, PrerequisiteError, SlmopsError
from slmops.core.files import folder_appears_whole, move, write_atomic
from slmops.core.job import BASELINE, CHECKPOINT, SHIPPED, Job, JobContext
from slmops.core.settings import Settings
from slmops.core.targets import split
from slmops.core.values import MANIFEST, Checkpoint, Recipe, Variant
from slmops.processes import children

log = logging.getLogger(__name__)

_CACHE = ".cache"  # below a model's work folder; no recipe is called so
_SEVERITY = {"debug": 0, "info": 1, "warning": 2, "error": 3}


@contextmanager
def together(name: str, settings: Settings) -> Iterator[children.Child]:
    """Within the block, conversions of the model ``name`` share a child process and what Olive has cached."""
    cached = settings.work(name) / _CACHE
    shutil.rmtree(cached, ignore_errors=True)  # of a job that was killed
    try:
        with children.Child() as child:
            yield child
    finally:
        shutil.rmtree(cached, ignore_errors=True)


def in_order(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Recipes of one job, each behind one that it goes on from if there is one, as fp16 does from fp32."""
    ordered: list[Recipe] = []
    for recipe in recipes:
        origins = [place for place, one in enumerate(ordered, 1) if _begins_with(_passes(recipe), _passes(one))]
        ordered.insert(max(origins, default=len(ordered)), recipe)
    return ordered


def _passes(recipe: Recipe) -> list[Any]:
    return list(recipe.config["passes"].values())


def _begins_with(passes: list[Any], others: list[Any]) -> bool:
    return passes[: len(others)] == others


def convert(recipe: Recipe, context: JobContext, within: children.Child | None = None) -> Variant:
    """Convert a job's checkpoint, or return the variant that was made earlier from the same input.

    All is done ``within`` a child that others share, see :func:`together`. A ConversionError, with the cause from
    Olive's log, if it made nothing or nothing that works; a PrerequisiteError if the disk is full or ``output_path``
    taken.
    """
    if within is None:
        with together(context.name, context.settings) as child:
            return convert(recipe, context, child)
    job, checkpoint, settings = context.job, context.checkpoint, context.settings
    target = settings.variants / store.key(recipe, checkpoint, machine.versions())
    variant = _made_before(target, recipe, job)
    if variant is None or not _proven(variant, checkpoint, job):
        with locks.machine(settings), children.reporting_full_disk(settings.home):
            builder = _Builder(context, within)
            error = builder.export_error() if job.baseline == CHECKPOINT else None
            # Look again: another job may have made it while this one waited.
            variant = _made_before(target, recipe, job) or builder.make(recipe, target, error)
        if error is not None:
            variant = variant.model_copy(update={"export_error": error})
    deployed = variant.checkpoint.model_copy(update={"context_length": checkpoint.context_length})
    variant = variant.model_copy(update={"checkpoint": deployed})  # a job of another length may have made it
    if job.output_path is not None:
        export(variant, job.output_path)
    return variant


def _proven(variant: Variant, checkpoint: Checkpoint, job: Job) -> bool:
    """Whether it is known that the exporter is right, by the fp32 variant or by this one, up to the job's context."""
    within = variant.checkpoint.context_length >= checkpoint.context_length
    return job.baseline != CHECKPOINT or (variant.export_error is not None and within)


def _made_before(target: Path, recipe: Recipe, job: Job) -> Variant | None:
    variant = store.load(target)
    if variant is None:
        return None
    if variant.export_error is not None and variant.export_error > job.export_tolerance:
        raise ConversionError(
            f"The {recipe.name} export differs from the checkpoint by {variant.export_error:.2g} of the largest logit, "
            f"and {job.export_tolerance:.2g} is allowed."
        )
    log.info("%s: unchanged since it was converted, %.0f MB", recipe.name, variant.model_mb)
    return variant


def export(variant: Variant, folder: Path) -> Path:
    """Put a copy of a variant into ``folder/<variant>``, in place of an older one; anything else there is an error."""
    target = folder.expanduser().resolve() / variant.name
    if target.exists():
        if not (target / MANIFEST).exists():
            raise PrerequisiteError(f"{target} exists and is not a variant of slmops.", "Choose another --output-path.")
        shutil.rmtree(target)
    with folder_appears_whole(target) as scratch:
        for file in [*(f.name for f in variant.files), MANIFEST]:
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(variant.path / file, scratch / file)  # not a link: the user may change it
    return target


@dataclass(frozen=True)
class _Builder:
    """Makes variants of a job's checkpoint in a child."""

    context: JobContext
    child: children.Child

    def _cache(self, recipe: Recipe) -> Path:
        """Olive's cache, with what the conversion before this one made if this one goes on from it."""
        cache = self.context.work / _CACHE / "olive"
        note = cache / "passes.json"
        before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else []
        if not _begins_with(_passes(recipe), before):
            shutil.rmtree(cache)
        write_atomic(note, json.dumps(_passes(recipe)))
        return cache

    def _environment(self, recipe: str = BASELINE) -> dict[str, str]:
        """Olive sends nothing, and ModelBuilder's intermediate files stay out of the user's hub cache.

        A pass of a recipe that does not come with slmops may want data from the hub, as Gptq does by default.
        """
        return {
            "OLIVE_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": str(int(split(recipe)[0] in SHIPPED)),
            "HF_HUB_CACHE": str(self.context.work / _CACHE / "hub"),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def export_error(self) -> float:
        """Compare an fp32 export of the checkpoint's first layers with them; a ConversionError if it is wrong.

        A job does so once, whatever comes of it. All layers in fp32 would take four times the memory of the checkpoint,
        and the exporter treats layers alike.
        """
        context, checkpoint = self.context, self.context.checkpoint
        work = context.work / BASELINE
        known = work.with_name("export_error")
        if known.exists():
            if isinstance(found := json.loads(known.read_text(encoding="utf-8")), list):
                raise ConversionError(*found)
            return float(found)
        shutil.rmtree(work, ignore_errors=True)
        folder = work / "checkpoint"
        folder.mkdir(parents=True)
        try:
            thinned, _ = children.call(
                thin_worker.handle,
                thin_worker.ThinRequest(
                    checkpoint=checkpoint.path, folder=folder, trust_remote_code=context.job.trust_remote_code
                ),
                log=context.logs / "thin.log",
                timeout_s=context.settings.conversion_timeout_s,
                error=ConversionError,
                env=self._environment(),
                within=self.child,
            )
            log.info("comparing an fp32 export of the first %d layers with the checkpoint", thinned.layers)
            thin = checkpoint.model_copy(update={"path": folder, "parameters": thinned.parameters})
            exported = recipes.recipe(
                BASELINE, context.job, thin.model_copy(update={"tied_embeddings": False}), context.settings
            )
            _, checked = self._build(exported, thin, work)
        except ConversionError as wrong:
            write_atomic(known, json.dumps([wrong.message, wrong.fix]))
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        write_atomic(known, json.dumps(checked.export_error or 0.0))
        return checked.export_error or 0.0

    def _build(
        self, recipe: Recipe, checkpoint: Checkpoint, work: Path
    ) -> tuple[children.Finished, verify_worker.VerifyResult]:
        """Convert into ``work/model`` and check what came out."""
        made, context = work / "model", self.context
        olive_text = context.logs / f"{recipe.name}.olive.log"
        olive_text.unlink(missing_ok=True)
        cache = self._cache(recipe)
        config = workflow(recipe, checkpoint, context.job, cache, made)
        try:
            finished = self._run_olive(recipe, config, work, made, olive_text)
        except SlmopsError:  # it may be half-written
            shutil.rmtree(cache, ignore_errors=True)
            raise
        _complete_genai_config(made / "genai_config.json", checkpoint, recipe)
        checked, _ = children.call(
            verify_worker.handle,
            verify_worker.VerifyRequest(
                folder=made,
                recipe=recipe,
                checkpoint=checkpoint,
                tolerance=context.job.export_tolerance,
                trust_remote_code=context.job.trust_remote_code,
            ),
            log=context.logs / f"{recipe.name}.verify.log",
            timeout_s=context.settings.conversion_timeout_s,
            error=ConversionError,
            env=self._environment(recipe.name),
            within=self.child,
        )
        return finished, checked

    def make(self, recipe: Recipe, target: Path, error: float | None) -> Variant:
        """Convert the checkpoint, whose export is off by ``error``, as far as that is known by now."""
        context, checkpoint = self.context, self.context.checkpoint
        work = context.work / recipe.name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        if target.exists():
            log.warning("%s: %s is incomplete or altered; making it again", recipe.name, target)
            shutil.rmtree(target)
        try:
            finished, checked = self._build(recipe, checkpoint, work)
            with folder_appears_whole(target) as scratch:
                for path in (work / "model").iterdir():
                    if path.name != "model_config.json":  # Olive's own, with paths of this machine
                        made = move(path, scratch / path.name)
                        if made.suffix == ".jinja":  # the exporter ends its lines as the system does, which would count
                            made.write_bytes(made.read_bytes().replace(b"\r\n", b"\n"))
                shutil.copyfile(context.logs / f"{recipe.name}.olive.log", scratch / "olive.log")
                write_atomic(scratch / "olive_config.json", json.dumps(recipe.config, indent=2))
                variant = Variant(
                    key=target.name,
                    recipe=recipe,
                    checkpoint=checkpoint,
                    files=store.files_of(scratch),
                    weights=checked.weights,
                    export_error=checked.export_error if recipe.baseline else error,
                    convert_s=finished.seconds,
                    convert_memory_peak_mb=finished.memory_peak_mb,
                    versions=machine.versions(),
                    hardware=machine.hardware(),
                    created=datetime.now(UTC),
                    path=target,
                )
                for file in variant.files:
                    blobs.keep(scratch / file.name, file, context.settings)
                manifest = variant.model_dump_json(indent=2)
                write_atomic(scratch / MANIFEST, manifest)
            if (target / MANIFEST).read_text(encoding="utf-8") != manifest:
                # Another machine with the same home was faster: its files are in place, and ours are gone.
                variant = store.load(target) or variant
        finally:
            shutil.rmtree(work, ignore_errors=True)
        made_as = f"{variant.model_mb:.0f} MB, {variant.weights.bits_per_weight:.1f} bits per weight"
        log.info("%s: converted in %.0f s, %s", recipe.name, variant.convert_s, made_as)
        return variant

    def _run_olive(
        self, recipe: Recipe, config: dict[str, Any], work: Path, made: Path, olive_text: Path
    ) -> children.Finished:
        def progress(line: str) -> None:
            if kind := olive_worker.running_pass(line):
                log.info("%s: Olive runs %s", recipe.name, kind)

        try:
            _, finished = children.call(
                olive_worker.handle,
                olive_worker.Workflow(config=config),
                log=olive_text,
                timeout_s=self.context.settings.conversion_timeout_s,
                error=ConversionError,
                env=self._environment(recipe.name),
                # onnx refuses to write a file of a name that exists in the current folder, such as a user's
                # model.onnx.data. But paths in a user's own config are relative to where the user is.
                cwd=None if recipe.users_own else work,
                on_line=progress,
                within=self.child,
            )
            if any(made.rglob("*.onnx")):  # files prove the success, not what Olive says
                return finished
        except ConversionError as error:
            if "was stopped" in error.message or "killed by" in error.message:
                raise
        text = olive_text.read_text(encoding="utf-8", errors="replace")
        if children.DISK_FULL in text:
            raise PrerequisiteError("The disk filled up while Olive worked.", children.FREE_SPACE)
        raise ConversionError(
            f"{recipe.name}: Olive produced no model. {olive_worker.cause(text)}", f"Olive's log: {olive_text}"
        )


def _complete_genai_config(path: Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Write in what the exporter leaves out: tokens that end an answer, the checkpoint's sampling, the recipe's own."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model, said = config["model"], config["model"].get("eos_token_id")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the check of the files says so
        return
    ends = list(generation.stop_tokens(checkpoint.path))
    if {*(said if isinstance(said, list) else [said])} != {*ends}:
        model["eos_token_id"] = ends
    if model.get("pad_token_id") is None:
        model["pad_token_id"] = ends[0]
    config["search"] = {**config.get("search", {}), **generation.settings(checkpoint.path)}
    write_atomic(path, json.dumps(recipes.merged(config, recipe.genai), indent=4))


def workflow(recipe: Recipe, checkpoint: Checkpoint, job: Job, cache: Path, made: Path) -> dict[str, Any]:
    """The recipe's workflow with what belongs to this run."""
    model = {"type": "HfModel", **recipe.config.get("input_model", {}), "model_path": str(checkpoint.path)}
    model["load_kwargs"] = {**model.get("load_kwargs", {}), "trust_remote_code": job.trust_remote_code}
    passes = dict(recipe.config["passes"])
    for name, step in passes.items():
        if step["type"].lower() == "modelbuilder":  # it runs code that comes with a checkpoint, unless told not to
            options = {**(step.get("extra_options") or {}), "hf_remote": job.trust_remote_code}
            passes[name] = {**step, "extra_options": options}
        elif step.get("text") == recipes.CALIBRATION_TEXT and job.calibration_text:
            passes[name] = {**step, "text": str(job.calibration_text.expanduser().absolute())}
    return {
        **recipe.config,
        "input_model": model,
        "passes": passes,
        "output_dir": str(made),
        "cache_dir": str(cache),
        "no_artifacts": True,
        "log_severity_level": _SEVERITY[job.log_level],
    }
