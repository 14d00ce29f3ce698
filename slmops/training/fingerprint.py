"""Whether there is anything new: a digest over all that a retraining is made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from slmops.conversion.store import DECISIVE
from slmops.core import machine
from slmops.core.files import sha256
from slmops.core.values import Checkpoint
from slmops.training.values import Retrain

NO_INPUT = {"data", "evaluation_set", "name", "serve", "watch_s", "approval"}
"""Of a request: where data lie, which are digested themselves, and what happens to the result."""
PACKAGES = (*DECISIVE, "peft", "accelerate")


def input_digest(request: Retrain, checkpoint: Checkpoint, data_digest: str, evaluation: Path) -> str:
    """SHA-256 over the data, the base model, the settings and the packages of a retraining.

    Args:
        request: What was asked for.
        checkpoint: The base model.
        data_digest: Digest of the training items.
        evaluation: The evaluation set.
    """
    asked = request.model_dump(mode="json", exclude=NO_INPUT)
    # Files by what they hold, not by where they lie.
    asked["policy"] = None if request.policy is None else sha256(request.policy)
    if request.matcher is not None:
        file, _, function = request.matcher.rpartition(":")
        asked["matcher"] = [sha256(Path(file).expanduser()), function]
    versions = machine.versions()
    went_in = {
        "asked": asked,
        "base": checkpoint.digest,
        "data": data_digest,
        "evaluation": sha256(evaluation),
        "versions": {name: versions.get(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(went_in, sort_keys=True).encode()).hexdigest()
