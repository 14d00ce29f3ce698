"""Is there anything new? A digest over every input of a retraining."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from slmops.conversion import store
from slmops.core import machine
from slmops.core.files import sha256
from slmops.core.values import Checkpoint
from slmops.training.finetune import TRAINING_PACKAGES
from slmops.training.values import Retrain

NO_INPUT = {"data", "evaluation_set", "name", "serve", "watch_s", "approval"}
"""Fields of a request that do not count: locations, since contents are digested, and what happens to the result."""


def input_digest(request: Retrain, checkpoint: Checkpoint, data_digest: str, evaluation: Path) -> str:
    """SHA-256 over data, base model, settings and package versions of a retraining.

    Args:
        request: What was asked for.
        checkpoint: The base model.
        data_digest: Digest of the training items, from :func:`slmops.training.data.digest`.
        evaluation: File of the evaluation set.
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
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
