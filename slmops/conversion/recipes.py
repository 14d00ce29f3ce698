"""The recipes of a job: what their files say, fitted to its checkpoint."""

from pathlib import Path
from typing import Any

from slmops.conversion import recipe_files
from slmops.conversion.recipe_files import RecipeFile
from slmops.core.errors import RecipeError
from slmops.core.files import sha256
from slmops.core.job import BASELINE, CHECKPOINT, SHIPPED, USUAL, Job
from slmops.core.settings import Settings
from slmops.core.targets import CPU, TARGETS, split, variant_name
from slmops.core.values import Checkpoint, Recipe

_BLOCK_SIZES = (16, 32, 64, 128, 256)
CALIBRATION_TEXT = "<calibration_text>"  # in a recipe: the file that the job names
_BLOCK_OPTIONS = ("group_size", "block_size", "int4_block_size")  # of Olive's passes, for weights that share a scale
_TIE = {"surgeon": "TieWordEmbeddings"}


def check(job: Job, settings: Settings) -> None:
    """Refuse, with a RecipeError, precisions and devices that cannot work, whatever the checkpoint."""
    if job.device != "cpu" or job.provider != "CPUExecutionProvider":
        raise RecipeError(
            f"device {job.device} with {job.provider} is not supported: variants are made and proven on the CPU, "
            "whatever they are for.",
            "Use --target, such as --target webgpu or --target cuda.",
        )
    if settings.pools and job.targets != [CPU]:
        said = "A job on work pools makes variants for the CPU only."
        raise RecipeError(said, "Leave out --target, or unset SLMOPS_POOLS.")
    served: set[str] = set()
    for name in job.precision:
        precision, target = split(name)
        if target != CPU:
            raise RecipeError(f"{name} is a variant, not a recipe.", f"Use --precision {precision} --target {target}.")
        file = recipe_files.load(name, settings)
        # Of the usual ones those are taken that make sense.
        if not set(job.targets) & set(file.targets) and job.precision != [*USUAL]:
            said = f"{name} makes sense for {', '.join(file.targets)} only."
            raise RecipeError(said, f"Add --target {file.targets[0]}, or leave out --precision {name}.")
        served |= {*file.targets}
        steps = file.passes.values()
        if job.calibration_text is None and any(step.get("text") == CALIBRATION_TEXT for step in steps):
            fix = "Give --calibration-text FILE: some thousand words of what the model will read and write."
            raise RecipeError(f"{name} is made for a text of yours, and there is none.", fix)
    for target in job.targets:
        if target not in served:
            said = f"None of {', '.join(job.precision)} makes sense for {target}."
            raise RecipeError(said, f"Leave out --target {target}, or add --precision fp16.")


def names(job: Job, settings: Settings) -> list[str]:
    """The names of a job's variants, the baseline always first: for each target those precisions that make sense there.

    If the checkpoint is the baseline, nothing is made that has to be exported in fp32; a RecipeError if that is all.
    """
    files = {name: recipe_files.load(name, settings) for name in job.precision}
    made = [
        variant_name(name, target) for target in job.targets for name, file in files.items() if target in file.targets
    ]
    asked = list(dict.fromkeys((BASELINE, *made)))
    if job.baseline != CHECKPOINT:
        return asked
    quantized = [name for name in asked if not _is_exported_in_fp32(name, settings)]
    if not (quantized or job.olive_config):
        raise RecipeError(
            f"{' and '.join(job.precision)} is made through an fp32 export, which is not made as the checkpoint is the "
            "baseline.",
            "Use --baseline fp32, or --precision int8.",
        )
    return quantized


def for_job(job: Job, checkpoint: Checkpoint, settings: Settings) -> list[Recipe]:
    """The job's recipes in the order of :func:`names`; a RecipeError if one of them cannot work."""
    check(job, settings)
    return [recipe(name, job, checkpoint, settings) for name in names(job, settings)]


def own(planned: list[Recipe], settings: Settings) -> list[tuple[Path, Recipe]]:
    """Those that the user has written, each with its file."""
    files = recipe_files.find(settings)
    made_by = [(split(one.name)[0], one) for one in planned]
    return [(files[name], one) for name, one in made_by if name not in SHIPPED]


