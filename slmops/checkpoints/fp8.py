"""Checkpoints in FP8, the one quantization that transformers undoes without a GPU and without another package."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.checkpoints import inspection, store, unpack_worker, weight_files
from slmops.checkpoints.store import Hashes
from slmops.checkpoints.unpack_worker import UnpackRequest
from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings

log = logging.getLogger(__name__)


def dequantized(
    folder: Path, config: Mapping[str, Any], job: Job, settings: Settings, where: str
) -> tuple[Path, Hashes]:
    """The folder of the same checkpoint in its own dtype, made once."""
    root = weight_files.choose(inspection.names(folder), where, allow_pickle=False)
    files, found = weight_files.read(folder, root, where)
    block = config["quantization_config"].get("weight_block_size")
    for name, (dtype, shape, _) in found.items():
        scale = found.get(f"{name}_scale_inv")
        # transformers takes numbers without a scale as they are, and other blocks than these for equally large ones.
        even = scale and (not block or all(n == m * b for n, m, b in zip(shape, scale.shape, block, strict=False)))
        if dtype.startswith("F8") and not even:
            raise CheckpointError(
                f"{where} cannot be dequantized: {name} of shape {shape} has no scales for blocks of {block}.",
                "Use the checkpoint from before it was quantized.",
            )
    log.warning("%s is stored in FP8: variants are compared with what it is dequantized to", where)
    hashes = inspection.digest_files(folder, files, job)

    def request(target: Path, _: Path) -> UnpackRequest:
        return UnpackRequest(source=folder, folder=target)

    digest = inspection.digest_of(hashes)
    return store.made(digest, "dequantizing", unpack_worker.handle, request, settings)
