"""The folder that Foundry Local reads: a variant's files, ``inference_model.json`` and the search settings.

A variant is placed once to be used, and staged with other settings to be measured.
"""

import json
import re
import shutil
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from slmops.checkpoints import abilities
from slmops.checkpoints.inspection import longrope_border
from slmops.checkpoints.source import MOST_CACHE
from slmops.core import machine
from slmops.core.errors import RegistrationError
from slmops.core.files import folder_appears_whole, intact, link_or_copy, move, write_atomic
from slmops.core.job import Job
from slmops.core.targets import TARGETS, split
from slmops.core.values import MANIFEST, Frozen, Registration, Variant

PUBLISHER = "slmops"
INFERENCE_MODEL = "inference_model.json"
GENAI_CONFIG = "genai_config.json"
RELEASED_CONFIG = "genai_config.released.json"  # as the registry has it, where this machine needs another
# The first two are kept with the variant as proof, and no runtime reads them; the third is written anew.
_NOT_DEPLOYED = {"olive.log", "olive_config.json", GENAI_CONFIG}
_MARKERS = {"tools": ("bot_token_id", "eot_token_id"), "reasoning": ("bor_token_id", "eor_token_id")}
"""Where genai_config.json names the tokens that begin and end a tool call, and a thought."""
CALL_REFUSED = re.compile(r"tool_call_plan\.cc|(?:invalid|malformed|required) tool call")
"""What the runtime says of a model's call that is cut off or does not fit its tool, unless it refuses the request."""
_SEARCH = ("max_length", "temperature", "top_p", "repetition_penalty")
CHUNK = 256
"""Tokens of a prompt that the runtime takes at once: more take more memory, and are no faster (docs/measuring.md).

``past_present_share_buffer`` stays as the exporter has it: a cache that grows slows decoding (docs/measuring.md).
"""


def model_name(name: str, variant: str) -> str:
    """Foundry's name of a variant, with the suffix that Foundry gives to models for its target."""
    precision, target = split(variant)
    return f"{name}-{precision}-{TARGETS[target].suffix}"


def place(
    variant: Variant, name: str, job: Job, prompt_template: dict[str, str] | None, home: Path
) -> tuple[Path, int, bool]:
    """Lay a variant out below Foundry's model cache: the folder, its version, and whether it is new.

    The same variant with the same settings keeps its folder and version; anything else is a new version. A variant
    whose genai_config.json is broken is a RegistrationError.
    """
    models = home / "models" / PUBLISHER
    called = model_name(name, variant.name)
    genai = _genai_config(variant, job)
    numbered = ((folder.name.removeprefix(f"{called}-"), folder) for folder in models.glob(f"{called}-*"))
    versions = {int(number): folder for number, folder in numbered if number.isdigit()}

    def described(version: int) -> dict[str, Any]:
        return {
            "Name": f"{called}:{version}",
            "Description": f"{variant.checkpoint.name} ({variant.name}), converted by slmops",
            "Version": str(version),
            "PromptTemplate": prompt_template,
            "ModelConfig": {key: genai["search"][key] for key in _SEARCH if key in genai["search"]},
        }

    for version, folder in versions.items():
        settings = _read(folder / INFERENCE_MODEL), _read(released(folder, GENAI_CONFIG))
        if settings == (described(version), genai) and _same(folder, variant):
            fit(folder)
            return folder, version, False
    version = max(versions, default=0) + 1
    target = models / f"{called}-{version}"
    with folder_appears_whole(target) as scratch:
        for file in [*(f.name for f in variant.files), MANIFEST]:
            if file not in _NOT_DEPLOYED:
                link_or_copy(variant.path / file, scratch / file)
        write_atomic(scratch / GENAI_CONFIG, json.dumps(genai, indent=4))
        fit(scratch)
        write_atomic(scratch / INFERENCE_MODEL, json.dumps(described(version), indent=2, ensure_ascii=False))
    return target, version, True


def _same(folder: Path, variant: Variant) -> bool:
    """Whether the files are the variant's or have the same content: one that was made again has files of its own."""
    manifest = _read(folder / MANIFEST)
    if manifest is None or manifest.get("key") != variant.key:  # reading all files may take a while
        return False
    deployed = (file for file in variant.files if file.name not in _NOT_DEPLOYED)
    return all(intact(folder / one.name, one.size, one.sha256, variant.path / one.name) for one in deployed)


