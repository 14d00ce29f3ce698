"""Adapters, which most fine-tunings leave behind: merged with their base model before anything else looks at them."""

import logging
import re
from pathlib import Path
from typing import Any

from slmops.checkpoints import inspection, merge_worker, room, store, weight_files
from slmops.checkpoints.merge_worker import MergeRequest
from slmops.checkpoints.reading import read_json
from slmops.checkpoints.store import Hashes
from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings

log = logging.getLogger(__name__)

_NOT_WEIGHTS = re.compile(r"(MULTITASK_)?PROMPT_TUNING|(P|PREFIX)_TUNING|ADAPTION_PROMPT|CPT|CARTRIDGE|XLORA|POLY")
"""PEFT's types that do more than change weights."""


def base_of(folder: Path, root: str, job: Job, where: str) -> str:
    """The base model of an adapter, as a job would call it; a CheckpointError if the adapter cannot be merged."""
    config = read_json(folder / weight_files.ADAPTER, f"{where}/{weight_files.ADAPTER}")
    kind, task = config.get("peft_type"), config.get("task_type")
    if _NOT_WEIGHTS.fullmatch(str(kind)):
        raise CheckpointError(
            f"{where} is an adapter of type {kind}, which no checkpoint can hold: it does more than change weights.",
            "Train a LoRA adapter instead.",
        )
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{where} is an adapter for {task}, not for a language model.", "Give another one.")
    if not root.endswith(weight_files.PICKLES):
        weight_files.read_file(folder / root, f"{where}/{root}")
    if job.base is not None:
        return job.base
    named, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if not named:
        raise CheckpointError(f"{where} does not name its base model.", "Name it: --base FOLDER or --base org/name.")
    return f"{named}@{revision}" if revision and not Path(named).exists() else named


def check_base(folder: Path, job: Job, where: str) -> tuple[str, dict[str, Any]]:
    """The root of a base model's weights and its config.json, if it is a model that can be converted."""
    root = weight_files.choose(inspection.names(folder), where, allow_pickle=job.allow_pickle)
    if root in weight_files.ADAPTER_ROOTS:
        raise CheckpointError(f"{where} is an adapter itself.", "Merge it with its own base first.")
    return root, inspection.read_config(folder, job, where)


def measure_base(folder: Path, job: Job, hashes: Hashes | None, where: str) -> tuple[str, float]:
    """The digest of a base model and the size of its weights in MB, if it is a whole one."""
    weights = weight_files.measure(folder, *check_base(folder, job, where), where)
    return inspection.digest_of(hashes or inspection.digest_files(folder, weights.files, job)), weights.size_mb


def merge(
    folder: Path, root: str, base: Path, digest: str, size_mb: float, job: Job, settings: Settings
) -> tuple[Path, Hashes]:
    """The folder of the adapter in ``folder`` merged with the base of this digest, once.

    A PrerequisiteError if there is not the room that a job on a checkpoint of the base's size takes.
    """

    def request(target: Path, _: Path) -> MergeRequest:
        log.info("merging %s with its base %s, once", folder, base)
        size = size_mb * 1e6 + (folder / root).stat().st_size
        room.demand(f"merging {folder} with {base}", *room.of_checkpoint(size), settings)
        return MergeRequest(base=base, adapter=folder, folder=target, trust_remote_code=job.trust_remote_code)

    own = inspection.digest_of(inspection.digest_files(folder, (root, weight_files.ADAPTER), job))
    key = inspection.digest_of({"adapter": own, "base": digest})
    return store.made(key, "merging", merge_worker.handle, request, settings)
