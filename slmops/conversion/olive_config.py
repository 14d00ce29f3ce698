"""The user's own Olive workflow file as a recipe."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from slmops.conversion import recipe_files, schema_worker
from slmops.conversion.olive_worker import Workflow
from slmops.core.errors import RecipeError, UsageError, WorkError
from slmops.core.job import Job
from slmops.core.names import to_name
from slmops.core.settings import Settings
from slmops.core.targets import CPU, target_of
from slmops.core.values import Checkpoint, Recipe
from slmops.processes import children

log = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"^(?:\$\{|\{|<)\s*([\w .-]+?)\s*(?:\}|>)$")
# Keys of the widely copied "quantization_config", which Olive ignores, and the ones that have an effect.
_TRANSLATED = {"block_size": "int4_block_size", "is_symmetric": "int4_is_symmetric"}


def load(path: Path, checkpoint: Checkpoint, name: str, settings: Settings) -> Recipe:
    """Read, complete and check an Olive workflow file before any work.

    The file runs as it is, with the job's checkpoint as its input model and a folder of slmops as its output.
    Placeholders for them (``<model_path>``, ``{model_path}``, ``${MODEL_PATH}``) are filled in. Broken JSON, unknown
    keys and other placeholders are a RecipeError.
    """
    config = _fill(read(path), checkpoint, path)
    steps = config["passes"]
    config["passes"] = {step: _flat(given, f"{path.name}: passes.{step}") for step, given in steps.items()}
    ours = ("model_path", "adapter_path")  # the checkpoint, into which an adapter is merged
    config["input_model"] = {key: value for key, value in _input_model(config, path).items() if key not in ours}
    if isinstance(config.get("engine"), dict):  # an older form of the same keys, which would override ours
        config |= config.pop("engine")
    for key in ("output_dir", "cache_dir", "cache_config", "clean_cache", "log_severity_level", "no_artifacts"):
        config.pop(key, None)
    check(path, config, checkpoint, name, settings)
    own = to_name(path.stem)
    taken = own in recipe_files.find(settings) or target_of(own) != CPU
    return Recipe(name=f"{own}-olive" if taken else own, config=config)


def check(path: Path, config: dict[str, Any], checkpoint: Checkpoint, name: str, settings: Settings) -> None:
    """Have Olive look at the workflow in a file; a RecipeError names what it would refuse, or ignore without an error.

    The log is one of the model's ``name``.
    """
    model = {**config.get("input_model", {"type": "HfModel"}), "model_path": str(checkpoint.path)}
    result, _ = children.call(
        schema_worker.handle,
        Workflow(config={**config, "input_model": model}),
        log=settings.logs / name / "olive-config.log",
        timeout_s=300,
        error=WorkError,
        env={"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"},
    )
    if result.problems:
        raise RecipeError(
            f"{path} would not do what it says:\n  - " + "\n  - ".join(result.problems), "Correct the file."
        )


def read(path: Path) -> dict[str, Any]:
    """The workflow in a file, unchanged; a RecipeError if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"The Olive config {path} cannot be read: {error.strerror}.", "Give a JSON file.") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not valid JSON: {error}", "Correct it and try again.") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path} holds a {type(config).__name__}, not a workflow.", "See Olive's workflow config.")
    if not isinstance(config.get("passes"), dict) or not config["passes"]:
        raise RecipeError(f"{path}: it has no 'passes'.", 'An Olive workflow names its passes: {"passes": {...}}.')
    _input_model(config, path)
    return config


def with_model(job: Job) -> Job:
    """The job with a model: its own, or else the one that its Olive file names; a UsageError if there is none.

    A path is relative to the current folder, as for ``olive run``, and what does not exist is a hub id.
    """
    if job.model.strip():
        return job
    if (path := job.olive_config) is None:
        raise UsageError("The model is missing.", "Give --model, or an --olive-config whose input_model names one.")
    given = _input_model(read(path), path)
    model, adapter = _place(given, "model_path"), _place(given, "adapter_path")
    if model is None:
        raise RecipeError(
            f"{path} names no model: it has no input_model.model_path.", "Write it there or give --model."
        )
    return job.model_copy(update={"model": adapter or model, "base": job.base or (model if adapter else None)})


def _place(given: dict[str, Any], key: str) -> str | None:
    place = given.get(key)
    if isinstance(place, dict):  # Olive's longer form: {"type": "folder", "config": {"path": ...}}
        place = next(iter((place.get("config") or {}).values()), None)
    if not isinstance(place, str) or not place.strip() or _PLACEHOLDER.match(place):
        return None
    if Path(place).exists():
        return str(Path(place).absolute())
    revision = (given.get("load_kwargs") or {}).get("revision")
    return f"{place}@{revision}" if revision and key == "model_path" else place


def _input_model(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a workflow says of its model, in the one form that Olive's two are equal to."""
    model = config.get("input_model", {})
    if not isinstance(model, dict) or str(model.get("type", "HfModel")).lower() != "hfmodel":
        raise RecipeError(
            f"{path}: input_model must be of type HfModel.", "slmops converts checkpoints in Hugging Face format."
        )
    flat = {**model, **(model.get("config") or {}), "type": "HfModel"}
    flat.pop("config", None)
    return flat


def _fill(value: Any, checkpoint: Checkpoint, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _fill(inner, checkpoint, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, checkpoint, path) for inner in value]
    match = _PLACEHOLDER.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    what = re.sub(r"[ .-]", "_", match[1].lower())
    if "model" in what or "checkpoint" in what:
        return str(checkpoint.path)
    if "output" in what or "cache" in what:
        return None  # replaced by folders of this run
    raise RecipeError(f"{path}: the placeholder {value} is not filled in.", "Put a value there.")


def _flat(given: Any, where: str) -> dict[str, Any]:
    """One pass in the one form that Olive's several are equal to: its config's keys beside its type."""
    step = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        raise RecipeError(f"{where} has no 'type', or is a list of several.", 'Name one pass each, as "ModelBuilder".')
    flat = {**step, **(step.get("config") or {})}
    flat.pop("config", None)
    if flat["type"].lower() == "modelbuilder" and "quantization_config" in flat:
        quantization = flat.pop("quantization_config")
        known = isinstance(quantization, dict)
        if unknown := sorted(set(quantization) - set(_TRANSLATED)) if known else [str(quantization)]:
            raise RecipeError(
                f"{where}.quantization_config: Olive ignores {', '.join(unknown)} without an error.",
                "Use ModelBuilder's own keys; block_size and is_symmetric are translated.",
            )
        for old, value in quantization.items():
            new = _TRANSLATED[old]
            flat.setdefault(new, value)
            log.warning("%s: Olive ignores quantization_config.%s; using %s = %s", where, old, new, value)
    return flat