def _genai_config(variant: Variant, job: Job) -> dict[str, Any]:
    """The exporter's config with the user's search settings, where the runtime reads them."""
    config = _read(variant.path / GENAI_CONFIG)
    if config is None:
        raise RegistrationError(f"{variant.path / GENAI_CONFIG} cannot be read.", "Convert the variant again.")
    asked = {key: value for key in _SEARCH if (value := getattr(job, key)) is not None}
    # The runtime allocates its cache for the context length, whatever max_length says.
    context = asked["max_length"] = config["model"]["context_length"] = variant.checkpoint.context_length
    search = {**config.get("search", {}), **asked}
    able = abilities.derive(variant.path)
    for pair, keys in ((able.tools, _MARKERS["tools"]), (able.reasoning, _MARKERS["reasoning"])):
        if pair is not None:
            config["model"] |= dict(zip(keys, pair.ids, strict=True))
    own = _read(variant.path / "config.json") or {}
    if longrope_border(own, context) == context:  # else the chunks of a prompt would get different factors
        search.setdefault("chunk_size", CHUNK)
    if "temperature" in asked:
        search["do_sample"] = asked["temperature"] > 0  # without sampling a temperature has no effect
    if not search.get("do_sample"):
        search["temperature"] = 0.0  # at any other, Foundry Local's service samples in spite of do_sample
    config["search"] = search
    return config


def for_this_machine(config: dict[str, Any]) -> dict[str, Any]:
    """A genai_config.json, which is given this machine's number of threads unless its recipe has set one.

    ONNX Runtime counts the cores by itself, and finds one on virtual machines of two: their models are half as fast.
    """
    if model := config.get("model"):
        options = model.setdefault("decoder", {}).setdefault("session_options", {})
        options.setdefault("intra_op_num_threads", machine.physical_cores())
    return config


def released(folder: Path, name: str) -> Path:
    """Where a folder has the file ``name`` as it was released."""
    kept = folder / RELEASED_CONFIG
    return kept if name == GENAI_CONFIG and kept.exists() else folder / name


def fit(folder: Path) -> None:
    """Give a released folder the genai_config.json that this machine needs; the released one stays beside it."""
    config = _read(released(folder, GENAI_CONFIG))
    if config is None or _read(folder / GENAI_CONFIG) == for_this_machine(config):
        return
    if not (folder / RELEASED_CONFIG).exists():
        move(folder / GENAI_CONFIG, folder / RELEASED_CONFIG)
    write_atomic(folder / GENAI_CONFIG, json.dumps(config, indent=4))


def claimed(folder: Path) -> frozenset[str]:
    """What a deployed variant can do besides answering: ``tools``, ``reasoning``, both or neither."""
    model = (_read(folder / GENAI_CONFIG) or {}).get("model", {})
    return frozenset(ability for ability, keys in _MARKERS.items() if all(key in model for key in keys))


def sessions_that_fit(folder: Path, most: int) -> int:
    """How many sessions at once, 1 to ``most``, have no more cache than one variant may have; each has all of it."""
    model = (_read(folder / GENAI_CONFIG) or {}).get("model", {})
    decoder = model.get("decoder", {})
    sizes = [int(decoder.get(key, 0)) for key in ("num_hidden_layers", "num_key_value_heads", "head_size")]
    cache = 2 * 4 * prod(sizes) * int(model.get("context_length", 0))
    return max(1, min(most, MOST_CACHE // max(cache, 1)))


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data
    return None


class Staged(Frozen):
    """Where a staged variant is; the user's Foundry Local has nothing of it."""

    home: Path
    folder: Path
    foundry_id: str
    context_length: int


def stage(
    registration: Registration,
    home: Path,
    *,
    fixed_length: bool = False,
    context_length: int | None = None,
    on_the_cpu: str | None = None,
) -> Staged:
    """Lay a variant out in a new Foundry home, in place of an older one: linked, with another genai_config.json.

    With ``fixed_length`` answers do not end before their token limit. The runtime ignores a minimal length, so the
    end-of-sequence token becomes the last id of the vocabulary (the largest that the runtime accepts), which is never
    used in padded vocabularies and hardly ever in others. ``context_length`` in tokens is one to pretend, at most the
    model's own. ``on_the_cpu`` is a Foundry id by which the CPU runs it, whatever it is for.
    """
    foundry_id = on_the_cpu or registration.foundry_id
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "models" / PUBLISHER / foundry_id.replace(":", "-")
    for file in registration.path.rglob("*"):
        if file.is_file() and file.name != GENAI_CONFIG:
            link_or_copy(file, folder / file.relative_to(registration.path))
    config = json.loads((registration.path / GENAI_CONFIG).read_text(encoding="utf-8"))
    model, search = config["model"], config["search"]
    if fixed_length:
        model["eos_token_id"] = [model["vocab_size"] - 1]
    context = model["context_length"]
    if context_length is not None and context_length < context:
        model["context_length"] = context = context_length
        search["max_length"] = min(search.get("max_length", context), context)
    if on_the_cpu:
        model["decoder"]["session_options"]["provider_options"] = []
        described = {**(_read(folder / INFERENCE_MODEL) or {}), "Name": foundry_id}
        write_atomic(folder / INFERENCE_MODEL, json.dumps(described, indent=2, ensure_ascii=False))
    write_atomic(folder / GENAI_CONFIG, json.dumps(config, indent=4))
    return Staged(home=home, folder=folder, foundry_id=foundry_id, context_length=context)