def recipe(name: str, job: Job, checkpoint: Checkpoint, settings: Settings) -> Recipe:
    """How to make the variant ``name``."""
    file = recipe_files.load(name, settings)
    passes = {key: _as_asked(name, step, job) for key, step in file.passes.items()}
    return of_file(name, file.model_copy(update={"passes": passes}), checkpoint)


def _as_asked(name: str, step: dict[str, Any], job: Job) -> dict[str, Any]:
    """A pass with what the job asks of it: int4's blocks, and the digest of the text that is to decide."""
    if split(name)[0] == "int4":
        asked = {"group_size": job.int4_block_size, "sym": job.int4_symmetric}
        step = {**step, **{option: value for option, value in asked.items() if option in step and value is not None}}
    if step.get("text") == CALIBRATION_TEXT and job.calibration_text:
        step = {**step, "text_sha256": sha256(job.calibration_text.expanduser())}  # another text is another variant
    return step


def of_file(name: str, file: RecipeFile, checkpoint: Checkpoint) -> Recipe:
    """What a file says, for a checkpoint: no tying of embeddings that it does not tie, and blocks that it can have."""
    passes: dict[str, Any] = {}
    for key, step in file.passes.items():
        for block in (step[option] for option in _BLOCK_OPTIONS if isinstance(step.get(option), int)):
            _must_divide(name, block, checkpoint)
        surgeries = step.get("surgeries") or []
        if _TIE in surgeries and not checkpoint.tied_embeddings:
            step = {**step, "surgeries": [one for one in surgeries if one != _TIE]}
        if step.get("surgeries") != []:
            passes[key] = step
    return Recipe(
        name=name, config=workflow(passes, split(name)[1]), bits=file.bits, genai=file.genai, baseline=name == BASELINE
    )


def choices(name: str, file: RecipeFile, checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """The values that a sweep tries, by option, the recipe's own first, and none that a checkpoint cannot have."""

    def fits(option: str, value: Any) -> bool:
        try:
            of_file(name, file.with_options({option: value}), checkpoint)
        except RecipeError:
            return False
        return True

    found = {option: [value for value in values if fits(option, value)] for option, values in file.choices.items()}
    own = file.own
    return {
        option: sorted(values or file.choices[option], key=lambda value: bool(value != own[option]))
        for option, values in found.items()
    }


def workflow(passes: dict[str, Any], target: str = CPU) -> dict[str, Any]:
    """An Olive workflow of these passes for a target; it runs on the CPU whatever that is."""
    made_for = TARGETS[target]
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": made_for.device, "execution_providers": [made_for.provider]}],
    }
    return {"systems": {"local": system}, "host": "local", "target": "local", "passes": passes}


def merged(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A table with the values of another one put in, tables within them merged in the same way."""
    result = dict(table)
    for key, value in other.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def _is_exported_in_fp32(name: str, settings: Settings) -> bool:
    steps = recipe_files.load(name, settings).passes.values()
    return any((step["type"].lower(), step.get("precision")) == ("modelbuilder", "fp32") for step in steps)


def _must_divide(name: str, block: int, checkpoint: Checkpoint) -> None:
    fitting = [size for size in _BLOCK_SIZES if not any(n % size for n in checkpoint.linear_sizes)]
    if block in fitting or block <= 0:  # Olive's -1 and 0: one block for a whole row or matrix
        return
    if block not in _BLOCK_SIZES:
        why = f"a block of {block} weights is not one of {', '.join(map(str, _BLOCK_SIZES))}, which the kernels have"
    else:
        wrong = ", ".join(str(size) for size in checkpoint.linear_sizes if size % block)
        why = f"a block of {block} weights does not divide this model's layer sizes ({wrong})"
    fix = "This model needs an Olive config of your own (--olive-config)."
    precision = split(name)[0]
    if fitting and (precision == "int4" or precision not in SHIPPED):
        place = "--int4-block-size" if precision == "int4" else "in its file a block of"
        fix = f"Use {place} {' or '.join(map(str, fitting))}."
    raise RecipeError(f"{name}: {why}.", fix)
