"""A registered variant in a Foundry home of its own, with settings for a measurement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from slmops.core.files import link_or_copy, write_atomic
from slmops.core.values import Frozen, Registration
from slmops.foundry.layout import GENAI_CONFIG, PUBLISHER


class Staged(Frozen):
    """Where a staged variant is; the user's Foundry Local has nothing of it."""

    home: Path
    folder: Path
    foundry_id: str
    context_length: int


def stage(
    registration: Registration, home: Path, *, fixed_length: bool = False, context_length: int | None = None
) -> Staged:
    """Lay a variant out below ``home``, its files linked, its genai_config.json changed.

    Args:
        registration: The variant as it is deployed.
        home: Foundry home to make, in place of an older one.
        fixed_length: Answers do not end before their token limit. The runtime ignores a minimal length, so the
            end-of-sequence token becomes the last id of the vocabulary (the largest that the runtime accepts), which is
            never used in padded vocabularies and hardly ever in others.
        context_length: A context length in tokens to pretend, at most the model's own.
    """
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "models" / PUBLISHER / registration.path.name
    for file in registration.path.rglob("*"):
        if file.is_file() and file.name != GENAI_CONFIG:
            target = folder / file.relative_to(registration.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
    config = json.loads((registration.path / GENAI_CONFIG).read_text(encoding="utf-8"))
    model, search = config["model"], config["search"]
    if fixed_length:
        model["eos_token_id"] = [model["vocab_size"] - 1]
    context = model["context_length"]
    if context_length is not None and context_length < context:
        model["context_length"] = context = context_length
        search["max_length"] = min(search.get("max_length", context), context)
    write_atomic(folder / GENAI_CONFIG, json.dumps(config, indent=4))
    return Staged(home=home, folder=folder, foundry_id=registration.foundry_id, context_length=context)
